"""What many tests share: a clean working folder, small data in official layouts, the command in this process."""

import gzip
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = str(Path(__file__).resolve().parent.parent)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # OpenMP's threads do not survive a fork, and some tests fork ranks
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network
logging.raiseExceptions = False  # Lightning's log handler keeps a stream that pytest has closed


def write_idx(folder, train=200, test=40, size=28, classes=10, compress=True, seed=0):
    """Writes the four idx files of MNIST's layout with random pictures whose brightness tells their class."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    opener, ending = (gzip.open, ".gz") if compress else (open, "")
    for part, count in (("train", train), ("t10k", test)):
        labels = (np.arange(count) % classes).astype(np.uint8)
        images = rng.integers(0, 20, (count, size, size)) + 20 * labels[:, None, None]
        header = np.array([2051, count, size, size], dtype=">i4").tobytes()
        with opener(folder / f"{part}-images-idx3-ubyte{ending}", "wb") as file:
            file.write(header + images.astype(np.uint8).tobytes())
        with opener(folder / f"{part}-labels-idx1-ubyte{ending}", "wb") as file:
            file.write(np.array([2049, count], dtype=">i4").tobytes() + labels.tobytes())
    return folder


@pytest.fixture
def idx_folder(tmp_path):
    return write_idx(tmp_path / "idx")


@pytest.fixture
def lightning(tmp_path, monkeypatch):
    """Runs the command in this process, in an empty folder: `lightning("fit", "--config", ...)`.

    Ranks are forked from a process of their own: autograd may have started threads in this one, which no fork survives.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*args):
        from diffusion_lit.commands.main import main

        args = [str(arg) for arg in args]
        if "--trainer.strategy=ddp_fork" not in args:
            return main(args)
        command = [sys.executable, "-c", "from diffusion_lit.commands.main import main; main()", *args]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise SystemExit(done.returncode)

    return run
