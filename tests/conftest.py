"""What many tests share: a clean working folder, small data in official layouts, the command in this process."""

import logging
import os
import subprocess
import sys

import pytest
from helpers.project_files import ROOT, write_idx

os.environ.setdefault("OMP_NUM_THREADS", "1")  # OpenMP's threads do not survive a fork, and some tests fork ranks
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network
logging.raiseExceptions = False  # Lightning's log handler keeps a stream that pytest has closed


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
