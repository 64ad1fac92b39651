"""The comparison with peers: every contender trains and draws, widths and operations are right, ratios are by round."""

import sys

import pytest
import torch
from torch import nn

from experiments.benchmarks import contenders, peers, processes, throughput
from experiments.benchmarks.contenders import OURS, BenchmarkJob, Cost
from experiments.benchmarks.stopwatch import Slice

PEERS = contenders.installed()[1:]


def job(name, precision="32-true"):
    return BenchmarkJob(name, precision, contenders.MULTIPLES[name], 3, 16, 4, 2, "cpu", 1)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_trains_and_draws(name, precision):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # one process holds but one precision
    torch.manual_seed(0)
    built = []
    before = contenders.build
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contenders, "build", lambda *args: built.append(before(*args)) or built[-1])
        made = peers.peer(job(name, precision))
    types = set()
    for layer in built[0].modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, __, out: types.add(out.dtype))
    weights = [one.detach().clone() for one in built[0].parameters()]
    for _ in range(3):  # smalldiffusion's first turn is half a step
        made.step(torch.rand(4, 3, 16, 16) * 2 - 1)
    assert any(not torch.equal(one, old) for one, old in zip(built[0].parameters(), weights, strict=True))
    assert types == {torch.bfloat16 if precision == "bf16-mixed" else torch.float32}
    samples = made.draw(2)
    assert samples.shape == (2, 3, 16, 16) and samples.isfinite().all()


def test_operations_are_those_of_the_layers():
    """Of convolutions and linear layers by their shapes, and of the products of attention."""
    width, size = 8, 16
    net = contenders.build(OURS, width, 3, size)
    operations = []

    def count(layer, inputs, out):
        if isinstance(layer, nn.Conv2d):
            operations.append(2 * layer.weight.numel() * out.shape[2] * out.shape[3])
        elif isinstance(layer, nn.Linear):
            operations.append(2 * layer.weight.numel())
        elif type(layer).__name__ == "Attention":
            channels, positions = out.shape[1], out.shape[2] * out.shape[3]
            operations.append(4 * channels * positions**2)

    for layer in net.modules():
        layer.register_forward_hook(count)
    net(torch.zeros(1, 3, size, size), torch.zeros(1))
    found = contenders.cost(OURS, width, 3, size)
    assert found.forward == sum(operations)
    assert 2.5 < found.training / found.forward < 3.01  # the input needs no gradient
    assert found.parameters == sum(one.numel() for one in net.parameters())


@pytest.mark.slow
def test_the_width_is_chosen_by_operations():
    found = contenders.nearest(OURS, 0.2, 3, 16)
    assert found.width % contenders.MULTIPLES[OURS] == 0
    for other in (found.width - 4, found.width + 4):
        assert abs(contenders.cost(OURS, other, 3, 16).training - 0.2e9) > abs(found.training - 0.2e9)


@pytest.mark.slow
def test_ours_is_the_command_with_its_callbacks(tmp_path, monkeypatch):
    """`diffusion-lit fit` in this process, asked for two slices and samples through a pipe that answers from a list."""

    class Done(Exception):
        pass

    asked, got = [("train", 2), ("memory", 0), ("sample", 3), ("train", 1)], []

    class Pipe:
        def recv(self):
            if not asked:
                raise Done
            return asked.pop(0)

        def send(self, answer):
            got.append(answer)

    monkeypatch.chdir(tmp_path)
    with pytest.raises(Done):
        processes._fit(Pipe(), job(OURS), str(tmp_path))
    first, memory, drawn, last = got
    assert (first.images, drawn.images, last.images) == (8, 3, 4)
    assert min(one.seconds for one in (first, drawn, last)) > 0 and memory > 2**20
    assert list(tmp_path.glob("throughput/version_0/events*"))


class Fake:
    """A contender that takes its times from a list: this project half the others', at the round's own load."""

    def __init__(self, job):
        self.job, self.turn, self.stopped = job, {"train": 0, "sample": 0}, False

    def ask(self, what, count=0):
        if what == "memory":
            return 100 * 2**20 + sum(self.turn.values()) * 2**20
        self.turn[what] += 1
        seconds = {1: 100.0, 2: 1.0, 3: 3.0, 4: 2.0}[self.turn[what]] * (1 if self.job.name == OURS else 2)
        return Slice(seconds, seconds / 2, 10 * count, count)

    def stop(self):
        self.stopped = True


def test_ratios_are_taken_round_by_round_and_the_first_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "Contender", Fake)
    monkeypatch.setattr(throughput, "WORKS", {"matrix product": lambda *_: 2e9, "convolution": lambda *_: 1e9})
    monkeypatch.setattr(throughput, "installed", lambda: [OURS, "other"])
    monkeypatch.setattr(
        throughput, "nearest", lambda name, *_: Cost(8, 1000, 10**8, 3 * 10**8 if name == OURS else 6 * 10**8)
    )
    report = throughput.throughput(rounds=3, steps=2, samples=4, precisions=["32-true"], out=str(tmp_path))
    ours, other = report["contenders"]
    assert ours["train"]["ratio"] == {"median": 1, "min": 1, "max": 1}
    # half as many images a second, each of twice the operations: as fast at equal operations
    assert other["train"]["ratio"] == pytest.approx({"median": 1, "min": 1, "max": 1})
    assert ours["train"]["images_per_second"] == pytest.approx({"median": 1, "min": 2 / 3, "max": 2})
    assert (tmp_path / "throughput.json").exists()
    assert "30%" in (tmp_path / "throughput.md").read_text()  # 1 image/s of 0.3 GFLOP over 1 GFLOP/s
    assert other["memory"]["peak"] > other["memory"]["at_rest"]


def test_peaks_are_operations_over_time():
    assert throughput._rate(lambda: torch.zeros(1), 10**6, "cpu", repeats=2) > 0
    assert 1e8 < throughput.convolution("cpu", torch.float32) < 1e15


def test_what_is_not_there_is_told(monkeypatch):
    with pytest.raises(ValueError, match="no peer 'nobody'"):
        throughput.throughput(peers=["nobody"])
    with pytest.raises(ValueError, match="rounds is 0"):
        throughput.throughput(rounds=0)
    monkeypatch.setattr(contenders, "find_spec", lambda name: None if name == "diffusers" else sys)
    assert "diffusers" not in contenders.installed()
