"""Where a step's time goes: what is slowed down shows, and the bare loop is the same step."""

import logging
import time
from pathlib import Path

import pytest
import torch
from helpers.runs import DIGITS, FIT

from diffusion_lit.callbacks import EMA
from diffusion_lit.modules import EDM
from experiments.benchmarks import turns
from experiments.benchmarks.profile_step import profile_step, shares, text
from experiments.benchmarks.turns import Recorder

OPTIONS = [word for word in FIT if word.startswith("--") and "callbacks" not in word and "steps" not in word]
OPTIONS = [word for word in OPTIONS if not word.startswith(("--config", "--name"))]
SMALL = dict(rounds=2, steps=2, repeats=1, samples=2, sampling_steps=1, channels=8)


def measured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    report = profile_step([str(DIGITS)], OPTIONS, out=str(tmp_path / "out"), **SMALL)
    return report, capsys.readouterr().out


@pytest.mark.slow
def test_a_part_that_is_slowed_down_shows_in_its_row(tmp_path, monkeypatch, capsys):
    average, step = EMA.on_train_batch_end, EDM.training_step
    monkeypatch.setattr(EMA, "on_train_batch_end", lambda *args: (time.sleep(0.2), average(*args))[1])
    monkeypatch.setattr(EDM, "training_step", lambda *args: (time.sleep(0.4), step(*args))[1])
    report, said = measured(tmp_path, monkeypatch, capsys)
    found = report["shares"]
    assert sum(found.values()) == pytest.approx(1)
    assert found["forward"] > found["EMA"] > max(found[name] for name in found if name not in ("forward", "EMA"))
    assert found["forward"] > 0.4 and found["EMA"] > 0.2
    assert found["data"] < 0.2 and found["backward"] > 0
    assert report["milliseconds"] > 600
    assert "| EMA |" in said and "Guidance:" in said and (tmp_path / "out/profile_step.json").exists()
    assert not list(Path(tmp_path).glob("runs*"))


@pytest.mark.slow
def test_the_bare_loop_is_the_same_step(tmp_path, monkeypatch, capsys):
    """It calls the network as often, on batches of the same shape, in the same precision."""
    seen = []
    before = EDM.draw
    monkeypatch.setattr(EDM, "draw", lambda *args: seen.append((args[2], args[3])) or before(*args))
    report, _ = measured(tmp_path, monkeypatch, capsys)
    bare = [shape for shape, key in seen if key == "bare"]
    ours = [shape for shape, key in seen if key == "train"]
    assert set(bare) == set(ours) == {torch.Size((16, 1, 8, 8))}
    assert len(bare) == turns.WARM_UP + 4 and len(ours) == turns.WARM_UP + 4
    low, high = report["over_bare"]["quartiles"]
    assert low <= report["over_bare"]["median"] <= high


def test_actions_within_actions_are_taken_off():
    recorder = Recorder()
    recorder.running = True
    recorder.start("[Callback]EMA.on_train_batch_end")
    recorder.start("logging")
    time.sleep(0.02)
    recorder.stop("logging")
    recorder.stop("[Callback]EMA.on_train_batch_end")
    assert recorder.seconds["logging"] > 0.02 > 0.01 > recorder.seconds["[Callback]EMA.on_train_batch_end"]
    assert shares({"logging": 1.0, "[Strategy]X.backward": 2.0}, 4.0)["Lightning itself"] == 0.25


def test_a_missed_target_is_told():
    report = {
        "milliseconds": 1.0,
        "hardware": {"processor": "abacus", "threads": 1},
        "shares": {"data": 0.5},
        "over_bare": {"median": 0.03, "quartiles": [0.01, 0.05]},
        "samplers": {"heun": 0.001},
        "guidance": 2.0,
        "parameters": 5e6,
    }
    said = text(report)
    assert said.count("missed") == 2 and said.count(", met") == 2


def test_lightnings_own_profiler_works(lightning, caplog):
    logger = logging.getLogger("lightning.pytorch")
    logger.addHandler(caplog.handler)
    try:
        lightning(*FIT, "--trainer.max_steps=2", "--trainer.profiler=simple")
    finally:
        logger.removeHandler(caplog.handler)
    assert "Profiler Report" in caplog.text and "optimizer_step" in caplog.text
