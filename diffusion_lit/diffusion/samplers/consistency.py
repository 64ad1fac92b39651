"""The sampler of consistency models, whose estimate is the end of the ODE's path and not a posterior mean.

    x0_hat = D(x; sigma),        x_next = x0_hat + sigma_next n,        n ~ N(0, I) fresh at each step

One step is one call of the model. Each further level adds noise to what was drawn and maps it again, which repairs
errors of the first map; if the map is exact, every step leaves the distribution of the data as it is.
"""

from itertools import pairwise

import torch
from torch import Tensor

from diffusion_lit.diffusion.samplers.common import Callback, Denoise, Noise, begin, level_like


def consistency(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise = torch.randn_like,
    callback: Callback | None = None,
) -> Tensor:
    """Maps to the clean image and back to each next level with fresh noise.

    A denoiser that is no consistency model gives blurred images here: its estimate is the mean of many.

    Args:
        denoise: Any `denoise(x, sigma) -> x0_hat`, for images a consistency model.
        x: The state at `sigmas[0]`, shape (B, ...).
        sigmas: The grid, shape (N+1,), falling.
        noise: Draws standard normal noise like its argument.
        callback: Called as `callback(step, x, x0_hat, sigma)` before each step.

    Returns:
        The state at `sigmas[-1]`, of x's shape and dtype.

    Raises:
        ValueError: If the grid does not fall.

    Source: Song et al. 2023 (arXiv 2303.01469), algorithm 1 with epsilon 0.
    """
    dtype = x.dtype
    x, levels = begin(x, sigmas, stochastic=True)
    for step, (sigma, sigma_next) in enumerate(pairwise(levels)):
        level = level_like(x, sigma)
        x0_hat = denoise(x, level)
        if callback is not None:
            callback(step, x, x0_hat, level)
        x = x0_hat + sigma_next * noise(x) if sigma_next > 0 else x0_hat
    return x.to(dtype)
