"""DPM-Solver++: second-order samplers that integrate the linear part of the ODE exactly.

With a constant x0_hat the probability-flow ODE has the exact solution x_t = x0_hat + (t / s) * (x - x0_hat). The
solvers use a second-order estimate of x0_hat in lambda = -log sigma: at the step's midpoint (2S), or extrapolated from
the step before (2M). With eta, 2M shrinks the distance to x0_hat by (t / s)^(1 + eta) and adds noise of standard
deviation t sqrt(1 - (t / s)^(2 eta)): the exact solution of the reverse SDE for a constant x0_hat, and at eta 1 the
posterior q(x_t | x, x0_hat).
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from diffusion_lit.diffusion.samplers.common import (
    Callback,
    Denoise,
    Noise,
    ancestral_split,
    begin,
    check_range,
    euler_step,
    level_like,
)


def dpmpp_2s_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    noise: Noise = torch.randn_like,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2S) to the lower level of an ancestral step, and fresh noise back up. A step to level 0 is Euler's.

    Args:
        denoise: Any `denoise(x, sigma) -> x0_hat`.
        x: The state at `sigmas[0]`, shape (B, ...).
        sigmas: The grid, shape (N+1,); with eta 0 it may also rise (inversion).
        eta: From 0 (deterministic, DPM-Solver++(2S) itself) to 1 (the posterior's noise).
        noise: Draws standard normal noise like its argument.
        callback: Called as `callback(step, x, x0_hat, sigma)` before each step.

    Returns:
        The state at `sigmas[-1]`, of x's shape and dtype.

    Raises:
        ValueError: If eta is outside [0, 1], or the grid is neither falling nor, with eta 0, rising.

    Source: arXiv 2211.01095, algorithm 1 with r = 1/2.
    """
    check_range("eta", eta, 0, 1)
    dtype = x.dtype
    x, levels = begin(x, sigmas, stochastic=eta > 0)
    for step, (sigma, sigma_next) in enumerate(pairwise(levels)):
        level = level_like(x, sigma)
        x0_hat = denoise(x, level)
        if callback is not None:
            callback(step, x, x0_hat, level)
        down, up = ancestral_split(sigma, sigma_next, eta)
        if down > 0:
            middle = math.sqrt(sigma * down)
            x0_hat = denoise(euler_step(x, x0_hat, middle / sigma), level_like(x, middle))
        x = euler_step(x, x0_hat, down / sigma)
        if up > 0:
            x = x + up * noise(x)
    return x.to(dtype)


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    noise: Noise = torch.randn_like,
    callback: Callback | None = None,
) -> Tensor:
    """SDE-DPM-Solver++(2M): x0_hat extrapolated from two steps. The first step and one to level 0 are first-order.

    Args:
        denoise: Any `denoise(x, sigma) -> x0_hat`.
        x: The state at `sigmas[0]`, shape (B, ...).
        sigmas: The grid, shape (N+1,); with eta 0 it may also rise (inversion).
        eta: The amount of noise, at least 0: 0 is `dpmpp_2m`, 1 the reverse SDE of the paper.
        noise: Draws standard normal noise like its argument.
        callback: Called as `callback(step, x, x0_hat, sigma)` before each step.

    Returns:
        The state at `sigmas[-1]`, of x's shape and dtype.

    Raises:
        ValueError: If eta is negative, or the grid is neither falling nor, with eta 0, rising.

    Source: arXiv 2211.01095, section 6 and appendix A (SDE-DPM-Solver++(2M)).
    """
    check_range("eta", eta, 0)
    dtype = x.dtype
    x, levels = begin(x, sigmas, stochastic=eta > 0)
    x0_last: Tensor | None = None
    length_last = 1.0
    for step, (sigma, sigma_next) in enumerate(pairwise(levels)):
        level = level_like(x, sigma)
        x0_hat = denoise(x, level)
        if callback is not None:
            callback(step, x, x0_hat, level)
        if sigma_next == 0:
            return x0_hat.to(dtype)
        length = math.log(sigma / sigma_next)
        x0_middle = x0_hat
        if x0_last is not None:
            x0_middle = x0_hat + length / (2 * length_last) * (x0_hat - x0_last)
        x = euler_step(x, x0_middle, (sigma_next / sigma) ** (1 + eta))
        if eta > 0:
            x = x + sigma_next * math.sqrt(-math.expm1(-2 * eta * length)) * noise(x)
        x0_last, length_last = x0_hat, length
    return x.to(dtype)


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise = torch.randn_like,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M): two steps' x0_hat, one call per step; it is `dpmpp_2m_sde` with eta 0.

    Where diffusers' schedulers end the grid in sigma_min, the last step is first-order below 15 steps and second-order
    from there on; here a step to a positive end is always second-order, and one to 0 always first-order.

    Args:
        denoise: Any `denoise(x, sigma) -> x0_hat`.
        x: The state at `sigmas[0]`, shape (B, ...).
        sigmas: The grid, shape (N+1,), falling or rising.
        noise: Unused; all samplers have the same arguments.
        callback: Called as `callback(step, x, x0_hat, sigma)` before each step.

    Returns:
        The state at `sigmas[-1]`, of x's shape and dtype.

    Raises:
        ValueError: If the grid neither falls nor rises.

    Source: arXiv 2211.01095, algorithm 2.
    """
    return dpmpp_2m_sde(denoise, x, sigmas, eta=0.0, noise=noise, callback=callback)
