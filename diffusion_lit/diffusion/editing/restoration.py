"""Restoration of images from linear measurements: inpainting, colorization, super-resolution, deblurring.

The measurement is y = A x0 (measurements.py). After each evaluation the estimate is replaced by one that agrees with
it,

    x0_hat <- x0_hat + A+ (y - A x0_hat),    A A+ = 1

`Consistent` wraps a denoiser and is itself a denoiser, so samplers need no change. As the known part of the estimate is
y, every sampler moves the known part of its state along y + sigma n, and a stochastic one renews its noise; at sigma 0
the result is the estimate and agrees with y exactly. This is the re-noising of the known region at every step, in the
coordinates x = x0 + sigma n. The known part influences the rest through the network alone, and little at high noise.
RePaint's resampling gives it more time: it runs a window of steps, adds the noise again and repeats. A deterministic
sampler never revises early decisions, so the default is `ddpm` whatever sampler the model uses.

A noisy measurement is no constraint: a `posterior` (posterior.py) then moves the estimates instead of the
projection, and nothing is enforced at the end. A model that was trained to be given such a measurement as an image
(conditions.py) is given it.

For a model of latents, inpainting fixes the latents whose pixels are all known and pastes the known pixels at the end;
a grey or small image is enforced by decoding, projecting and encoding.

Source: arXiv 2212.00490 (DDNM), equations 7 to 13; arXiv 2201.09865 (RePaint), algorithm 1 and section 4.2.
"""

from collections.abc import Callable, Sequence
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from diffusion_lit.checks import check_count
from diffusion_lit.diffusion.denoiser import DenoiserLike
from diffusion_lit.diffusion.editing.common import (
    check_images,
    check_seeds,
    device_of,
    labels_for,
    need_pixels,
    settings,
)
from diffusion_lit.diffusion.editing.measurements import (
    Measurement,
    Project,
    blurred,
    grey_of,
    keep_known,
    known_pixels,
    small_of,
)
from diffusion_lit.diffusion.generate import NUM_STEPS, Sampling, StepCallback, check_follows_ode
from diffusion_lit.diffusion.models import LatentModel, PixelModel
from diffusion_lit.diffusion.posterior import Linear, PosteriorDenoiser
from diffusion_lit.diffusion.rng import SeededNoise
from diffusion_lit.diffusion.samplers import SAMPLERS
from diffusion_lit.diffusion.wrappers import Conditioned, DenoiserWrapper, Evaluate

Posterior = Callable[[DenoiserLike, Linear, Tensor], PosteriorDenoiser]
"""Wraps a denoiser for a measurement: `posterior(denoiser, measure, y)`, such as `partial(MMPS, sigma_y=0.1)`."""


class RestoreOptions(TypedDict, total=False):
    """What every task here takes by keyword and hands to `restore`."""

    labels: Tensor | None
    seeds: Sequence[int] | None
    sampling: Sampling | None
    resamplings: int
    jump: int
    callback: StepCallback | None


class Options(RestoreOptions, total=False):
    """As `RestoreOptions`, and how noisy measurements are followed; see `from_measurement`."""

    posterior: Posterior | None


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


def revising(sampling: Sampling) -> Sampling:
    """The given settings if their sampler draws noise, otherwise the same with `ddpm`.

    A MeanFlow's own few steps are too few for it, and give way to the usual number.

    Args:
        sampling: How images are drawn from the model.

    Returns:
        How they are restored.
    """
    options = sampling.sampler_options
    draws = SAMPLERS[sampling.sampler].stochastic or options.get("eta", 0) or options.get("S_churn", 0)
    if draws:
        return sampling
    few = SAMPLERS[sampling.sampler].takes_until and sampling.num_steps < NUM_STEPS
    return sampling.replace(sampler="ddpm", num_steps=NUM_STEPS if few else None)


def _unchanged(x: Tensor) -> Tensor:
    return x


def through_autoencoder(model: PixelModel, project: Project) -> Project:
    """A projection of images as one of what a model denoises."""
    if not isinstance(model, LatentModel):
        return project
    return lambda x: model.encode(project(model.decode(x)))


