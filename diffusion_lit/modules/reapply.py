"""Applies changed options of optimizer and schedule when a run is resumed.

Lightning restores the checkpoint's options of the optimizer and constants of the schedule, whatever the configuration
says. Here a changed option takes its new value and the moments stay; a schedule is replayed from step 0 if it or its
learning rate was changed. Unchanged options are not touched.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from diffusion_lit.runtime.internals import parts_of

HOW = ("fused", "foreach")  # options of the implementation, which this run and its hardware decide
RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # of the options, those of which a group has its own share
PLATEAU = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch", "_last_lr")  # state of a plateau schedule


def reapply_implementation(optimizer: Optimizer) -> None:
    """Restores the implementation (fused, foreach) that the optimizer was built with.

    Args:
        optimizer: One that has just read its state.
    """
    for group in optimizer.param_groups:
        for name in HOW:
            if name in group and name in optimizer.defaults:
                group[name] = optimizer.defaults[name]
        if group.get("fused"):
            for parameter in group["params"]:
                step = optimizer.state[parameter].get("step")
                if isinstance(step, Tensor):  # a fused kernel counts where the weights are
                    optimizer.state[parameter]["step"] = step.to(parameter.device)


def reapply(
    optimizer: Optimizer,
    scheduler: Any,
    makers: tuple[Callable[..., Any], Callable[..., Any] | None],
    changed: dict[str, tuple[Any, Any]],
    saved: dict[str, Any],
    step: int,
) -> None:
    """Applies what was changed.

    Args:
        optimizer: The optimizer, its state and options those of the checkpoint.
        scheduler: Its schedule, or None.
        makers: Make the optimizer from parameters, and the schedule from the optimizer, as this run configures them.
        changed: Value before and now of each option of the optimizer that differs, and of "schedule" where that does.
        saved: State of the schedule in the checkpoint; empty where it had none.
        step: Number of steps taken.

    Raises:
        ValueError: If the checkpoint lacks what a changed option needs.
    """
    fresh: Optimizer = makers[0]([nn.Parameter(torch.zeros(2, 2))])
    configured = _options(fresh)
    _refuse_without_state(optimizer, makers[0], changed)
    new = {name: configured[name] for name in changed if name in configured}
    played: Any = makers[1](fresh) if makers[1] is not None else None
    plateau = isinstance(played, ReduceLROnPlateau)
    if plateau and "num_bad_epochs" in saved:  # its state is kept, and the factor by which it has reduced the rate
        if "lr" in changed:
            new["lr"] = configured["lr"] * optimizer.param_groups[0]["lr"] / changed["lr"][0]
        if "schedule" in changed:
            seen = {key: saved[key] for key in PLATEAU if key in saved and saved["mode"] == played.mode}
            scheduler.load_state_dict({**played.state_dict(), **seen})
    elif "schedule" in changed or "lr" in changed:
        if played is not None and not plateau:
            _play(played, scheduler, step)
        reached = _options(fresh)
        new |= {name: reached[name] for name in reached if reached[name] != configured.get(name)}
        new["lr"] = reached["lr"]
    for group in optimizer.param_groups:
        share = group.get("lr_ratio", 1.0)
        group.update({name: value * share if name in RATES else value for name, value in new.items()})


def _options(optimizer: Optimizer) -> dict[str, Any]:
    return {name: value for name, value in optimizer.param_groups[0].items() if name not in ("params", "lr_ratio")}


def _play(played: Any, scheduler: Any, step: int) -> None:
    """Replays a schedule over the trained steps, and sets the run's own schedule to the result."""
    if getattr(played, "total_steps", 0) is None:  # taken from the trainer if the configuration leaves it open
        played.total_steps = scheduler.total_steps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # steps of a schedule without steps of its optimizer
        for _ in range(step):
            played.step()
    scheduler.load_state_dict(played.state_dict())
    shares = [group.get("lr_ratio", 1.0) for group in scheduler.optimizer.param_groups]
    for one, like in zip(parts_of(scheduler), parts_of(played), strict=True):
        for name in ("base_lrs", "_last_lr"):  # of one group, and the run may have several
            if hasattr(like, name):
                setattr(one, name, [getattr(like, name)[0] * share for share in shares])


def _refuse_without_state(optimizer: Optimizer, make: Callable[..., Any], changed: dict[str, Any]) -> None:
    """Tries a step on a dummy weight with the state of the checkpoint."""
    states = [state for state in optimizer.state.values() if state]
    if not states:
        return
    weight = nn.Parameter(torch.zeros(2, 2))
    probe: Optimizer = make([weight])
    for name, value in states[0].items():
        full = isinstance(value, Tensor) and value.dim() > 0
        probe.state[weight][name] = torch.zeros_like(weight) if full else copy.deepcopy(value)
    weight.grad = torch.ones_like(weight)
    try:
        probe.step()
    except KeyError as error:
        options = ", ".join(f"{name} = {new!r}" for name, (_, new) in changed.items() if name != "schedule")
        raise ValueError(
            f"The checkpoint's optimizer lacks {error}, which {options} needs; an option that keeps state of its own "
            "is switched on only at the start of a run."
        ) from error
