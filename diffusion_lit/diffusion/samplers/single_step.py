"""Samplers whose step depends on the present state alone.

The first-order ones are one formula. With x0_hat = D(x; s) a step from level s to t is

    x_t = x0_hat + (down / s) * (x - x0_hat) + up * n,

and (down, up) tells them apart: (t, 0) is Euler's step of the probability-flow ODE dx/ds = (x - D(x; s)) / s and also
DDIM; (t²/s, t sqrt(1 - t²/s²)) is the posterior q(x_t | x, x0_hat), that is DDPM, DDIM with eta 1 and Euler ancestral.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from diffusion_lit.diffusion.conversions import SAME
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

Split = Callable[[float, float], tuple[float, float]]


def _first_order(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    split: Split,
    stochastic: bool,
    noise: Noise,
    callback: Callback | None,
    clipped_noise: bool = True,
) -> Tensor:
    """Runs the step of the module's docstring with `(down, up) = split(s, t)`."""
    dtype = x.dtype
    x, levels = begin(x, sigmas, stochastic=stochastic)
    unclipped = None if clipped_noise else getattr(denoise, "unclipped", None)
    for step, (sigma, sigma_next) in enumerate(pairwise(levels)):
        level = level_like(x, sigma)
        x0_hat, x0_free = (denoise(x, level), None) if unclipped is None else unclipped(x, level)
        if callback is not None:
            callback(step, x, x0_hat, level)
        down, up = split(sigma, sigma_next)
        x = euler_step(x, x0_hat, down / sigma) if x0_free is None else x0_hat + down / sigma * (x - x0_free)
        if up > 0:
            x = x + up * noise(x)
    return x.to(dtype)


def ddim(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 0.0,
    use_clipped_model_output: bool = True,
    noise: Noise = torch.randn_like,
    callback: Callback | None = None,
) -> Tensor:
    """Denoising diffusion implicit models: the deterministic step, or with eta a share of the posterior's noise.

    Where x0_hat is clipped the noise follows it, eps = (x - x0_hat) / sigma, unless `use_clipped_model_output` is off.

    Args:
        denoise: Any `denoise(x, sigma) -> x0_hat`.
        x: The state at `sigmas[0]`, shape (B, ...).
        sigmas: The grid, shape (N+1,); with eta 0 it may also rise (inversion).
        eta: From 0 (Euler's method) to 1 (DDPM with the posterior variance).
        use_clipped_model_output: Whether eps is that of the clipped x0_hat; otherwise it is that of the estimate before
            `ClipX0` clipped it, which denoise tells by its method `unclipped(x, sigma) -> (x0_hat, x0_free)` where it
            has one. The name and the choice are diffusers', whose default is False.
        noise: Draws standard normal noise like its argument.
        callback: Called as `callback(step, x, x0_hat, sigma)` before each step.

    Returns:
        The state at `sigmas[-1]`, of x's shape and dtype.

    Raises:
        ValueError: If eta is outside [0, 1], or the grid is neither falling nor, with eta 0, rising.

    Source: arXiv 2010.02502, eq. 12 and 16.
    """
    check_range("eta", eta, 0, 1)
    return _first_order(
        denoise,
        x,
        sigmas,
        lambda s, t: ancestral_split(s, t, eta),
        eta > 0,
        noise,
        callback,
        clipped_noise=use_clipped_model_output,
    )


def euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise = torch.randn_like,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's method on the probability-flow ODE; in these coordinates it is `ddim` with eta 0.

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

    Source: arXiv 2206.00364, eq. 4, and arXiv 2010.02502, eq. 14.
    """
    return ddim(denoise, x, sigmas, eta=0.0, noise=noise, callback=callback)


def euler_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    noise: Noise = torch.randn_like,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's step to a lower level and fresh noise back up; in these coordinates it is `ddim` with eta 1 by default.

    Args:
        denoise: Any `denoise(x, sigma) -> x0_hat`.
        x: The state at `sigmas[0]`, shape (B, ...).
        sigmas: The grid, shape (N+1,), falling.
        eta: From 0 (no noise) to 1 (that of the posterior).
        noise: Draws standard normal noise like its argument.
        callback: Called as `callback(step, x, x0_hat, sigma)` before each step.

    Returns:
        The state at `sigmas[-1]`, of x's shape and dtype.

    Raises:
        ValueError: If eta is outside [0, 1], or the grid does not fall.

    Source: arXiv 2010.02502, eq. 12 and 16.
    """
    return ddim(denoise, x, sigmas, eta=eta, noise=noise, callback=callback)


