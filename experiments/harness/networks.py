"""What a network costs: parameters, floating-point operations, time and memory of a training step."""

import time
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_lit.callbacks.cost import NetworkCost, network_cost
from experiments.harness.study import Study


def build(study: Study, **changes: Any) -> nn.Module:
    """The network that a study's trainings would have, untrained.

    Returns:
        The network, for the data's channels, size and classes.
    """
    data = data_of(study)
    shape = data.image_shape
    told = {"in_channels": shape[0], "image_size": shape[-1], "num_classes": data.num_classes}
    return _instance(study.value("model.init_args.net"), **told, **changes)  # type: ignore[no-any-return]


def data_of(study: Study) -> Any:
    """The data set that a study's trainings would have, not prepared."""
    return _instance(study.value("data"))


def _instance(described: dict[str, Any], **changes: Any) -> Any:
    """An object of a class that a config describes."""
    return resolve_name(described["class_path"])(**{**described.get("init_args", {}), **changes})


def _batch(net: Any, count: int, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor | None]:
    """An input of a network."""
    x = torch.zeros(count, net.in_channels, net.image_size, net.image_size, device=device)
    label = torch.zeros(count, dtype=torch.int64, device=device) if net.num_classes else None
    return x, torch.zeros(count, device=device), label


def cost(net: Any) -> NetworkCost:
    """What an image costs a network of `diffusion_lit.nets`; see `network_cost`."""
    return network_cost(net, (net.in_channels, net.image_size, net.image_size))


def step_cost(net: nn.Module, batch_size: int, seconds: float = 2.0) -> dict[str, float]:
    """Time and memory of the forward and backward pass of a batch.

    Args:
        net: A network of `diffusion_lit.nets`, on the device that counts.
        batch_size: Images of a batch.
        seconds: How long to measure; the fastest step counts.

    Returns:
        `ms per step`, and `activations MB`: what the forward pass keeps for the backward pass, weights left out.
    """
    counted = cost(net)
    inputs = _batch(net, batch_size, next(net.parameters()).device)
    best, end = float("inf"), time.perf_counter() + seconds
    net(*inputs).square().mean().backward()
    while best == float("inf") or time.perf_counter() < end:
        _wait(inputs[0].device)
        started = time.perf_counter()
        net(*inputs).square().mean().backward()
        _wait(inputs[0].device)
        best = min(best, time.perf_counter() - started)
    net.zero_grad(set_to_none=True)
    return {"ms per step": 1000 * best, "activations MB": (counted.fixed + batch_size * counted.activations) / 1e6}


def _wait(device: torch.device) -> None:
    """Waits until a device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
