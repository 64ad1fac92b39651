"""Where a run writes: decided by all ranks together, so that what rank 0 does alone waits for nobody."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.project_files import ROOT
from lightning.pytorch import Trainer

from diffusion_lit.runtime.run_folder import decide_run_folder, run_folder

TWO = ["--trainer.devices=2", "--trainer.accelerator=cpu", "--trainer.strategy=ddp_fork"]
SHORT = ["--trainer.max_steps=6", "--trainer.val_check_interval=3"]
SNAPSHOTS = ["--ema.half_life=null", "--ema.sigma_rel=[0.05,0.1]", "--ema.snapshot_every=2"]


@pytest.mark.parametrize(
    "extra",  # snapshots are on in tests/commands/test_as_shipped.py too, which is not slow
    [pytest.param([], id="as shipped"), pytest.param(SNAPSHOTS, id="snapshots", marks=pytest.mark.slow)],
)
def test_a_run_on_two_ranks_ends_with_its_images_on_disk(extra, tmp_path):
    """The defaults, everything on: nothing of rank 0's own may wait for a rank that waits elsewhere."""
    command = [sys.executable, "-m", "diffusion_lit", "fit", f"--config={ROOT}/configs/edm_digits.yaml"]
    environment = {**os.environ, "PYTHONPATH": ROOT, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *TWO, *SHORT, *extra], cwd=tmp_path, env=environment, check=True, timeout=240)
    folder = tmp_path / "runs/edm_digits/version_0"
    assert [path.name for path in Path(tmp_path / "runs/edm_digits").iterdir()] == ["version_0"]
    assert len(list(folder.glob("samples/*.png"))) == 2
    assert list(folder.glob("trajectory/*.gif")) and (folder / "checkpoints/last.ckpt").exists()
    assert bool(list(folder.glob("averages/*"))) == bool(extra)


def test_a_folder_that_was_not_decided_is_an_error_and_no_collective(tmp_path):
    trainer = Trainer(default_root_dir=tmp_path, logger=False)
    with pytest.raises(RuntimeError, match="decide_run_folder"):
        run_folder(trainer)
    assert decide_run_folder(trainer) == run_folder(trainer) == tmp_path