def ddpm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    variance: str = "posterior",
    variance_scale: float = 1.0,
    noise_until: int | None = None,
    noise: Noise = torch.randn_like,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling of denoising diffusion probabilistic models.

    The mean is that of q(x_next | x, x0_hat). The noise has one of the three variances of the literature, written for
    the variance-preserving image of x; on the grid of a T-step schedule this is the T-step chain itself, and with the
    posterior variance it is `ddim` with eta 1. The step to level 0 adds no noise, as in Ho 2020, algorithm 2;
    diffusers' DDPM scheduler adds it unless that step starts from the chain's first.

    Args:
        denoise: Any `denoise(x, sigma) -> x0_hat`. For the learned variance it has a method
            `learned_variance(x, sigma, sigma_next) -> (x0_hat, v)` with v in [0, 1] of x's shape.
        x: The state at `sigmas[0]`, shape (B, ...).
        sigmas: The grid, shape (N+1,), falling.
        variance: "posterior", "beta", or "learned": the logarithm of the variance goes from the posterior's at v = 0 to
            beta's at v = 1.
        variance_scale: A factor on the variance, at least 0; below 1 samples are smoother.
        noise_until: The number of steps that add noise; the later ones take the mean, which makes samples crisper. None
            is all of them.
        noise: Draws standard normal noise like its argument.
        callback: Called as `callback(step, x, x0_hat, sigma)` before each step.

    Returns:
        The state at `sigmas[-1]`, of x's shape and dtype.

    Raises:
        ValueError: If an option is outside its range, the grid does not fall, or the variance is to be learned and
            denoise has no such method.

    Source: arXiv 2006.11239, eq. 6, 7 and 11; arXiv 2102.09672, eq. 15 (learned).
    """
    if variance not in ("posterior", "beta", "learned"):
        raise ValueError(f"The option variance is {variance!r}; give 'posterior', 'beta' or 'learned'.")
    check_range("variance_scale", variance_scale, 0)
    check_range("noise_until", 0 if noise_until is None else noise_until, 0, whole=True)
    learned = getattr(denoise, "learned_variance", None)
    if variance == "learned" and learned is None:
        raise ValueError("The denoiser has no learned variance; train with it, or give variance 'posterior' or 'beta'.")
    dtype = x.dtype
    x, levels = begin(x, sigmas, stochastic=True)
    for step, (sigma, sigma_next) in enumerate(pairwise(levels)):
        level = level_like(x, sigma)
        noisy = sigma_next > 0 and variance_scale > 0 and (noise_until is None or step < noise_until)
        v: float | Tensor = float(variance == "beta")
        if noisy and variance == "learned" and learned is not None:
            x0_hat, v = learned(x, level, level_like(x, sigma_next))
        else:
            x0_hat = denoise(x, level)
        if callback is not None:
            callback(step, x, x0_hat, level)
        down, up = ancestral_split(sigma, sigma_next, 1.0)
        x = euler_step(x, x0_hat, down / sigma)
        if noisy:
            x = x + math.sqrt(variance_scale) * up * _beta_over_posterior(sigma, sigma_next) ** (v / 2) * noise(x)
    return x.to(dtype)


def _beta_over_posterior(sigma: float, sigma_next: float) -> float:
    """The ratio of the variances beta and beta_tilde of the step, (1 - alpha_bar) / (1 - alpha_bar_next)."""
    return (1 + sigma_next**-2) / (1 + sigma**-2)


def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    S_churn: float = 0.0,
    S_tmin: float = 0.0,
    S_tmax: float = math.inf,
    S_noise: float = 1.0,
    noise: Noise = torch.randn_like,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's second-order method on the probability-flow ODE, with EDM's optional churn. A step to level 0 is Euler's.

    Churn raises the noise level before a step, so that the denoiser is called above `sigmas[0]` where S_tmax allows it;
    for a denoiser with a bounded range of levels keep S_tmax below its end.

    Args:
        denoise: Any `denoise(x, sigma) -> x0_hat`.
        x: The state at `sigmas[0]`, shape (B, ...).
        sigmas: The grid, shape (N+1,); with S_churn 0 it may also rise (inversion).
        S_churn: The amount of noise added over the whole run, at least 0; a step's level rises by a factor
            1 + min(S_churn / N, sqrt(2) - 1).
        S_tmin: The lowest level at which noise is added.
        S_tmax: The highest level at which noise is added.
        S_noise: A factor on the standard deviation of the noise added, at least 0.
        noise: Draws standard normal noise like its argument.
        callback: Called as `callback(step, x, x0_hat, sigma)` before each step, after its churn.

    Returns:
        The state at `sigmas[-1]`, of x's shape and dtype.

    Raises:
        ValueError: If an option is negative, or the grid is neither falling nor, without churn, rising.

    Source: arXiv 2206.00364, algorithms 1 and 2.
    """
    for name, value in (("S_churn", S_churn), ("S_tmin", S_tmin), ("S_tmax", S_tmax), ("S_noise", S_noise)):
        check_range(name, value, 0, infinite=name == "S_tmax")
    dtype = x.dtype
    x, levels = begin(x, sigmas, stochastic=S_churn > 0)
    gamma = min(S_churn / (len(levels) - 1), math.sqrt(2) - 1)
    for step, (sigma, sigma_next) in enumerate(pairwise(levels)):
        if gamma > 0 and S_tmin * (1 - SAME) <= sigma <= S_tmax * (1 + SAME):
            x = x + math.sqrt(gamma * (2 + gamma)) * sigma * S_noise * noise(x)
            sigma = sigma * (1 + gamma)
        level = level_like(x, sigma)
        x0_hat = denoise(x, level)
        if callback is not None:
            callback(step, x, x0_hat, level)
        x_euler = euler_step(x, x0_hat, sigma_next / sigma)
        if sigma_next == 0:
            x = x_euler
        else:
            slope = (x - x0_hat) / sigma
            slope_next = (x_euler - denoise(x_euler, level_like(x, sigma_next))) / sigma_next
            x = x + (sigma_next - sigma) * 0.5 * (slope + slope_next)
    return x.to(dtype)
