"""The race: halving at equal time, a config and a page at its end, and one timed training at a time."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.in_process import run_in_process

from datamodules import Digits
from diffusion_lit.commands import main as cli
from experiments import race as study
from experiments.benchmarks import seeds
from experiments.benchmarks.trainings import GUIDED
from experiments.harness.configs import merge
from experiments.harness.halving import BASE, TRAINING, Result, Round, combined, plan, survivors
from experiments.harness.study import main
from experiments.sweep import read

HALVING = Path(study.__file__).parents[1] / "configs/studies/race.yaml"
NET = "model.init_args.net.init_args.model_channels"


def result(name, figure, error=0.1, minutes=1.0):
    return Result(name, minutes, figure, error, 100, Path(), {}, 8)


@pytest.mark.parametrize(("count", "finalists", "seeds_of_last"), [(18, 3, 3), (5, 3, 3), (4, 3, 2), (2, 1, 1)])
def test_the_rounds_fill_the_hours(count, finalists, seeds_of_last):
    rounds = plan(count, 2.0, finalists, seeds_of_last)
    assert rounds[0].count == count and rounds[-1].count == min(count, finalists + 1)
    assert [one.seeds for one in rounds] == [1] * (len(rounds) - 1) + [seeds_of_last]
    for before, after in pairwise(rounds):
        assert after.minutes == pytest.approx(2 * before.minutes)
        assert after.count - 1 == max(finalists, -((1 - before.count) // 2))
    together = rounds[-1].count > 2
    total = sum(one.count * one.minutes * one.seeds for one in rounds)
    total += together * rounds[-1].minutes * seeds_of_last
    assert total == pytest.approx(TRAINING * 120)


def test_the_config_stays_and_the_best_go_on_together():
    field = {BASE: {}, "a": {"x.y": 1}, "b": {"x": 2, "z": 3}, "c": {"w": 4}, "failed": {}}
    results = {one.name: one for one in (result(BASE, 9), result("a", 1), result("b", 2), result("c", 3))}
    assert list(survivors(field, results, 3)) == [BASE, "a", "b"]
    assert combined({name: field[name] for name in (BASE, "a", "b", "c")}, results) == {"z": 3, "w": 4, "x.y": 1}
    assert result("a", 1.0).against(result(BASE, 2.0)) == "helps"
    assert result("a", 3.0).against(result(BASE, 2.0)) == "hurts"
    assert result("a", 1.8).against(result(BASE, 2.0)) == "no difference seen"


def test_options_are_set_in_a_config():
    config = {"model": {"class_path": "A", "init_args": {"net": {"class_path": "N", "init_args": {"width": 1}}}}}
    options = {"model.init_args.net.init_args.width": "2", "trainer.max_steps": 5, "model.init_args.loss": {"a": 1}}
    made = merge(config, options)
    assert made["model"]["init_args"] == {"net": {"class_path": "N", "init_args": {"width": 2}}, "loss": {"a": 1}}
    assert made["trainer"] == {"max_steps": 5} and config["model"]["init_args"]["net"]["init_args"] == {"width": 1}


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFUSION_LIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("experiments.benchmarks.fit_training.PACE_STEPS", 3)
    monkeypatch.setattr("experiments.harness.halving.TRAINING", 7e-4)  # of 2 hours, 5 seconds
    ran = run_in_process(monkeypatch, seeds)
    variants = tmp_path / "variants.yaml"
    named = {"good": {"model.init_args.optimizer.init_args.lr": 0.004}, "wide": {NET: 12}, "broken": {NET: -1}}
    variants.write_text(yaml.safe_dump({"config": "configs/edm_digits.yaml", "runs": named}, sort_keys=False))
    words = [f"--variants={variants}", "--num_samples=40", "--device=cpu", "--extractor=pixels", "--hours=2"]
    words += [f"--{NET}=8", "--data.init_args.batch_size=8", "--finalists=1", "--seeds=2"]
    words += ["--model.init_args.sampling={sampler: euler, num_steps: 2}", "--out=out"]
    return ran, lambda *more: main(study.race, "configs/edm_digits.yaml", args=[*words, *more])


def test_the_better_half_goes_on_and_the_best_is_found(run, tmp_path, monkeypatch):
    """With samples that are made up: of "good" real images, of "wide" worse ones than the config's."""
    _, start = run
    real = Digits().read("train").images
    ran = []

    def made_up(place, training):
        ran.append((training.entry.name, training.seed, training.minutes))
        if training.entry.name == "broken":
            raise seeds.TrainingFailed("broken ended with status 2")
        share = {"good": 0.0, "wide": 0.6}.get(training.entry.name, 0.2)
        generator = torch.Generator().manual_seed(len(ran))
        images = real[torch.randperm(len(real), generator=generator)[:40]].float()
        noise = 255 * torch.rand(images.shape, generator=generator)
        place.mkdir(parents=True, exist_ok=True)
        images = torch.lerp(images, noise, share).byte().permute(0, 2, 3, 1).numpy()
        np.savez(place / "samples.npz", **{GUIDED: images})
        return {"images": 800, "batch_size": 8, "seconds": 1.0}

    monkeypatch.setattr(study, "train_once", made_up)
    start()
    minutes = sorted({part[2] for part in ran})
    assert minutes == pytest.approx([minutes[0], 2 * minutes[0], 4 * minutes[0]])
    rounds = [[part[:2] for part in ran if part[2] == time] for time in minutes]
    assert [name.partition(",")[0] for name, _ in rounds[0]] == [BASE, "levels of the data", "good", "wide", "broken"]
    assert {name.partition(",")[0] for name, _ in rounds[1]} == {BASE, "levels of the data", "good"}
    assert rounds[2] == [(BASE, 0), (BASE, 1), ("good", 0), ("good", 1)]
    page, record = (tmp_path / "out/index.html").read_text(), json.loads((tmp_path / "out/study.json").read_text())
    assert "broken failed and left the race" in page
    assert "What helped: good." in page and "What hurt: wide." in page and "no difference that 2 standard" in page
    assert "good is best with kd_pixels" in record["findings"][0]
    rows = {row["variant"].partition(",")[0]: row for row in record["tables"]["race"]}
    assert rows["good"]["verdict"] == "helps" and rows["wide"]["verdict"] == "hurts" and rows["wide"]["round"] == 1
    assert record["seconds"]["training"] == len(ran) - 1  # that which failed left out
    winner = yaml.safe_load((tmp_path / "out/winner.yaml").read_text())
    assert winner["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.004
    assert winner["trainer"]["max_steps"] == 100 and winner["data"]["init_args"]["batch_size"] == 8
    assert winner["model"]["init_args"]["net"]["init_args"]["model_channels"] == 8


@pytest.mark.slow
def test_a_race_is_run_and_goes_on_after_an_interruption(run, tmp_path, monkeypatch, capsys):
    ran, start = run
    once = seeds.train_once

    def interrupted(place, training):
        if training.entry.name == "wide":
            raise KeyboardInterrupt
        return once(place, training)

    monkeypatch.setattr(study, "train_once", interrupted)
    with pytest.raises(SystemExit) as ended:
        start()
    assert ended.value.code == 130
    monkeypatch.setattr(study, "train_once", once)
    start()
    parts = [(training.entry.name, training.seed, training.minutes) for _, training in ran]
    names = [name.partition(",")[0] for name, _, minutes in parts if minutes == parts[0][2]]
    assert names == [BASE, "levels of the data", "good", "wide", "broken"]  # none twice
    assert {training.track.metric for _, training in ran} == {"kd"}
    count = len(ran)
    start()  # all is there but what failed
    assert [training.entry.name for _, training in ran[count:]] == ["broken"]
    cli.main(["fit", "--config=out/winner.yaml", "--trainer.fast_dev_run=1", "--trainer.accelerator=cpu"])
    capsys.readouterr()


def test_a_config_that_cannot_be_trained_ends_the_race_at_once(run, monkeypatch, capsys):
    _, start = run
    ran = []

    def fails(place, training):
        ran.append(training.entry.name)
        raise seeds.TrainingFailed("as configured ended with status 2")

    monkeypatch.setattr(study, "train_once", fails)
    with pytest.raises(SystemExit) as ended:
        start()
    assert ended.value.code == 2 and ran == [BASE]
    assert "The config itself cannot be trained" in capsys.readouterr().err


def test_hours_that_are_over_end_the_race(run, tmp_path):
    _, start = run
    with pytest.raises(SystemExit):
        start("--hours=0")
    with pytest.raises(SystemExit):
        start("--jobs=2")
    runner = object.__new__(study.Runner)
    runner.spent, runner.hours = 10.0, 1 / 3600
    runner.study = type("Study", (), {"folder": tmp_path})()
    runner.shared, runner.config = {}, {}
    runner.track = study.Track("datamodules.Digits", 0.0)
    assert runner.round({BASE: {}}, Round(1, 1.0, 1)) is None


def test_never_two_timed_trainings_at_once(run, monkeypatch):
    training = seeds.Training(study.Entry("x", {}), study.Track("datamodules.Digits", 1.0), 0, None, 1.0)
    with seeds.alone(), pytest.raises(ValueError, match="timed training is at work"):
        seeds.train(Path("place"), training)


@pytest.mark.medium
def test_every_variant_that_ships_is_a_config_of_fit(tmp_path, capsys):
    config, _, variants = read(HALVING)
    path = Path(study.__file__).parents[1] / config
    for name, options in variants.items():
        written = tmp_path / "variant.yaml"
        written.write_text(yaml.safe_dump(merge(study.read_config(path), options)))
        with pytest.raises(SystemExit) as ended:
            cli.main(["fit", f"--config={written}", "--print_config"])
        assert not ended.value.code, (name, capsys.readouterr().err)
        capsys.readouterr()
