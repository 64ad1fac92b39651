"""Shared by samplers: types of arguments, checks of a grid, the split of a step into drift and noise.

A sampler moves x from `sigmas[0]` to `sigmas[-1]` in the coordinates x = x0 + sigma * n. Its state is carried in x's
dtype, or in float32 where x has less precision, and its coefficients are Python floats, that is float64, so that a step
costs no transfer to the device. The network is never called at sigma 0.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffusion_lit.checks import check_number

Denoise = Callable[[Tensor, Tensor], Tensor]
"""Any `denoise(x, sigma) -> x0_hat`; sigma comes as a 0-d tensor or as one value per sample, shape (B,)."""

Noise = Callable[[Tensor], Tensor]
"""Any `noise(x)` that draws standard normal noise of x's shape."""

Callback = Callable[[int, Tensor, Tensor, Tensor], object]
"""Any `callback(step, x, x0_hat, sigma)`; it sees the state x of noise level sigma and the estimate made from it."""


def begin(x: Tensor, sigmas: Tensor, *, stochastic: bool) -> tuple[Tensor, list[float]]:
    """Checks a grid and prepares the state of a sampler.

    Args:
        x: The state at `sigmas[0]`, shape (B, ...).
        sigmas: The grid, shape (N+1,), falling to 0 or to a positive end, or rising from a positive start.
        stochastic: Whether the sampler adds noise on the way, which only a falling grid allows.

    Returns:
        The state in at least float32, and the grid as Python floats.

    Raises:
        ValueError: If the grid is none of the above, or if it rises where noise is added.
    """
    levels = [float(level) for level in sigmas.tolist()]
    if len(levels) < 2:
        raise ValueError(
            f"A grid of {len(levels)} noise levels holds no step; give num_steps + 1 values, at least two."
        )
    for level in levels:
        if not (math.isfinite(level) and level >= 0):
            raise ValueError(f"The grid holds the noise level {level}; give finite values from 0 up.")
    rises = levels[1] > levels[0]
    for level, level_next in pairwise(levels):
        if level == level_next or (level_next > level) != rises:
            verb = "rise" if rises else "fall"
            raise ValueError(f"The grid does not {verb} from {level} to {level_next}; give each level once, in order.")
    if rises and levels[0] == 0:
        raise ValueError(
            "A rising grid starts at noise level 0, where no network is called; start it at sigma_min instead."
        )
    if rises and stochastic:
        raise ValueError(
            "A sampler that adds noise got a rising grid; invert with a deterministic one, such as ddim with eta 0."
        )
    return x.to(torch.promote_types(x.dtype, torch.float32)), levels


def level_like(x: Tensor, level: float) -> Tensor:
    """A noise level as the 0-d tensor that a denoiser is called with, of x's dtype, on the CPU.

    The CPU reads it without waiting for the accelerator, and kernels take it as a number.
    """
    return torch.tensor(level, dtype=x.dtype)


def euler_step(x: Tensor, x0_hat: Tensor, ratio: float) -> Tensor:
    """An Euler step of the probability-flow ODE, which is exact while x0_hat is constant.

    Args:
        x: The state.
        x0_hat: The estimate, of x's shape.
        ratio: The level reached over the level left.

    Returns:
        x0_hat + ratio * (x - x0_hat); x0_hat itself at ratio 0.
    """
    return x0_hat + ratio * (x - x0_hat) if ratio > 0 else x0_hat


def check_range(
    name: str, value: Any, low: float, high: float = math.inf, *, whole: bool = False, infinite: bool = False
) -> None:
    """Refuses an option outside [low, high].

    Args:
        name: The option's name.
        value: What was given.
        low: The least value allowed.
        high: The greatest value allowed.
        whole: Whether it must be whole.
        infinite: Whether infinity is allowed.

    Raises:
        ValueError: If value is outside, or not such a number.
    """
    check_number(least=low, most=None if high == math.inf else high, infinite=infinite, whole=whole, **{name: value})


def ancestral_split(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Splits a fall in noise into a deterministic step to a lower level and fresh noise back up.

    Args:
        sigma: The level that the step leaves.
        sigma_next: The level that it reaches, below sigma (with eta 0 on either side).
        eta: The share of noise, 0 (none) to 1 (that of the posterior q(x_next | x, x0)).

    Returns:
        `(sigma_down, sigma_up)` with sigma_down² + sigma_up² = sigma_next².

    Source: arXiv 2010.02502, eq. 16, divided by sqrt(alpha_bar) of the next step.
    """
    if eta == 0:
        return sigma_next, 0.0
    kept = (sigma_next / sigma) ** 2
    # As a sum of two shares the lower level does not cancel out to 0 in a long step.
    return sigma_next * math.sqrt(1 - eta**2 + eta**2 * kept), eta * sigma_next * math.sqrt(1 - kept)
