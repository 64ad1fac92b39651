"""Cost of a run: parameters, operations and memory before it starts, and after some steps the remaining time."""

import copy
import inspect
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusion_lit.callbacks.ema import EMA
from diffusion_lit.nets.layers import no_autocast
from diffusion_lit.report.facts import count_parameters, duration, magnitude
from diffusion_lit.runtime.hardware import cpu_contention
from diffusion_lit.runtime.internals import bare, data_of
from diffusion_lit.runtime.ranks import images_of

WARM_UP, MEASURED = 5, 20  # steps left out of the measured time, and after which it is reported


@dataclass(frozen=True)
class NetworkCost:
    """What one image costs a network.

    Args:
        parameters: Number of parameters.
        forward: Floating-point operations of a forward, a multiplication and an addition being two.
        training: The same of a forward and a backward.
        activations: Bytes per image that the backward pass keeps.
        fixed: Bytes that it keeps whatever the batch, such as weights in bf16.
    """

    parameters: int
    forward: int
    training: int
    activations: int
    fixed: int


def network_cost(
    net: nn.Module, shape: tuple[int, ...], context: AbstractContextManager[Any] | None = None
) -> NetworkCost:
    """Counts FLOPs with torch's FlopCounterMode and the memory that autograd saves, on a copy of the network.

    Args:
        net: Called as `net(x, noise)`, or as `net(x)` where it takes one input.
        shape: Shape (C, H, W) of its input.
        context: The autocast that it trains under.
    """
    probe = copy.deepcopy(net).train()
    parameter = next(probe.parameters())
    kept = [0, 0]
    with context or nullcontext():
        for index, batch in enumerate((1, 2)):
            x = torch.zeros(batch, *shape, device=parameter.device, dtype=parameter.dtype)
            storages: dict[int, int] = {one.untyped_storage().data_ptr(): 0 for one in probe.parameters()}

            def keep(value: Tensor, storages: dict[int, int] = storages) -> Tensor:
                storage = value.untyped_storage()
                storages.setdefault(storage.data_ptr(), storage.nbytes())
                return value

            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
                made = _call(probe, x)
            kept[index] = sum(storages.values())
            del made
        forward, training = FlopCounterMode(display=False), FlopCounterMode(display=False)
        with sdpa_kernel(SDPBackend.MATH), training, torch.enable_grad():  # it knows no fused attention of a CPU
            with forward:
                made = _call(probe, x[:1])
            with no_autocast(x.device):
                torch.autograd.backward(made.sum())
    activations = kept[1] - kept[0]
    return NetworkCost(
        count_parameters(net),
        forward.get_total_flops(),
        training.get_total_flops(),
        activations,
        max(0, kept[0] - activations),
    )


def _call(net: nn.Module, x: Tensor) -> Tensor:
    needed = [one for one in inspect.signature(net.forward).parameters.values() if one.default is one.empty]
    made: Tensor = net(x, torch.full((len(x),), 0.5, device=x.device)) if len(needed) > 1 else net(x)
    return made.float()


def state_bytes(module: nn.Module, optimizers: list[Any], averages: int) -> int:
    """Bytes of weights, gradients, the optimizer's state and averages.

    Args:
        module: What is trained.
        optimizers: Its optimizers, of which Adam's kind keep two numbers per weight and momentum keeps one.
        averages: Number of averages of the weights.
    """
    trained = sum(one.numel() * one.element_size() for one in module.parameters() if one.requires_grad)
    frozen = sum(one.numel() * one.element_size() for one in module.parameters()) - trained
    defaults = [bare(one).defaults for one in optimizers]
    moments = max((2 if "betas" in one else int(bool(one.get("momentum"))) for one in defaults), default=0)
    return frozen + trained * (2 + moments + averages)


class Cost(Callback):
    """Prints what a step costs when training starts, and after 20 steps how long the run will take."""

    def __init__(self) -> None:
        self._steps = 0
        self._since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints parameters, operations and memory, on rank 0."""
        self._steps = 0
        net = getattr(pl_module, "net", None)
        brief = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if not trainer.is_global_zero or brief or not isinstance(net, nn.Module):
            return
        name = f"{type(net).__name__} of {magnitude(count_parameters(net))} parameters"
        data = data_of(trainer)  # a classifier does not know the shape of its images
        places = ((pl_module, "x_shape"), (pl_module, "image_shape"), (data, "image_shape"))
        known = [getattr(place, attribute, None) for place, attribute in places]
        shape: Any = next((one for one in known if one is not None), None)
        try:
            cost = network_cost(net, shape, trainer.precision_plugin.train_step_context())
        except (TypeError, ValueError, RuntimeError) as error:  # a user's network with another signature
            print(f"{name}, whose operations could not be counted: {error}")
            return
        batch = getattr(data, "batch_size", 1) // trainer.world_size
        state = state_bytes(pl_module, trainer.optimizers, _averages(trainer))
        activations = cost.fixed + batch * cost.activations
        print(
            f"{name}: {cost.forward / 1e9:.3g} GFLOP per image forward, {cost.training / 1e9:.3g} in a training "
            "step.\n"
            f"Memory, about {_mib(state + activations)}: {_mib(state)} of weights, gradients, optimizer and average, "
            f"{_mib(activations)} of activations for a batch of {batch}."
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Prints the pace and the time to the end."""
        self._steps += 1
        if self._steps == WARM_UP:
            self._since = time.perf_counter()
        if self._steps != MEASURED or not trainer.is_global_zero:
            return
        seconds = (time.perf_counter() - self._since) / (MEASURED - WARM_UP)
        if pl_module.device.type == "cpu" and (hint := cpu_contention()):
            print(hint)
        images = images_of(batch, trainer)
        pace = f"{images / seconds:,.3g} images/s"
        batches = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
        if batches == float("inf"):
            print(f"{pace}; the run has no end of its own.")
            return
        to_go = max(0, round(batches) - trainer.global_step * trainer.accumulate_grad_batches)
        print(
            f"{pace}: {duration(to_go * seconds)} to the end, {magnitude(to_go * images)} images; validation, "
            "samples and metrics on top."
        )


def _averages(trainer: Trainer) -> int:
    """How many averages of the weights the callbacks keep."""
    kept = [one for one in trainer.callbacks if isinstance(one, WeightAveraging)]  # type: ignore[attr-defined]
    return sum(max(1, len(one.sigma_rel)) if isinstance(one, EMA) else 1 for one in kept)


def _mib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
