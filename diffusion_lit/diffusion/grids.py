"""Sampling grids: N noise levels falling from sigma_max to sigma_min, followed by 0.

A grid is `name(num_steps, scaling, *, sigma_min=None, sigma_max=None, **options)`, a float64 tensor of shape (N+1,);
`GRIDS` lists them all. The default range is the sampling range of the model.

- karras: sigma^(1/rho) falls linearly (arXiv 2206.00364, eq. 5).
- exponential: log sigma falls linearly; as the log-SNR is -2 log sigma here, this is log_snr too.
- uniform_t: the time of the model's own path falls linearly.
- leading, linspace, trailing: whole steps of the model's T-step schedule, spaced as DDPM's strided samplers do
  (arXiv 2305.08891, table 2).
- levels: the noise levels that are given.

Time is that of the model's schedule. A flow has sigma = t / (1 - t), with 1000 equal steps over its range of training.
A model with neither (EDM) uses DDPM's linear schedule, cut to its range.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from diffusion_lit.checks import check_count, check_number, check_numbers
from diffusion_lit.diffusion.conversions import flow_time_to_sigma
from diffusion_lit.diffusion.preconditioning import FlowPreconditioning, Preconditioning, X0Preconditioning
from diffusion_lit.diffusion.schedules import LinearSchedule, Schedule

FLOW_STEPS = 1000
ROUNDING = 1e-6  # of a step, when an end of the range is meant to be a whole one


def evenly(start: int, stop: int, count: int) -> list[int]:
    """Evenly spaced whole numbers in exact arithmetic, so that rounding of a half does not depend on the last bit.

    Args:
        start: The first number.
        stop: The last number, on either side.
        count: How many, at least 1; the start alone for 1.

    Returns:
        `count` numbers; a half goes to the even one.
    """
    return [round(start + Fraction(index * (stop - start), max(count - 1, 1))) for index in range(count)]


class Grid(Protocol):
    """The type of a grid function."""

    def __call__(
        self,
        num_steps: int,
        scaling: Preconditioning,
        *,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
    ) -> Tensor:
        """N+1 noise levels, falling to 0."""


def karras(
    num_steps: int,
    scaling: Preconditioning,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
) -> Tensor:
    """The grid of EDM: sigma^(1/rho) falls linearly.

    Args:
        num_steps: The number of steps N, at least 1.
        scaling: The model's scaling, which knows its range.
        sigma_min: The lowest level above 0; None is the model's.
        sigma_max: The highest level; None is the model's.
        rho: How densely low levels are sampled, above 0; 1 is linear in sigma.

    Returns:
        Float64 levels of shape (N+1,), falling, the last 0.

    Raises:
        ValueError: If num_steps is below 1, the range is empty or rho is not above 0.

    Source: arXiv 2206.00364, eq. 5.
    """
    check_number(above=0, rho=rho, hint=", such as 7")
    low, high = _range(num_steps, scaling, sigma_min, sigma_max)
    return _finish(_falling(high ** (1 / rho), low ** (1 / rho), num_steps) ** rho, low, high)


def exponential(
    num_steps: int, scaling: Preconditioning, *, sigma_min: float | None = None, sigma_max: float | None = None
) -> Tensor:
    """The grid on which log sigma, and with it the log-SNR, changes linearly.

    Args:
        num_steps: The number of steps N, at least 1.
        scaling: The model's scaling, which knows its range.
        sigma_min: The lowest level above 0; None is the model's.
        sigma_max: The highest level; None is the model's.

    Returns:
        Float64 levels of shape (N+1,), falling, the last 0.

    Raises:
        ValueError: If num_steps is below 1 or the range is empty.

    Source: arXiv 2206.00927 (uniform log-SNR steps).
    """
    low, high = _range(num_steps, scaling, sigma_min, sigma_max)
    return _finish(_falling(math.log(high), math.log(low), num_steps).exp(), low, high)


log_snr = exponential


def uniform_t(
    num_steps: int, scaling: Preconditioning, *, sigma_min: float | None = None, sigma_max: float | None = None
) -> Tensor:
    """The grid on which the time of the model's path, of its schedule or its flow, falls linearly.

    Args:
        num_steps: The number of steps N, at least 1.
        scaling: The model's scaling, which knows its range and its path.
        sigma_min: The lowest level above 0; None is the model's.
        sigma_max: The highest level; None is the model's.

    Returns:
        Float64 levels of shape (N+1,), falling, the last 0.

    Raises:
        ValueError: If num_steps is below 1 or the range is empty.

    Source: arXiv 2206.00364, table 1 (VP time steps); arXiv 2209.03003 (flow).
    """
    low, high = _range(num_steps, scaling, sigma_min, sigma_max)
    path, low, high = _path(scaling, low, high)
    return _finish(path.sigma(_falling(path.step(high), path.step(low), num_steps)), low, high)


def leading(
    num_steps: int,
    scaling: Preconditioning,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    steps_offset: int = 0,
    to_zero: bool = True,
) -> Tensor:
    """Every (T // N)-th of T steps, from the first one on; the highest level stays below sigma_max.

    Args:
        num_steps: The number of steps N, from 2 to T.
        scaling: The model's scaling, which knows its range and its path.
        sigma_min: The lowest level above 0; None is the model's.
        sigma_max: The highest level; None is the model's.
        steps_offset: Number of steps by which all are moved up, 0 or more.
        to_zero: Whether the last step goes to 0; otherwise it ends at sigma_min, and is left out where it begins there.

    Returns:
        Float64 levels of shape (N+1,), falling, the last 0 or sigma_min.

    Raises:
        ValueError: If num_steps is below 2 or above the steps within the range, or the range is empty.

    Source: arXiv 2010.02502, appendix D.2 (linear); arXiv 2305.08891, table 2.
    """
    check_count(num_steps=num_steps)
    if num_steps == 1:
        raise ValueError(
            "The leading grid with num_steps 1 would start at the lowest noise level; give 2 or more, or trailing."
        )
    check_count(0, steps_offset=steps_offset)
    return _strided(
        num_steps,
        scaling,
        sigma_min,
        sigma_max,
        lambda total: [step * (total // num_steps) + steps_offset for step in range(num_steps)],
        to_zero,
    )


def linspace(
    num_steps: int,
    scaling: Preconditioning,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    to_zero: bool = True,
) -> Tensor:
    """The steps nearest to N evenly spaced ones from the last of T to the first, both ends included.

    Args:
        num_steps: The number of steps N, from 1 to T.
        scaling: The model's scaling, which knows its range and its path.
        sigma_min: The lowest level above 0; None is the model's.
        sigma_max: The highest level; None is the model's.
        to_zero: Whether the last step goes to 0; otherwise it ends at sigma_min, and is left out where it begins there.

    Returns:
        Float64 levels of shape (N+1,), falling, the last 0 or sigma_min.

    Raises:
        ValueError: If num_steps is below 1 or above the steps within the range, or the range is empty.

    Source: arXiv 2102.09672, section 4; arXiv 2305.08891, table 2.
    """
    return _strided(
        num_steps,
        scaling,
        sigma_min,
        sigma_max,
        lambda total: evenly(total - 1, 0, num_steps)[::-1],
        to_zero,
    )


def trailing(
    num_steps: int,
    scaling: Preconditioning,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    to_zero: bool = True,
) -> Tensor:
    """Every (T / N)-th of T steps, from the last one down; the lowest level stays above sigma_min.

    Args:
        num_steps: The number of steps N, from 1 to T.
        scaling: The model's scaling, which knows its range and its path.
        sigma_min: The lowest level above 0; None is the model's.
        sigma_max: The highest level; None is the model's.
        to_zero: Whether the last step goes to 0; otherwise it ends at sigma_min, and is left out where it begins there.

    Returns:
        Float64 levels of shape (N+1,), falling, the last 0 or sigma_min.

    Raises:
        ValueError: If num_steps is below 1 or above the steps within the range, or the range is empty.

    Source: arXiv 2305.08891, table 2.
    """
    return _strided(
        num_steps,
        scaling,
        sigma_min,
        sigma_max,
        lambda total: [round(Fraction(step * total, num_steps)) - 1 for step in range(1, num_steps + 1)],
        to_zero,
    )


def levels(
    num_steps: int,
    scaling: Preconditioning,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    levels: Sequence[float] = (),
) -> Tensor:
    """The first N of the noise levels that are given, as the few steps of a consistency model need them.

    Args:
        num_steps: The number of steps N, from 1 to the number of levels.
        scaling: The model's scaling, which knows the levels that it is trained on.
        sigma_min: None; the levels say where the grid ends.
        sigma_max: None; the levels say where it begins.
        levels: Noise levels above 0, falling.

    Returns:
        Float64 levels of shape (N+1,), falling, the last 0.

    Raises:
        ValueError: If the levels do not fall to a positive one, lie outside those that the model is trained on, are
            fewer than num_steps, or a range is given as well.
    """
    check_count(num_steps=num_steps)
    check_levels(levels)
    if sigma_min is not None or sigma_max is not None:
        given = f"sigma_min {sigma_min}" if sigma_max is None else f"sigma_max {sigma_max}"
        raise ValueError(f"{given} was given beside levels {list(levels)}, which say the range; leave it out.")
    if num_steps > len(levels):
        raise ValueError(f"num_steps is {num_steps}, but levels {list(levels)} are {len(levels)}; give as many levels.")
    made = torch.tensor(levels[:num_steps], dtype=torch.float64)
    outside = made[~scaling.knows(made)]
    if len(outside):
        raise ValueError(
            f"levels {list(levels)} hold {outside[0].item():g}, which is outside the noise levels that the model is "
            f"trained on, {scaling.sigma_min:.6g} to {scaling.sigma_max:.6g}; give levels inside."
        )
    return _to_zero(made)


def check_levels(levels: Sequence[float]) -> None:
    """Refuses noise levels that are no grid.

    Args:
        levels: As for `levels`.

    Raises:
        ValueError: If there is none, or they are not numbers that fall to a positive one.
    """
    given = isinstance(levels, Sequence) and not isinstance(levels, str) and len(levels) > 0
    if not given:
        example = """--grid_options '{"levels": [80, 0.8]}'"""
        raise ValueError(f"levels is {levels!r}; give the noise levels, such as {example}.")
    check_numbers("levels", levels, above=0)
    for level, level_next in pairwise(levels):
        if level_next >= level:
            raise ValueError(f"levels {list(levels)} do not fall from {level} to {level_next}; give falling ones.")


GRIDS: dict[str, Callable[..., Tensor]] = {
    "karras": karras,
    "exponential": exponential,
    "uniform_t": uniform_t,
    "log_snr": log_snr,
    "leading": leading,
    "linspace": linspace,
    "trailing": trailing,
    "levels": levels,
}


class _SchedulePath:
    """The steps of a schedule as a continuous coordinate, from 0 at its lowest level to T - 1."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def step(self, sigma: float) -> float:
        return float(self.schedule.sigma_to_t(torch.tensor(sigma, dtype=torch.float64)))

    def sigma(self, step: Tensor) -> Tensor:
        return self.schedule.t_to_sigma(step)


class _FlowPath:
    """Flow time t = sigma / (1 + sigma) in steps of 1 / FLOW_STEPS of the range from low to high."""

    def __init__(self, low: float, high: float) -> None:
        self.first, self.last = _flow_time(low), _flow_time(high)

    def step(self, sigma: float) -> float:
        return (_flow_time(sigma) - self.first) / (self.last - self.first) * (FLOW_STEPS - 1)

    def sigma(self, step: Tensor) -> Tensor:
        return flow_time_to_sigma(self.first + (self.last - self.first) * step / (FLOW_STEPS - 1))


def _flow_time(sigma: float) -> float:
    return sigma / (1 + sigma)


def _path(scaling: Preconditioning, low: float, high: float) -> tuple[_SchedulePath | _FlowPath, float, float]:
    """The model's path, and the part of [low, high] that it covers."""
    if scaling.schedule is not None:
        return _SchedulePath(scaling.schedule), low, high
    if isinstance(scaling, FlowPreconditioning | X0Preconditioning):
        return _FlowPath(*scaling.sampling_range), low, high
    schedule = LinearSchedule(1000)
    return _SchedulePath(schedule), max(low, schedule.sigma_min), min(high, schedule.sigma_max)


def _strided(
    num_steps: int,
    scaling: Preconditioning,
    sigma_min: float | None,
    sigma_max: float | None,
    spacing: Callable[[int], list[int]],
    to_zero: bool,
) -> Tensor:
    """Whole steps of the path within the range: `spacing(total)` picks N rising ones of 0 to total - 1."""
    low, high = _range(num_steps, scaling, sigma_min, sigma_max)
    path, low, high = _path(scaling, low, high)
    first, last = math.ceil(path.step(low) - ROUNDING), math.floor(path.step(high) + ROUNDING)
    total = last - first + 1
    if num_steps > total:
        raise ValueError(
            f"num_steps is {num_steps}, but the schedule has {total} steps between {low} and {high}; give fewer."
        )
    steps = [first + step for step in spacing(total)]
    if steps[-1] > last:
        raise ValueError(
            f"The grid's first step would be {steps[-1]}, beyond the last of the schedule, {last}; give a smaller "
            "steps_offset or another num_steps."
        )
    if not to_zero and steps[0] > first:
        steps = [first, *steps]
    levels = path.sigma(torch.tensor(steps[::-1], dtype=torch.float64)).clamp(low, high)
    return _to_zero(levels) if to_zero else levels


def _range(
    num_steps: int, scaling: Preconditioning, sigma_min: float | None, sigma_max: float | None
) -> tuple[float, float]:
    """The checked range of a grid."""
    check_count(num_steps=num_steps)
    low = scaling.sampling_range[0] if sigma_min is None else sigma_min
    high = scaling.sampling_range[1] if sigma_max is None else sigma_max
    if not 0 < low < high < math.inf:
        raise ValueError(f"The grid's range is sigma_min {low} to sigma_max {high}; give 0 < sigma_min < sigma_max.")
    return float(low), float(high)


def _falling(start: float, stop: float, num_steps: int) -> Tensor:
    """N evenly spaced float64 values from start to stop; the start alone where N is 1."""
    return torch.linspace(start, stop, num_steps, dtype=torch.float64)


def _finish(levels: Tensor, low: float, high: float) -> Tensor:
    """Keeps rounding inside the range and appends the 0."""
    return _to_zero(levels.clamp(low, high))


def _to_zero(levels: Tensor) -> Tensor:
    return torch.cat([levels, levels.new_zeros(1)])
