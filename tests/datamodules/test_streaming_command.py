"""The command trains on chunks, goes on with another number of ranks, and measures against them."""

import shutil
import sys

import pytest
from helpers.configs_tools import write_images

from datamodules.write_chunks import write_chunks
from diffusion_lit.commands.main import main

FIT = [
    *["fit", "--config", "edm_folder", "--data", "datamodules.Streamed", "--trainer.accelerator=cpu"],
    *["--trainer.val_check_interval=2", "--data.init_args.batch_size=8", "--data.init_args.window=2"],
    *["--model.init_args.net.init_args.model_channels=16", "--model.init_args.net.init_args.num_blocks=1"],
    *["--model.init_args.sampling.num_steps=2", "--sample_grid.columns=1"],
]
EVALUATE = ["evaluate", "--accelerator=cpu", "--num_samples=8", "--extractor=pixels", "--num_steps=2"]


@pytest.mark.medium
def test_chunks_are_trained_on_by_two_ranks_then_by_one_and_measured_against(tmp_path, monkeypatch, capsys, recwarn):
    pytest.importorskip("litdata")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["diffusion-lit", *words])
        main()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFUSION_LIT_CACHE", str(tmp_path / "cache"))
    write_images(tmp_path / "photos", count=120, size=40)
    write_chunks("photos", "chunks", 16, chunk_mb=0.02)
    url, checkpoint = f"local:{tmp_path}/chunks", "runs/edm_folder/version_0/checkpoints/last.ckpt"
    ranks = ["--trainer.devices=2", "--trainer.strategy=ddp_fork"]
    run(*FIT, f"--data.init_args.root={url}", "--trainer.max_steps=4", *ranks)
    shutil.copy(checkpoint, "far.ckpt")
    run(*FIT, "--data.init_args.root=chunks", "--trainer.max_steps=6", "--ckpt_path=last")
    steps = sorted(path.stem for path in (tmp_path / "runs/edm_folder/version_0/samples").glob("*.png"))
    assert steps == [f"step_{step:07d}" for step in (2, 4, 6)]
    assert not [one for one in recwarn if "not what the checkpoint was" in str(one.message)]  # wherever it is read
    with pytest.raises(SystemExit):
        run(*EVALUATE, "--ckpt_path=far.ckpt")
    told = capsys.readouterr()
    assert f"--data_root {url}" in told.out + told.err  # a checkpoint's URL is not opened
    run(*EVALUATE, f"--ckpt_path={checkpoint}", "--data_root=chunks")
    assert (tmp_path / "runs/evaluations/report.json").exists()
