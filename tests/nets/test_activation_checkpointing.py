"""Activation checkpointing: the same gradients, in at most half the memory."""

import pytest
import torch
from helpers.runs import FIT, LAST, read, same_training
from torch.profiler import ProfilerActivity, profile

from diffusion_lit.nets import DiT, UNet

SIZES = {
    "unet": dict(model_channels=16, channel_mult=(1, 2), attention_resolutions=(8,), image_size=16, dropout=0.1),
    "dit": dict(hidden_channels=32, depth=6, num_heads=2, image_size=16),
}


def network(name, **options):
    torch.manual_seed(0)
    net = {"unet": UNet, "dit": DiT}[name](num_classes=3, **SIZES[name], **options)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return net


def backward(net, dtype=torch.float32):
    torch.manual_seed(1)  # of x, and of dropout
    x = torch.randn(16, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = net(x, torch.linspace(0, 900, 16), torch.arange(16) % 4).float().square().mean()
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in net.parameters())]


def peak(net):
    """Bytes of all tensors together at the moment when they are most."""
    backward(net)  # the gradients are there from now on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        backward(net)
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_the_gradients_are_the_same(name, dtype):
    plain, checkpointed = (backward(network(name, activation_checkpointing=on), dtype) for on in (False, True))
    assert all(torch.equal(one, other) for one, other in zip(plain, checkpointed, strict=True))


@pytest.mark.parametrize("name", SIZES)
def test_it_takes_at_most_half_the_memory(name):
    plain, checkpointed = (peak(network(name, activation_checkpointing=on)) for on in (False, True))
    assert checkpointed < plain / 2, (checkpointed, plain)


@pytest.mark.medium
def test_a_run_goes_on_with_it_where_it_was_started_without(lightning):
    option = "--model.init_args.net.init_args.activation_checkpointing=true"
    lightning(*FIT, "--trainer.max_steps=2")
    whole = read(LAST)
    lightning(*FIT, "--trainer.max_steps=1", "--name=half")
    lightning(*FIT, "--trainer.max_steps=2", "--name=half", "--ckpt_path=last", option)
    assert same_training(whole, read("runs/half/version_0/checkpoints/last.ckpt"))
