"""Restoration of images from linear measurements: inpainting, colorization, super-resolution, by one projection.

The measurement is y = A x0: some pixels, the grey values, or means over squares. After each evaluation the estimate is
replaced by one that agrees with it,

    x0_hat <- x0_hat + A+ (y - A x0_hat),    A A+ = 1

`Consistent` wraps a denoiser and is itself a denoiser, so samplers need no change. As the known part of the estimate is
y, every sampler moves the known part of its state along y + sigma n, and a stochastic one renews its noise; at sigma 0
the result is the estimate and agrees with y exactly. This is the re-noising of the known region at every step, in the
coordinates x = x0 + sigma n. The known part influences the rest through the network alone, and little at high noise.
RePaint's resampling gives it more time: it runs a window of steps, adds the noise again and repeats. A deterministic
sampler never revises early decisions, so the default is `ddpm` whatever sampler the model uses.

For a model of latents, inpainting fixes the latents whose pixels are all known and pastes the known pixels at the end;
a grey or small image is enforced by decoding, projecting and encoding.

Source: arXiv 2212.00490 (DDNM), equations 7 to 13; arXiv 2201.09865 (RePaint), algorithm 1 and section 4.2.
"""

from collections.abc import Callable, Sequence
from typing import TypedDict, Unpack

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from diffusion_lit.checks import check_count
from diffusion_lit.diffusion.denoiser import DenoiserLike
from diffusion_lit.diffusion.editing.common import check_images, check_seeds, device_of, labels_for, settings
from diffusion_lit.diffusion.generate import Sampling, StepCallback
from diffusion_lit.diffusion.models import LatentModel, PixelModel
from diffusion_lit.diffusion.rng import SeededNoise
from diffusion_lit.diffusion.samplers import SAMPLERS
from diffusion_lit.diffusion.wrappers import Conditioned, DenoiserWrapper, Evaluate

Project = Callable[[Tensor], Tensor]
"""Takes estimates (B, C, H, W) to ones that agree with what is known."""

LUMA = (0.299, 0.587, 0.114)


class Options(TypedDict, total=False):
    """What every task here takes by keyword and hands to `restore`."""

    labels: Tensor | None
    seeds: Sequence[int] | None
    sampling: Sampling | None
    resamplings: int
    jump: int
    callback: StepCallback | None


