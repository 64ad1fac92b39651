"""Loggers chosen by name, and what each is given beyond figures."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from helpers.runs import DIGITS, TINY, stopped
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from diffusion_lit.callbacks import loggers
from diffusion_lit.callbacks.loggers import note, show_image, with_logger_named
from diffusion_lit.commands.place import wandb_id

RUN = ["fit", "--config", DIGITS, *TINY, "--loss_by_noise_level.batches=0", "--trainer.max_steps=2"]


def test_a_logger_is_named_on_the_command_line(monkeypatch):
    csv_class = "lightning.pytorch.loggers.CSVLogger"
    assert with_logger_named(["fit", "--trainer.logger", "csv"]) == ["fit", "--trainer.logger", csv_class]
    assert with_logger_named(["fit", "--trainer.logger=csv", "--name", "wandb"]) == [
        *["fit", f"--trainer.logger={csv_class}", "--name", "wandb"]
    ]
    for other in ("false", "CSVLogger", "my.Logger"):
        assert with_logger_named(["fit", f"--trainer.logger={other}"]) == ["fit", f"--trainer.logger={other}"]
    for words in (["--trainer.logger", "mlflow"], ["--trainer.logger=tensorbord"]):
        with pytest.raises(ValueError, match=r"no logger (mlflow|tensorbord); choose one of tensorboard, csv, wandb"):
            with_logger_named(["fit", *words])
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"wandb.*pip install 'diffusion-lit\[wandb\]'"):
        with_logger_named(["fit", "--trainer.logger=wandb"])


def test_a_logger_whose_package_is_missing_is_told_by_the_command(lightning, monkeypatch, capsys):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    assert "wandb" in stopped(capsys, lightning, *RUN, "--trainer.logger", "wandb")


def test_a_csv_logger_is_given_figures_images_animations_and_texts(lightning, tmp_path, capsys):
    lightning(*RUN, "--trainer.logger", "csv")
    said = capsys.readouterr().out
    assert "diffusion-lit report --run runs/" in said and "tensorboard" not in said
    (table,) = tmp_path.rglob("images.csv")
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert {row["tag"] for row in rows} == {"samples", "trajectory/strip", "trajectory/animation"}
    for row in rows:
        assert row["step"] == "2"
        assert Image.open(row["path"]).format == ("GIF" if row["tag"] == "trajectory/animation" else "PNG")
    assert "val/loss" in (table.parent / "metrics.csv").read_text()
    assert "Adam" in (table.parent / "notes.csv").read_text()


def test_a_logger_of_ones_own_takes_part_by_two_methods(tmp_path):
    class Own(CSVLogger):
        def __init__(self):
            super().__init__(tmp_path)
            self.seen = []

        def show_image(self, *given):
            self.seen.append(given)

        note = show_image

    own = Own()
    show_image(own, "samples", Path("a.png"), (3, 4), 5)
    note(own, "hardware", "a CPU", 0)
    assert own.seen == [("samples", Path("a.png"), (3, 4), 5), ("hardware", "a CPU", 0)]
    show_image(object(), "samples", Path("a.png"), (3, 4), 5)  # one that shows none
    note(object(), "hardware", "a CPU", 0)


def test_wandb_is_given_the_same_offline(lightning, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "here"))
    lightning(*RUN, "--trainer.logger", "wandb")
    summary = dict(wandb.run.summary)
    config = dict(wandb.run.config)
    wandb.finish()
    assert {"val/loss", "samples", "trajectory/strip", "trajectory/animation", "hardware"} <= set(summary)
    assert "Adam" in summary["hardware"] and json.dumps(config, default=str).count("UNet")
    files = sorted(path.suffix for path in tmp_path.rglob("media/*/**/*") if path.is_file())
    assert files == [".gif", ".png", ".png"]


@pytest.mark.medium
def test_a_resumed_run_goes_on_in_its_wandb_run_and_a_fresh_one_does_not(lightning, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run, seen = Path("runs/edm_digits/version_0"), []
    more = [*RUN[:-1], "--sample_grid.every=0", "--trajectory.every=0", "--trainer.logger=wandb"]
    for words in (
        [*more, "--trainer.max_steps=1"],
        [*more, "--trainer.max_steps=2", "--ckpt_path=last"],
        ["fit", f"--config={run}/config.yaml", "--trainer.max_steps=1"],
    ):
        lightning(*words)
        seen.append(wandb.run.id)
        wandb.finish()
    assert seen[0] == seen[1] != seen[2]
    assert len(list(run.glob(f"wandb/offline-run-*-{seen[0]}"))) == 2 and wandb_id(run) == seen[0]
    assert "id" not in yaml.safe_load((run / "config.yaml").read_text())["trainer"]["logger"]["init_args"]


def test_the_wandb_run_of_a_folder_is_the_one_that_was_started_last(tmp_path):
    assert wandb_id(tmp_path) is None
    for name in ("run-20260101_120000-of-a-user", "offline-run-20260102_110000-k2", "latest-run", "debug.log"):
        (tmp_path / "wandb" / name).mkdir(parents=True)
    assert wandb_id(tmp_path) == "k2"
    (tmp_path / "wandb/run-20260102_110001-of-a-user").mkdir()
    assert wandb_id(tmp_path) == "of-a-user"
