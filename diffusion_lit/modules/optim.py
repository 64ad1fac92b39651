"""The configured optimizer and learning-rate schedule, and the schedule WSD (warm-up, stable, decay)."""

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from diffusion_lit.checks import check_count, check_share
from diffusion_lit.modules.muon import MuonAdamW, muon_groups
from diffusion_lit.nets.magnitude import MPConv, force_norms
from diffusion_lit.runtime.internals import trainer_of


class WarmupStableDecay(LambdaLR):
    """Linear warm-up, a constant learning rate, and a linear decay to 0 over the last part of the run (WSD).

    Args:
        optimizer: The optimizer whose learning rate it steers.
        warmup_steps: Steps over which the learning rate rises from 0 to the optimizer's own.
        decay_fraction: Share of the run, in [0, 1], over which it falls to 0 at the end.
        total_steps: Length of the run in optimizer steps; the trainer's own length when omitted.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup_steps: int = 0,
        decay_fraction: float = 0.0,
        total_steps: int | None = None,
    ) -> None:
        check_count(0, warmup_steps=warmup_steps)
        check_count(total_steps=total_steps)
        check_share(decay_fraction=decay_fraction)
        self.warmup_steps = warmup_steps
        self.decay_fraction = decay_fraction
        self.total_steps = total_steps
        super().__init__(optimizer, self.factor)

    def factor(self, step: int) -> float:
        """The learning rate at a step as a multiple of the optimizer's own.

        Args:
            step: Number of steps taken.

        Returns:
            A factor in [0, 1].
        """
        rise = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.total_steps is None or self.decay_fraction == 0:
            return rise
        fall = (self.total_steps - step) / (self.decay_fraction * self.total_steps)
        return rise * max(0.0, min(1.0, fall))

    def state_dict(self) -> dict[str, Any]:
        """The counters and the total number of steps; the rest comes from the config."""
        counters = {"last_epoch": self.last_epoch, "_step_count": self._step_count, "_last_lr": self._last_lr}
        return {**counters, "total_steps": self.total_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the counters."""
        self.__dict__.update({name: value for name, value in state_dict.items() if name != "total_steps"})


Trapezoid = WarmupStableDecay  # its name in version 0.1.0, which checkpoints and configs give


def configure_optimizers(
    module: LightningModule, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None
) -> Any:
    """What a LightningModule's `configure_optimizers` returns.

    Args:
        module: The module; its trainable parameters are optimised.
        optimizer: Makes the optimizer from parameters.
        lr_scheduler: Makes the schedule from the optimizer; stepped each training step, `ReduceLROnPlateau` after each
            validation by `val/loss`.

    Returns:
        Lightning's optimizer configuration.

    Raises:
        ValueError: If one is a base class, which makes no step.
    """
    built = _fused(optimizer, module)
    if isinstance(built, MuonAdamW):
        built = optimizer(muon_groups(module, _groups(module)))
    if type(built).step is Optimizer.step:
        raise ValueError(
            f"optimizer is {type(built).__name__}, the base of torch's optimizers, which makes no step; give one such "
            "as torch.optim.AdamW."
        )
    for group in built.param_groups:
        group["lr"] *= group.get("lr_ratio", 1.0)
    built.register_load_state_dict_post_hook(lay_as_weights)
    if any(isinstance(layer, MPConv) for layer in module.modules()):
        built.register_step_post_hook(lambda *_: force_norms(module))
    if lr_scheduler is None:
        return built
    try:
        scheduler = lr_scheduler(built)
    except NotImplementedError as error:
        raise ValueError(
            "lr_scheduler is a base of torch's schedules, which gives no learning rate; give one such as "
            "torch.optim.lr_scheduler.CosineAnnealingLR."
        ) from error
    if isinstance(scheduler, WarmupStableDecay) and scheduler.total_steps is None:
        steps = module.trainer.estimated_stepping_batches
        scheduler.total_steps = int(steps) if steps != float("inf") else None
        if scheduler.total_steps is None and scheduler.decay_fraction:
            raise ValueError(
                "The learning rate is to decay at the end of the run, but the run has no end: set trainer.max_steps or "
                "trainer.max_epochs, or the schedule's total_steps."
            )
    if isinstance(scheduler, ReduceLROnPlateau):
        never = {"interval": "step", "frequency": sys.maxsize}  # by Lightning; by `step_plateau` after each validation
        return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss", **never}}
    return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def lay_as_weights(optimizer: Optimizer) -> None:
    """Gives the state of an optimizer the memory layout of its weights.

    A checkpoint may come from a run with another memory format (NCHW on a CPU in bf16, NHWC on a GPU), and a fused
    optimizer indexes weights and state by address: it would silently mix up the moments.

    Args:
        optimizer: One that has just read its state.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            laid = isinstance(value, Tensor) and value.shape == parameter.shape
            if laid and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter.detach(), dtype=value.dtype).copy_(value)


def check_plateau(module: LightningModule) -> None:
    """Refuses a `ReduceLROnPlateau` if no images are held out.

    Args:
        module: The module, its training about to start.

    Raises:
        ValueError: If so.
    """
    waits = any(isinstance(config.scheduler, ReduceLROnPlateau) for config in module.trainer.lr_scheduler_configs)
    batches = module.trainer.num_val_batches
    if waits and not sum(batches if isinstance(batches, list) else [batches]):
        raise ValueError(
            "ReduceLROnPlateau waits for val/loss, but this run measures none, since no images are held out: hold some "
            "out (the data's val_fraction, trainer.limit_val_batches), or take another lr_scheduler."
        )


def step_plateau(module: LightningModule) -> None:
    """Steps a `ReduceLROnPlateau` with the loss of the validation that just ended.

    Lightning steps it at the ends of epochs or after a number of batches, when the validation loss is missing or old.

    Args:
        module: The module, in training.
    """
    if module.trainer.state.fn != "fit" or module.trainer.sanity_checking:
        return
    for config in module.trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, ReduceLROnPlateau):
            config.scheduler.step(float(module.trainer.callback_metrics["val/loss"]))


def _groups(module: Any) -> list[Any]:
    """The parameters to optimise: a list of them, or of groups where a module has several."""
    groups = module.parameter_groups
    if len(groups) == 1:
        return list(groups[0][0])
    return [{"params": parameters, "lr_ratio": ratio} for parameters, ratio in groups]


def _fused(optimizer: OptimizerCallable, module: Any) -> Optimizer:
    """The optimizer, fused if it can be and the user did not choose.

    Fused AdamW took 5 ms instead of 14 of a step of 306 ms (1.7M parameters, 2 cores of a Xeon), and it skips a step
    that is not finite, so that `NonFiniteGuard` keeps no copies. Lightning refuses it with gradient clipping under its
    own mixed precision.
    """
    built = optimizer(_groups(module))
    trainer = trainer_of(module)
    clips = trainer is not None and bool(trainer.gradient_clip_val)
    if clips or module.device.type not in ("cpu", "cuda") or built.defaults.get("fused", False) is not None:
        return built
    if built.defaults.get("foreach") is not None:
        return built
    make: Callable[..., Optimizer] = optimizer
    with suppress(TypeError):  # a callable that takes the parameters alone
        return make(_groups(module), fused=True)
    return built
