"""A rank that is killed, that raises, or that finds the disk full: all ranks end within a minute, with a sentence."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.project_files import ROOT
from helpers.runs import FIT, LAST, read

FAILING = """
import os, signal, time
from lightning.pytorch import Callback

class Fails(Callback):
    def __init__(self, rank: int, how: str):
        self.rank, self.how = rank, how

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 3 and trainer.global_rank == self.rank:
            print("FAILS", flush=True)
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "raises":
                raise ValueError("the moon is full")
            raise OSError(28, "No space left on device")
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_fork"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["killed", "raises", "disk"])
def test_all_ranks_end_within_a_minute(tmp_path, how, rank, strategy):
    (tmp_path / "failing.py").write_text(FAILING)
    entry = [str(Path(ROOT, "diffusion_lit/__main__.py"))]
    command = [sys.executable, *entry, *FIT, "--trainer.max_steps=100000", "--checkpoint.every_n_train_steps=2"]
    command += [f"--trainer.strategy={strategy}", "--trainer.devices=2", "--trainer.callbacks=failing.Fails"]
    command += [f"--trainer.callbacks.init_args.rank={rank}", f"--trainer.callbacks.init_args.how={how}"]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "wb") as log:
        run = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, env=env, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while "FAILS" not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline and run.poll() is None, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.2)
        failed = time.monotonic()
        assert run.wait(60) != 0
        while _alive(run.pid):
            assert time.monotonic() < failed + 60, "a rank is left"
            time.sleep(0.5)
    finally:
        if _alive(run.pid):
            os.killpg(run.pid, signal.SIGKILL)
    said = (tmp_path / "log").read_text()
    sentence = {"killed": "", "raises": "the moon is full", "disk": "No space left on device"}[how]
    assert sentence in said
    if how == "killed":
        assert any(word in said for word in ("is gone", "died", "terminated with code")) or rank == 0, said[-2000:]
    assert read(tmp_path / LAST)["global_step"] == 2


def _alive(group):
    """Whether a process of the group is left, zombies aside."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False
