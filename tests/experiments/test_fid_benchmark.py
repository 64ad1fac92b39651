"""The leaderboard by its command: its rows are what `diffusion-lit evaluate` says of the same checkpoints."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from helpers.by_command import by_command

from experiments.benchmarks.fid_benchmark import named

DIGITS = Path(__file__).resolve().parents[2] / "configs/edm_digits.yaml"
LAST = Path("runs/edm_digits/version_0/checkpoints/last.ckpt")
MEASURED = ["--num_samples=20", "--num_blocks=2", "--extractor=pixels", "--batch_size=20"]


@pytest.fixture
def checkpoint(lightning):
    lightning(
        *["fit", "--config", DIGITS, "--trainer.max_steps=1", "--trainer.callbacks=[]", "--trainer.accelerator=cpu"],
        *["--model.init_args.net.init_args.model_channels=16", "--model.init_args.sampling.num_steps=2"],
        *["--sample_grid.every=0", "--trajectory.every=0", "--loss_by_noise_level.batches=0"],
        *["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"],
    )
    return LAST


def benchmark(*words):
    by_command("benchmarks.fid_benchmark", *words, "--accelerator=cpu", "--out=out")


def test_each_checkpoint_has_a_name_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    best = LAST.with_name("best.ckpt")
    assert list(named([LAST, best, tmp_path / LAST])) == ["edm_digits/version_0", "edm_digits/version_0/best"]
    assert list(named([Path("a/x.ckpt"), Path("b/x.ckpt"), Path("y.ckpt")])) == ["a/x", "b/x", "y"]


@pytest.mark.medium
def test_the_leaderboard_says_what_evaluate_says(lightning, checkpoint, capsys):
    shutil.copy(checkpoint, "model.ckpt")
    words = [f"--configs={DIGITS}", "--checkpoints=model.ckpt", *MEASURED]
    benchmark(*words)
    with open("out/leaderboard.csv") as file:
        first, second = csv.DictReader(file)
    assert {first["model"], second["model"]} == {"edm_digits/version_0", "model"}
    assert {**first, "model": "", "seconds": ""} == {**second, "model": "", "seconds": ""}  # the same weights
    asked = ["--ckpt_path=model.ckpt", "--device=cpu", "--out=alone.json"]
    lightning("evaluate", *MEASURED, *asked)
    figures = json.loads(Path("alone.json").read_text())["results"][0]["references"]["train"]["figures"]
    for name, figure in (("figure", "fd_pixels"), ("precision", "precision_pixels"), ("recall", "recall_pixels")):
        assert float(first[name]) == pytest.approx(figures[figure]["mean"], rel=1e-6), name
    page = Path("out/leaderboard.md").read_text()
    assert "## Digits, fd_pixels_20 against train" in page and page.count("\n| ") == 5  # with the head and the floor

    reports = [*Path("out/receipts").glob("*.json")]
    before = {path: path.stat().st_mtime_ns for path in reports}
    benchmark(*words)
    assert len(reports) == 2 and {path: path.stat().st_mtime_ns for path in reports} == before
    benchmark(*words, "--reference=test")
    assert all(path.stat().st_mtime_ns > before[path] for path in reports)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        benchmark("--checkpoints=nowhere.ckpt", *MEASURED)
    assert "nowhere.ckpt" in (said := capsys.readouterr().err) and "Traceback" not in said


@pytest.mark.slow
def test_the_same_samples_through_torch_fidelitys_command(checkpoint):
    benchmark(f"--checkpoints={checkpoint}", *MEASURED, "--parity=random", "--parity_samples=24")
    found = json.loads(Path("out/parity.json").read_text())
    pairs = {
        "fid_inception": "frechet_inception_distance",
        "kid_inception": "kernel_inception_distance_mean",
        "precision_inception": "precision",
        "recall_inception": "recall",
        "isc_inception": "inception_score_mean",
    }
    for ours, theirs in pairs.items():
        assert found["ours"][ours] == pytest.approx(found["theirs"][theirs], rel=1e-4, abs=1e-6), ours
    assert Path("out/parity.md").read_text().count("\n| ") == 2 + len(pairs)
