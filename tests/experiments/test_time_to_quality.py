"""The contest at equal time: all take part for as long, an interrupted one goes on, and the table is right."""

import json

import pytest
import torch
from helpers.in_process import run_in_process

from experiments.benchmarks import contenders, fit_training, peers, seeds
from experiments.benchmarks import time_to_quality as study
from experiments.benchmarks.contenders import OURS, BenchmarkJob
from experiments.benchmarks.trainings import GUIDED


def names(ran):
    return [training.entry.name for _, training in ran]


NAMES = [OURS, *[name for name in study.PEERS if name in contenders.installed()]]
SMALL = [f"--model.init_args.net.init_args.{option}" for option in ("model_channels=8", "num_blocks=1")]


@pytest.fixture
def contest(idx_folder, tmp_path, monkeypatch):
    """The study on small data, its processes being calls."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFUSION_LIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fit_training, "PACE_STEPS", 3)
    ran = run_in_process(monkeypatch, seeds)
    usual = dict(root=str(idx_folder), minutes=0.02, seeds=1, nfe=2, num_samples=12, batch_size=8, options=SMALL)
    return ran, lambda **changes: study.time_to_quality(**{**usual, **changes}, out=str(tmp_path / "out"))


@pytest.mark.slow
def test_all_train_for_the_time_and_an_interrupted_contest_goes_on(contest, tmp_path, capsys):
    ran, run = contest
    records = run()
    assert names(ran) == NAMES
    for record in records:
        assert record["images"] == 8 * record["steps"] >= 8 and record["distance"] > 0
    assert [one["contender"] for one in records] == [OURS, study.UNGUIDED, *NAMES[1:]]
    assert (tmp_path / "out" / "samples.png").exists()
    for name in NAMES:
        assert (tmp_path / "out" / f"{name}_0" / f"{GUIDED}.png").exists()
    assert records[0]["steps"] <= records[0]["planned"]
    (tmp_path / "out" / f"{NAMES[-1]}_0" / "record.json").unlink()
    again = run()
    assert names(ran) == [*NAMES, NAMES[-1]]
    assert [one["distance"] for one in again[:-1]] == [one["distance"] for one in records[:-1]]
    said = capsys.readouterr().out
    assert "of the best peer's distance" in said and "| real images" in said
    run(nfe=3, contenders=[OURS])  # other settings, another run
    assert names(ran)[-1] == OURS
    assert json.loads((tmp_path / f"out/{OURS}_0/record.json").read_text())["evaluations"][GUIDED] == 2


def test_the_share_is_of_the_best_peer():
    base = {"minutes": 7, "hardware": {"processor": "abacus", "threads": 2}, "num_samples": 4, "nfe": 2, "images": 10}
    found = {OURS: (2.0, 4.0), study.UNGUIDED: (5.0, 5.0), "one": (30.0, 30.0), "other": (10.0, 20.0)}
    records = [{**base, "contender": name, "distance": value} for name, values in found.items() for value in values]
    assert "at 0.20 of the best peer's" in study.table(records, None, "fd")


@pytest.mark.slow
@pytest.mark.skipif("smalldiffusion" not in NAMES, reason="of smalldiffusion")
def test_the_documented_average_draws_and_the_weights_stay(monkeypatch):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    built = []
    before = contenders.build
    monkeypatch.setattr(contenders, "build", lambda *args: built.append(before(*args)) or built[-1])
    made = peers.peer(BenchmarkJob("smalldiffusion", "32-true", 32, 1, 16, 4, 1, "cpu", 1, documented=True))
    first = built[0].conv_in.weight.detach().clone()
    for _ in range(3):
        made.step(torch.rand(4, 1, 16, 16))
    weights, seen = built[0].conv_in.weight.detach().clone(), []
    built[0].conv_in.register_forward_pre_hook(lambda layer, _: seen.append(layer.weight.detach().clone()))
    made.draw(1)
    assert torch.equal(built[0].conv_in.weight, weights)
    assert not torch.equal(seen[0], weights) and not torch.equal(seen[0], first)


def test_what_cannot_be_run_is_told(idx_folder):
    with pytest.raises(ValueError, match="no contender 'nobody'"):
        study.time_to_quality(str(idx_folder), contenders=["nobody"])
    with pytest.raises(ValueError, match="minutes is 0"):
        study.time_to_quality(str(idx_folder), minutes=0)
