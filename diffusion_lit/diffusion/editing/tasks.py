"""From an image to noise and back: noising, denoising, image-to-image, inversion.

    forward   x = x0 + sigma n
    denoise   the sampler from x at sigma down the rest of its grid; in one step, D(x; sigma)
    img2img   forward, then denoise: the higher the level, the freer the result
    invert    the probability-flow ODE upwards, from the image to its noise; denoise brings it back

A seed names one stream of noise: `forward` takes the first draw, a sampler the later ones.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_lit.checks import check_number
from diffusion_lit.diffusion.conversions import SAME
from diffusion_lit.diffusion.editing.common import check_images, check_seeds, device_of, labels_for, settings
from diffusion_lit.diffusion.generate import Sampling, StepCallback
from diffusion_lit.diffusion.models import PixelModel
from diffusion_lit.diffusion.preconditioning import Preconditioning
from diffusion_lit.diffusion.rng import SeededNoise

STRIDED_STEPS = 33  # every 30th of 1,000


def strided(sampling: Sampling, scaling: Preconditioning) -> Sampling:
    """Settings whose grid is every 30th of 1,000 steps, 960, 930, ..., 0, on which editing counts its start levels.

    Args:
        sampling: The settings to change.
        scaling: The model's prediction type; a schedule of fewer than 33 steps is taken whole.

    Returns:
        The settings with the leading grid of 33 steps.
    """
    total = STRIDED_STEPS if scaling.schedule is None else scaling.schedule.num_steps
    return sampling.replace(grid="leading", num_steps=min(STRIDED_STEPS, total))


@torch.no_grad()
def forward(model: PixelModel, images: Tensor, sigma: float, seeds: Sequence[int] | None = None) -> Tensor:
    """Noises images.

    Args:
        model: The model, whose images or latents are noised.
        images: Images (B, C, H, W) in [-1, 1].
        sigma: Noise level, at least 0.
        seeds: One seed per image, 0, 1, ... by default; a seed is the same noise n at every level.

    Returns:
        x = x0 + sigma n, shape (B, *x_shape); `visible` shows it.

    Raises:
        ValueError: If sigma is negative, or shapes or seeds do not fit.
    """
    check_number(least=0, sigma=sigma)
    x0 = model.encode(check_images(model, images))
    return x0 + sigma * SeededNoise(check_seeds(seeds, len(images)))(x0)


@torch.no_grad()
def visible(model: PixelModel, x: Tensor, sigma: float) -> Tensor:
    """Noisy images in the range of images, as a variance-preserving path has them.

    Args:
        model: The model.
        x: What is denoised, at noise level sigma, shape (B, *x_shape).
        sigma: The noise level.

    Returns:
        x / sqrt(1 + sigma^2), decoded, shape (B, C, H, W).
    """
    return model.decode(x / (1 + sigma**2) ** 0.5)


@torch.no_grad()
def denoise_once(
    model: PixelModel, x: Tensor, sigma: float, *, labels: Tensor | None = None, sampling: Sampling | None = None
) -> Tensor:
    """Denoises in one step: the mean of all images that could be behind x.

    Args:
        model: The model.
        x: Noisy images x0 + sigma n (or latents), shape (B, *x_shape).
        sigma: Their noise level.
        labels: Class indices (B,), or None.
        sampling: Guidance and threshold; the model's own by default.

    Returns:
        Images D(x; sigma), shape (B, C, H, W).

    Raises:
        ValueError: If the model does not know this level or these labels.
    """
    sampling = settings(model, sampling)
    x0_hat: Tensor = sampling.wrap(model.denoiser, labels_for(model, labels, len(x)))(x.to(device_of(model)), sigma)
    return model.decode(x0_hat)


@torch.no_grad()
def denoise(
    model: PixelModel,
    x: Tensor,
    sigma: float,
    *,
    labels: Tensor | None = None,
    seeds: Sequence[int] | None = None,
    sampling: Sampling | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Denoises step by step, from any level down the rest of the sampler's grid.

    Args:
        model: The model.
        x: Noisy images x0 + sigma n (or latents), shape (B, *x_shape).
        sigma: Their noise level; on a level of the grid it goes on from there.
        labels: Class indices (B,), or None.
        seeds: One seed per image, 0, 1, ... by default. The noise is the one that follows `forward`'s of that seed.
        sampling: Sampler, grid and guidance; the model's own by default.
        callback: Called as `callback(step, x, x0_hat, sigma)` at each step.

    Returns:
        Images (B, C, H, W).

    Raises:
        ValueError: If the model does not know this level or these labels.
    """
    sampling = settings(model, sampling)
    sigmas = sampling.sigmas(model.denoiser.scaling)
    below = sigmas[sigmas < sigma * (1 - SAME)]
    sigmas = torch.cat([sigmas.new_tensor([sigma]), below])
    x = x.to(device_of(model))
    noise = SeededNoise(check_seeds(seeds, len(x)))
    noise(x)  # which forward drew
    denoiser = sampling.wrap(model.denoiser, labels_for(model, labels, len(x)))
    x = sampling.run(denoiser, x, sigmas, noise=noise, callback=callback)
    return model.decode(sampling.finish(denoiser.scaling, x))


