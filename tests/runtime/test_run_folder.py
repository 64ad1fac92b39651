"""Where a run writes: decided by all ranks together, so that what rank 0 does alone waits for nobody."""

from pathlib import Path

import pytest
from helpers.apart import run_apart
from helpers.project_files import ROOT
from lightning.pytorch import Trainer

from diffusion_lit.runtime.run_folder import decide_run_folder, run_folder

TWO = ["--trainer.devices=2", "--trainer.accelerator=cpu", "--trainer.strategy=ddp_fork"]
SHORT = ["--trainer.max_steps=6", "--trainer.val_check_interval=3"]
SNAPSHOTS = ["--ema.half_life=null", "--ema.sigma_rel=[0.05,0.1]", "--ema.snapshot_every=2"]


@pytest.mark.slow  # test_as_shipped.py, which is not, runs the same with more: snapshots, and fewer samples
@pytest.mark.parametrize("extra", [[], SNAPSHOTS], ids=["as shipped", "snapshots"])
def test_a_run_on_two_ranks_ends_with_its_images_on_disk(extra, tmp_path):
    """The defaults, everything on: nothing of rank 0's own may wait for a rank that waits elsewhere."""
    words = ["fit", f"--config={ROOT}/configs/edm_digits.yaml", *TWO, *SHORT, *extra]
    run = run_apart(words, tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert run.returncode == 0, run.stdout[-3000:]
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
