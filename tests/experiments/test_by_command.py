"""Experiments that nothing else runs, by their commands and in a small form."""

import csv
import json
from pathlib import Path

import pytest
import torch
from helpers.by_command import by_command
from PIL import Image

from diffusion_lit.modules.load import load_module
from experiments import pixel_vs_latent

DIGITS = Path(__file__).resolve().parents[2] / "configs/edm_digits.yaml"
LAST = Path("runs/edm_digits/version_0/checkpoints/last.ckpt")


@pytest.fixture
def run_of_averages(trained_once):
    trained_once(
        *["fit", "--config", DIGITS, "--trainer.max_steps=40", "--trainer.callbacks=[]", "--trainer.accelerator=cpu"],
        *["--model.init_args.net.init_args.model_channels=8", "--model.init_args.sampling.num_steps=2"],
        *["--model.init_args.optimizer.init_args.lr=0.01", "--trainer.limit_val_batches=1", "--sample_grid.every=0"],
        *["--trajectory.every=0", "--loss_by_noise_level.batches=0", "--ema.sigma_rel=[0.05, 0.25]"],
        *["--ema.snapshot_every=20", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"],
    )
    return LAST


@pytest.mark.medium
def test_every_average_is_measured_by_its_own_weights(run_of_averages, lightning):
    words = [f"--ckpt_path={LAST}", "--num_samples=60", "--extractor=diffusion_lit.evaluation.Pixels", "--out=out"]
    by_command("posthoc_ema", *words, "--sigma_rels=[0.05, 0.1, 0.25]", "--steps=[20, 40]")
    found = json.loads(Path("out/figures.json").read_text())
    distances = {(row["step"], row["sigma_rel"]): row["distance"] for row in found["rows"]}
    assert len(distances) == len(set(distances.values())) == 6 and found["raw"] not in distances.values()
    assert found["best"]["distance"] == min(distances.values())
    assert found["kept"] == [0.05, 0.25] and Image.open("out/posthoc_ema.png").width > 300
    # The run's own average is of a width that was kept: `evaluate`, which takes it, finds the same distance.
    asked = ["--num_samples=60", "--num_blocks=1", "--extractor=pixels", "--device=cpu", "--out=report.json"]
    lightning("evaluate", f"--ckpt_path={LAST}", *asked)
    figures = json.loads(Path("report.json").read_text())["results"][0]["references"]["train"]["figures"]
    assert distances[40, 0.05] == pytest.approx(figures["fd_pixels"]["mean"], rel=1e-4)


@pytest.mark.medium
def test_digits_are_read_as_they_were_meant(run_of_averages, monkeypatch, capsys):
    """Training digits in the place of samples are read nearly always, and are as various as themselves."""
    from datamodules import Digits

    by_command("read_digits", f"--ckpt_path={LAST}", "--per_class=10", "--out=out")
    found = json.loads(Path("out/figures.json").read_text())
    assert found["read as intended"] < 0.6 < 0.9 < found["held-out digits read"]
    width, height = Image.open("out/grid.png").size
    assert width > height > 100  # ten of each class, its name before the row
    split = Digits().split("train")

    def drawn(self, seeds, labels, sampling):
        rows = [torch.nonzero(split.labels == label)[seed % 10, 0] for seed, label in zip(seeds, labels, strict=True)]
        return split.images[torch.stack(rows)].float() / 127.5 - 1

    monkeypatch.setattr(type(load_module(LAST)), "generate", drawn)
    by_command("read_digits", f"--ckpt_path={LAST}", "--per_class=10", "--out=out")
    found = json.loads(Path("out/figures.json").read_text())
    assert found["read as intended"] > 0.95 and found["precision of samples"] > 0.5
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        by_command("read_digits", "--ckpt_path=nowhere.ckpt")
    assert "nowhere.ckpt" in (said := capsys.readouterr().err) and "Traceback" not in said


@pytest.mark.medium
def test_pixel_and_latent_take_the_same_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["--seconds=8", "--num_steps=[1, 2]", "--num_samples=40", "--model_channels=8", "--extractor=pixels"]
    by_command("pixel_vs_latent", *words, "--accelerator=cpu", "--out=out")
    with open("out/table.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], float(row["nfe"])) for row in rows] == [
        (name, nfe) for name in ("pixel EDM", "latent EDM") for nfe in (1, 3)
    ]
    assert rows[0].keys() == set(pixel_vs_latent.Point._fields)
    assert all(float(row["distance"]) > 0 for row in rows)
    page = Path("out/table.md").read_text()
    assert "| VAE |" in page and "reconstructed" in page and "real against real" in page
    for name in ("figure", "samples_pixel", "samples_latent"):
        assert Image.open(f"out/{name}.png").width > 100