def img2img(
    model: PixelModel,
    images: Tensor,
    start: int,
    *,
    labels: Tensor | None = None,
    seeds: Sequence[int] | None = None,
    sampling: Sampling | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Noises images to a level of the grid and denoises them from there.

    Args:
        model: The model.
        images: Images (B, C, H, W) in [-1, 1].
        start: Index of the level, from 0 (all noise) to num_steps - 1 (all but the image itself).
        labels: Class indices (B,) that the result shall have, or None.
        seeds: One seed per image, 0, 1, ... by default.
        sampling: Sampler, grid and guidance; by default the model's own on the `strided` grid.
        callback: Called as `callback(step, x, x0_hat, sigma)` at each step.

    Returns:
        Images (B, C, H, W).

    Raises:
        ValueError: If there is no such level, or shapes, seeds or labels do not fit.

    Source: SDEdit, arXiv 2108.01073, algorithm 1.
    """
    sampling = settings(model, sampling or strided(model.sampling, model.denoiser.scaling))
    sigma = start_level(sampling, model.denoiser.scaling, start)
    x = forward(model, images, sigma, seeds)
    return denoise(model, x, sigma, labels=labels, seeds=seeds, sampling=sampling, callback=callback)


def start_level(sampling: Sampling, scaling: Preconditioning, start: int) -> float:
    """The noise level that a start index means.

    Args:
        sampling: The settings with the grid.
        scaling: The model's prediction type.
        start: Index on the grid.

    Returns:
        Sigma.

    Raises:
        ValueError: If the grid has no such level above 0.
    """
    levels = sampling.sigmas(scaling)[:-1].tolist()
    if not 0 <= start < len(levels):
        raise ValueError(
            f"The start {start} is no index of the grid; with num_steps {sampling.num_steps} they go from 0 (all "
            f"noise) to {len(levels) - 1} (next to none)."
        )
    return float(levels[start])


@torch.no_grad()
def invert(
    model: PixelModel,
    images: Tensor,
    *,
    labels: Tensor | None = None,
    sampling: Sampling | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Takes images up the probability-flow ODE to the noise that they come from.

    `denoise(model, x, sigma_max, ...)` with the same settings brings them back.

    Args:
        model: The model.
        images: Images (B, C, H, W) in [-1, 1].
        labels: Class indices (B,), or None.
        sampling: A deterministic sampler, its grid and guidance; the model's own by default.
        callback: Called as `callback(step, x, x0_hat, sigma)` at each step, upwards.

    Returns:
        The state x at the grid's sigma_max, shape (B, *x_shape).

    Raises:
        ValueError: If the sampler adds noise, or shapes or labels do not fit.

    Source: DDIM, arXiv 2010.02502, section 4.3; arXiv 2011.13456, section 4.3.
    """
    sampling = settings(model, sampling)
    x0 = model.encode(check_images(model, images))
    sigmas = sampling.sigmas(model.denoiser.scaling)
    rising = sigmas[sigmas > 0].flip(0)
    if len(rising) < 2:
        raise ValueError("Inversion needs num_steps of at least 2, since the last step only leaves the grid.")
    denoiser = sampling.wrap(model.denoiser, labels_for(model, labels, len(images)))
    return sampling.run(denoiser, x0, rising, noise=torch.randn_like, callback=callback)
