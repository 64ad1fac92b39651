"""What many tests share: a clean working folder, small data in official layouts, the command in this process."""

import contextlib
import logging
import os
import shutil
import sys

import pytest
from helpers.apart import run_apart
from helpers.costs import remember_costs
from helpers.project_files import write_idx

os.environ.setdefault("OMP_NUM_THREADS", "1")  # OpenMP's threads do not survive a fork, and some tests fork ranks
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network
logging.raiseExceptions = False  # Lightning's log handler keeps a stream that pytest has closed


def pytest_runtest_setup(item):
    remember_costs()


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
        done = run_apart(args)
        print(done.stdout, file=sys.stderr)
        if done.returncode:
            raise SystemExit(done.returncode)

    return run


@pytest.fixture
def one_thread():
    """A fork must not inherit a pool of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def runs_made():
    """Folders of runs by their command lines."""
    return {}


@pytest.fixture
def trained_once(lightning, runs_made, tmp_path_factory):
    """As `lightning`, but a run that was made before, by the same words, is copied: `trained_once("fit", ...)`."""

    def run(*args):
        words = tuple(map(str, args))
        if words not in runs_made:
            folder = tmp_path_factory.mktemp("made")
            with contextlib.chdir(folder):
                lightning(*words)
            runs_made[words] = folder / "runs"
        shutil.copytree(runs_made[words], "runs", dirs_exist_ok=True)

    return run
