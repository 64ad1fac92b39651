"""What a run says of its cost before it starts and after some steps, against an independent count."""

import os
import re

import pytest
import torch
from helpers.runs import FIT
from torch import nn
from torch.profiler import ProfilerActivity, profile

from diffusion_lit.callbacks.cost import network_cost, state_bytes
from diffusion_lit.nets import DiT, UNet

SMALL = dict(model_channels=16, channel_mult=(1, 2), image_size=16, attention_resolutions=(8,))


class Plain(nn.Module):
    """Two layers whose cost is plain: of 2 x 3 x 8 x 9 x 64 and 2 x 8 x 8 x 64 operations on 8x8 images."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_operations_memory_and_parameters_of_two_layers():
    cost = network_cost(Plain(), (3, 8, 8))
    first, second = 2 * 3 * 8 * 9 * 64, 2 * 8 * 8 * 64
    assert cost.parameters == 3 * 8 * 9 + 8 + 8 * 8 + 8
    assert cost.forward == first + second
    assert cost.training == 2 * first + 3 * second  # the first layer's input needs no gradient
    assert cost.activations == 4 * 64 * (3 + 8)  # the input, and what relu gives to the second layer
    assert cost.fixed == 0


@pytest.mark.parametrize("net", [UNet(**SMALL), DiT(image_size=16, hidden_channels=32, depth=2, num_heads=2)])
def test_the_network_is_left_as_it_was(net):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    network_cost(net, (3, 16, 16), torch.autocast("cpu", torch.bfloat16))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_the_estimate_of_memory_is_near_what_a_step_takes():
    torch.manual_seed(0)
    net, batch = UNet(**SMALL), 32
    optimizer = torch.optim.AdamW(net.parameters())
    x, t = torch.randn(batch, 3, 16, 16), torch.zeros(batch)

    def step():
        net(x, t).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the optimizer's state is there from now on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    held = most = 0
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    weights = sum(4 * parameter.numel() for parameter in net.parameters())
    cost = network_cost(net, (3, 16, 16))
    estimate = state_bytes(net, [optimizer], averages=0) + cost.fixed + batch * cost.activations
    assert state_bytes(net, [optimizer], averages=1) == 5 * weights
    taken = 3 * weights + most  # weights and two moments lay there before; gradients and activations came
    assert 0.75 < estimate / taken < 1.25, (estimate, taken)


@pytest.mark.medium
def test_a_run_says_what_it_costs_and_how_long_it_will_take(lightning, capsys):
    lightning(*FIT, "--trainer.max_steps=25")
    said = capsys.readouterr().out
    assert re.search(r"UNet of [\d.]+ thousand parameters: [\d.]+ GFLOP per image forward, [\d.]+ in a training", said)
    assert re.search(r"Memory, about \d+ MiB: .* for a batch of 16\.", said)
    assert re.search(r"images/s: \d+ s to the end, 80 images", said)  # 5 steps of 16
    assert re.search(r"tensorboard --logdir runs/\w+$", said, re.MULTILINE)
    lightning(*FIT, "--trainer.fast_dev_run=true")
    assert "GFLOP" not in capsys.readouterr().out


def test_a_network_that_is_called_otherwise_does_not_stop_the_run(lightning, capsys, monkeypatch):
    def refuse(*args):
        raise TypeError("it takes three arguments")

    monkeypatch.setattr("diffusion_lit.callbacks.cost.network_cost", refuse)
    lightning(*FIT, "--trainer.max_steps=1")
    assert "could not be counted: it takes three arguments" in capsys.readouterr().out


@pytest.mark.medium
def test_a_run_on_cores_that_others_use_says_what_helps(lightning, capsys, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for load, told in ((4.2, False), (5.0, True)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        lightning(*FIT, "--trainer.max_steps=21")
        assert ("load 5.0 on 4 cores" in (said := capsys.readouterr().out)) == told
        assert ("OMP_NUM_THREADS=3" in said) == told