@torch.no_grad()
def restore(
    model: PixelModel,
    project: Project | None,
    count: int,
    *,
    labels: Tensor | None = None,
    seeds: Sequence[int] | None = None,
    sampling: Sampling | None = None,
    resamplings: int = 1,
    jump: int = 1,
    callback: StepCallback | None = None,
    wrap: Callable[[DenoiserLike], DenoiserLike] | None = None,
    condition: Tensor | None = None,
) -> Tensor:
    """Samples under a projection, or under another wrapper of the denoiser.

    Args:
        model: The model.
        project: Acts on what the model denoises; None for none.
        count: Number B of images.
        labels: Class indices (B,), or None.
        seeds: One seed per image, 0, 1, ... by default.
        sampling: Sampler, grid and guidance; the model's own by default, `revising`.
        resamplings: How often each window of steps is run (RePaint's r); 1 is plain sampling. From 2 on, a sampler that
            remembers earlier steps forgets them at each window.
        jump: Steps in a window (RePaint's j).
        callback: Called as `callback(step, x, x0_hat, sigma)` at each step; steps count within a window.
        wrap: Wraps the denoiser under its guidance; a threshold acts after it.
        condition: Condition images (B, C', H, W), for a model that is given one.

    Returns:
        What was denoised, (B, *x_shape), which agrees with the projection.

    Raises:
        ValueError: If resamplings or jump is below 1, or labels or seeds do not fit.

    Source: arXiv 2201.09865, algorithm 1 and section 4.2.
    """
    check_count(resamplings=resamplings, jump=jump)
    sampling = settings(model, sampling or revising(model.sampling))
    guided = sampling.guided(model.denoiser, labels is not None, condition)
    guided = sampling.clip(guided if wrap is None else wrap(guided))
    project = project or _unchanged
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


def from_measurement(
    model: PixelModel,
    measurement: Measurement,
    y: Tensor,
    *,
    posterior: Posterior | None = None,
    **options: Unpack[RestoreOptions],
) -> Tensor:
    """Restores images from a measurement of them.

    Args:
        model: The model; one that is given an image is given y, where it was trained on such a measurement.
        measurement: What was measured.
        y: The measurements, a row for each image.
        posterior: For noisy measurements, on which no model that is given an image was trained; None for ones that
            the images must agree with.
        options: As for `restore`.

    Returns:
        Images (B, C, H, W).

    Raises:
        ValueError: As `restore`, or if a posterior is asked of a model of latents or a consistency model.
    """
    y = y.to(device_of(model))
    if posterior is not None:
        need_pixels(model, "Posterior sampling")
        check_follows_ode(model.sampling, "its estimate is no mean to restore by")
        return restore(model, None, len(y), wrap=lambda denoiser: posterior(denoiser, measurement.apply, y), **options)
    pixels = measurement.project(y)
    condition = measurement.condition_for(model, y)
    x = restore(model, through_autoencoder(model, pixels), len(y), condition=condition, **options)
    return pixels(model.decode(x))


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
    if not isinstance(model, LatentModel) or options.get("posterior") is not None:
        measurement = known_pixels(known)
        return from_measurement(model, measurement, measurement.apply(images), **options)
    return _inpaint_latents(model, images, known, **options)


def _inpaint_latents(model: LatentModel, images: Tensor, known: Tensor, **options: Unpack[Options]) -> Tensor:
    """Inpaints by fixing the latents whose pixels are all known; see `inpaint`."""
    known_x = model.shrink_mask(known)
    if not bool(known_x.flatten(1).any(1).all()):
        raise ValueError(
            f"The mask leaves no latent known, each of which needs a whole square of "
            f"{model.image_shape[1] // model.x_shape[1]} pixels a side; mask less, or use a model of pixels."
        )
    # The encoder's receptive field exceeds a latent's square, so the unknown pixels must be erased first.
    mean = (images * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True)
    project = keep_known(model.encode(torch.where(known != 0, images, mean)), known_x)
    options.pop("posterior", None)
    x = restore(model, project, len(images), **options)  # type: ignore[misc]
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
    return from_measurement(model, grey_of(3), grey, **options)


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
    return from_measurement(model, small_of(factor), small, **options)


def deblur(
    model: PixelModel, images: Tensor, blur_sigma: float, cutoff: float = 1e-3, **options: Unpack[Options]
) -> Tensor:
    """Takes a Gaussian blur off images.

    Args:
        model: The model.
        images: Blurred images (B, C, H, W) in [-1, 1]; see `measurements.blurred`.
        blur_sigma: Standard deviation of the blur in pixels.
        cutoff: Frequencies of which the blur has left less than this share are free.
        options: As for `restore`.

    Returns:
        Images (B, C, H, W), which blurred are those given, up to rounding and the frequencies that are free.

    Raises:
        ValueError: If shapes do not fit; or as `restore`.
    """
    images = check_images(model, images)
    _, height, width = model.image_shape
    return from_measurement(model, blurred(blur_sigma, height, width, cutoff), images, **options)
