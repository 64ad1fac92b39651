"""Sampling by a learned map between noise levels: one call of the network takes x from a level to any lower one."""

from itertools import pairwise

import torch
from torch import Tensor

from diffusion_lit.diffusion.denoiser import DenoiserLike, estimate_of_move
from diffusion_lit.diffusion.samplers.common import Callback, Noise, begin, level_like


def meanflow(
    denoise: DenoiserLike,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise = torch.randn_like,
    callback: Callback | None = None,
) -> Tensor:
    """Follows the average velocity from each level of the grid to the next, in one step or in several.

    A step is as exact as the network, however long it is: on a true average velocity one step gives what many give.

    Args:
        denoise: Any `denoise(x, sigma, until=...) -> state at until` whose attribute `takes_until` is true.
        x: The state at `sigmas[0]`, shape (B, ...).
        sigmas: The grid, shape (N+1,), falling.
        noise: Unused; all samplers have the same arguments.
        callback: Called as `callback(step, x, x0_hat, sigma)` before each step; x0_hat is the estimate averaged over
            the step.

    Returns:
        The state at `sigmas[-1]`, of x's shape and dtype.

    Raises:
        ValueError: If the grid rises, or denoise takes no second noise level.

    Source: Geng et al. 2025 (arXiv 2505.13447), equation 12 and algorithm 2.
    """
    check_takes_until(denoise)
    dtype = x.dtype
    x, levels = begin(x, sigmas, stochastic=False)
    if levels[1] > levels[0]:
        raise ValueError(
            "The sampler meanflow got a rising grid, but its map is trained towards lower levels; invert with ddim."
        )
    for step, (sigma, sigma_next) in enumerate(pairwise(levels)):
        level, until = level_like(x, sigma), level_like(x, sigma_next)
        moved = denoise(x, level, until=until)
        if callback is not None:
            callback(step, x, estimate_of_move(x, moved, level, until), level)
        x = moved
    return x.to(dtype)


def check_takes_until(denoise: DenoiserLike) -> None:
    """Refuses a denoiser that takes no second noise level.

    Args:
        denoise: Any denoiser.

    Raises:
        ValueError: If its attribute `takes_until` is not true.
    """
    if not getattr(denoise, "takes_until", False):
        raise ValueError(
            "The sampler meanflow needs a model that is told where a step ends (takes_until), as the MeanFlow configs "
            "train it; this one is not: choose another sampler."
        )