class Consistent(DenoiserWrapper):
    """A denoiser whose estimates agree with what is known.

    Args:
        denoiser: Any denoiser.
        project: Takes x0_hat (B, C, H, W) to one that agrees.

    Source: arXiv 2212.00490, equation 13.
    """

    def __init__(self, denoiser: DenoiserLike, project: Project) -> None:
        super().__init__(denoiser)
        self.project = project

    def transform(
        self, evaluate: Evaluate, x: Tensor, sigma: Tensor | float, label: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Evaluates and projects x0_hat; see `DenoiserWrapper.transform`."""
        x0_hat, *rest = evaluate(x, sigma, label)
        return (self.project(x0_hat), *rest)


def keep_known(images: Tensor, known: Tensor) -> Project:
    """The projection of inpainting: known pixels are those of the image, bit for bit.

    Args:
        images: Shape (B, C, H, W).
        known: Nonzero where a pixel is known, shape (B or 1, 1, H, W).

    Returns:
        The projection.
    """
    return lambda x: torch.where(known != 0, images.to(x), x)


def to_grey(images: Tensor) -> Tensor:
    """The grey of colours by ITU-R BT.601, which is the mode L of image files.

    Args:
        images: Shape (B, 3, H, W).

    Returns:
        Shape (B, 1, H, W).
    """
    weights = images.new_tensor(LUMA).reshape(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def keep_grey(grey: Tensor) -> Project:
    """The projection of colorization: an image's grey is the given one, its hues are free.

    All channels shift by the same amount, which keeps the hue; the weights of grey sum to 1.

    Args:
        grey: Shape (B, 1, H, W).

    Returns:
        The projection.
    """
    return lambda x: x + (grey.to(x) - to_grey(x))


def keep_small(small: Tensor, factor: int) -> Project:
    """The projection of super-resolution: the means over squares are the pixels of the small image.

    Args:
        small: Shape (B, C, H / factor, W / factor).
        factor: Side of a square.

    Returns:
        The projection.
    """
    return lambda x: x + interpolate(small.to(x) - avg_pool2d(x, factor), scale_factor=factor)


def revising(sampling: Sampling) -> Sampling:
    """The given settings if their sampler draws noise, otherwise the same with `ddpm`.

    Args:
        sampling: How images are drawn from the model.

    Returns:
        How they are restored.
    """
    options = sampling.sampler_options
    draws = SAMPLERS[sampling.sampler].stochastic or options.get("eta", 0) or options.get("S_churn", 0)
    return sampling if draws else sampling.replace(sampler="ddpm")


def through_autoencoder(model: PixelModel, project: Project) -> Project:
    """A projection of images as one of what a model denoises."""
    if not isinstance(model, LatentModel):
        return project
    return lambda x: model.encode(project(model.decode(x)))


@torch.no_grad()
def restore(
    model: PixelModel,
    project: Project,
    count: int,
    *,
    labels: Tensor | None = None,
    seeds: Sequence[int] | None = None,
    sampling: Sampling | None = None,
    resamplings: int = 1,
    jump: int = 1,
    callback: StepCallback | None = None,
) -> Tensor:
    """Samples under a projection.

    Args:
        model: The model.
        project: Acts on what the model denoises.
        count: Number B of images.
        labels: Class indices (B,), or None.
        seeds: One seed per image, 0, 1, ... by default.
        sampling: Sampler, grid and guidance; the model's own by default, `revising`.
        resamplings: How often each window of steps is run (RePaint's r); 1 is plain sampling. From 2 on, a sampler that
            remembers earlier steps forgets them at each window.
        jump: Steps in a window (RePaint's j).
        callback: Called as `callback(step, x, x0_hat, sigma)` at each step; steps count within a window.

    Returns:
        What was denoised, (B, *x_shape), which agrees with the projection.

    Raises:
        ValueError: If resamplings or jump is below 1, or labels or seeds do not fit.

    Source: arXiv 2201.09865, algorithm 1 and section 4.2.
    """
    check_count(resamplings=resamplings, jump=jump)
    sampling = settings(model, sampling or revising(model.sampling))
    guided = sampling.guide(model.denoiser, labels is not None)
    denoise = Conditioned(Consistent(guided, project), labels_for(model, labels, count))
    sigmas = sampling.sigmas(denoise.scaling)
    noise = SeededNoise(check_seeds(seeds, count))
    nothing = torch.zeros(count, *model.x_shape, device=device_of(model))
    x = project(nothing) + float(sigmas[0]) * noise(nothing)  # not `start`: known values are at sigma exactly
    steps = jump if resamplings > 1 else len(sigmas)
    for first in range(0, len(sigmas) - 1, steps):
        window = sigmas[first : first + steps + 1]
        for again in range(resamplings):
            if again:
                x = x + float(window[0].square().sub(window[-1].square()).sqrt()) * noise(x)
            x = sampling.run(denoise, x, window, noise=noise, callback=callback)
    return project(sampling.finish(denoise.scaling, x))


def inpaint(
    model: PixelModel,
    images: Tensor,
    known: Tensor,
    **options: Unpack[Options],
) -> Tensor:
    """Fills in the unknown part of images.

    Args:
        model: The model.
        images: Images (B, C, H, W) in [-1, 1]; what they hold at unknown pixels has no influence.
        known: True or 1 where a pixel is known, shape (B or 1, 1, H, W).
        options: As for `restore`.

    Returns:
        Images (B, C, H, W), at known pixels those given, bit for bit.

    Raises:
        ValueError: If all or none of an image is known, shapes do not fit, or, for a model of latents, no latent is
            known; or as `restore`.
    """
    images = check_images(model, images)
    known = check_known(known, images)
    project, known_x = keep_known(images, known), known
    if isinstance(model, LatentModel):
        known_x = model.shrink_mask(known)
        if not bool(known_x.flatten(1).any(1).all()):
            raise ValueError(
                f"The mask leaves no latent known, each of which needs a whole square of "
                f"{model.image_shape[1] // model.x_shape[1]} pixels a side; mask less, or use a model of pixels."
            )
        # The encoder's receptive field exceeds a latent's square, so the unknown pixels must be erased first.
        mean = (images * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True)
        project = keep_known(model.encode(torch.where(known != 0, images, mean)), known_x)
    x = restore(model, project, len(images), **options)
    return torch.where(known != 0, images, model.decode(x))


def check_known(known: Tensor, images: Tensor) -> Tensor:
    """A mask of known pixels as numbers 1 and 0, one for each image.

    Args:
        known: True or nonzero where a pixel is known, shape (B or 1, 1, H, W).
        images: Images (B, C, H, W).

    Returns:
        Shape (B, 1, H, W), of the images' dtype.

    Raises:
        ValueError: If the shape does not fit, or all or nothing of an image is known.
    """
    batch, _, *size = images.shape
    if known.ndim != 4 or known.shape[0] not in (1, batch) or list(known.shape[1:]) != [1, *size]:
        raise ValueError(
            f"The mask has shape {tuple(known.shape)} for images {tuple(images.shape)}; give ({batch}, 1, "
            f"{size[0]}, {size[1]}), or one of 1 for all."
        )
    known = (known != 0).to(images).expand(batch, -1, -1, -1)
    shares = known.flatten(1).mean(1)
    if bool((shares == 1).any()):
        raise ValueError("The mask is empty: every pixel is known and there is nothing to fill in; mark a part.")
    if bool((shares == 0).any()):
        raise ValueError("The mask covers the whole image: no pixel is known; mark a part, or draw a sample instead.")
    return known


def colorize(
    model: PixelModel,
    grey: Tensor,
    **options: Unpack[Options],
) -> Tensor:
    """Gives grey images colours.

    Args:
        model: A model of RGB images.
        grey: Grey images (B, 1, H, W) in [-1, 1].
        options: As for `restore`.

    Returns:
        Images (B, 3, H, W) with `to_grey(images)` equal to `grey` up to rounding; some may leave [-1, 1] for it.

    Raises:
        ValueError: If the model's images have no colours, or shapes do not fit; or as `restore`.
    """
    if model.image_shape[0] != 3:
        raise ValueError(
            f"Colorizing needs a model of RGB images, but this one's have {model.image_shape[0]} channel(s)."
        )
    check_images(model, grey.expand(-1, 3, -1, -1) if grey.ndim == 4 and grey.shape[1] == 1 else grey[:, :0])
    pixels = keep_grey(grey)
    project = through_autoencoder(model, pixels)
    return pixels(model.decode(restore(model, project, len(grey), **options)))


def super_resolve(
    model: PixelModel,
    small: Tensor,
    **options: Unpack[Options],
) -> Tensor:
    """Gives small images detail.

    Args:
        model: The model.
        small: Images (B, C, h, w) in [-1, 1], of a size that divides the model's by one whole factor of 2 or more.
        options: As for `restore`.

    Returns:
        Images (B, C, H, W) whose means over squares are `small` up to rounding; some may leave [-1, 1] for it.

    Raises:
        ValueError: If the sizes do not fit; or as `restore`.
    """
    channels, height, width = model.image_shape
    factor = height // max(1, small.shape[-2])
    if factor < 2 or tuple(small.shape[1:]) != (channels, height / factor, width / factor):
        raise ValueError(
            f"Small images of shape {tuple(small.shape)} cannot become {(channels, height, width)}; give ones that a "
            "whole factor of 2 or more enlarges to that."
        )
    pixels = keep_small(small, factor)
    project = through_autoencoder(model, pixels)
    return pixels(model.decode(restore(model, project, len(small), **options)))
