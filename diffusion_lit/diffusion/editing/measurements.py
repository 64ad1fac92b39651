"""What restoration starts from: linear measurements y = A x0 of images, and the projection on what agrees with one.

    known pixels   y = m x0               the hole is free
    grey           y = w . x0             all channels shift alike, which keeps the hue
    small          y = means over squares, each square shifts as a whole
    blurred        y = B x0               the frequencies that B has left

The projection is x <- x + A+ (y - A x) with A A+ = 1 on what is left. A measurement shown as an image of full size,
with a mask of what is known, is what a model is given that was trained on conditions (conditions.py).

Source: arXiv 2212.00490 (DDNM), equations 7 to 13.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from diffusion_lit.checks import check_count, check_number
from diffusion_lit.diffusion.conditions import join
from diffusion_lit.diffusion.degradations import cosines
from diffusion_lit.diffusion.images import to_grey
from diffusion_lit.diffusion.models import PixelModel

Project = Callable[[Tensor], Tensor]
"""Takes estimates (B, C, H, W) to ones that agree with what is known."""


@dataclass(frozen=True)
class Measurement:
    """A linear measurement of images.

    Args:
        task: Its task: inpaint, colorize, super_resolve or deblur.
        strength: How much it takes away, in the units of the task: pixels of a small image's squares, or of a blur.
        apply: A: images (B, C, H, W) to measurements.
        project: Measurements to the projection that agrees with them.
        show: Measurements as images (B, C, H, W), C being that of the model.
        known: Which pixels are known, shape (B or 1, 1, H, W); None for all.
    """

    task: str
    strength: float
    apply: Callable[[Tensor], Tensor]
    project: Callable[[Tensor], Project]
    show: Callable[[Tensor], Tensor]
    known: Tensor | None = None

    def condition_for(self, model: PixelModel, y: Tensor) -> Tensor | None:
        """The image that a model is given of measurements.

        Args:
            model: The model.
            y: Measurements, a row for each image.

        Returns:
            Condition images (B, C', H, W); None where the model is given no image, or was trained on another kind.
        """
        condition, shown = model.condition, self.show(y)
        if condition is None or not condition.fits(self.task, self.strength, shown.shape[-1]):
            return None
        known = shown.new_ones(1) if self.known is None else self.known.to(shown)
        return join(shown, known)


def known_pixels(known: Tensor) -> Measurement:
    """Some of the pixels.

    Args:
        known: 1 or True where a pixel is known, shape (B or 1, 1, H, W).

    Returns:
        The measurement; measurements are images, 0 in the hole.
    """

    def apply(x: Tensor) -> Tensor:
        return torch.where(known.to(x.device) != 0, x, 0.0)

    return Measurement("inpaint", 1.0, apply, lambda y: keep_known(y, known), apply, known)


def grey_of(channels: int = 3) -> Measurement:
    """The grey of colours; measurements have one channel."""
    return Measurement("colorize", 1.0, to_grey, keep_grey, lambda y: y.expand(-1, channels, -1, -1))


def small_of(factor: int) -> Measurement:
    """The means over squares.

    Args:
        factor: Side of a square in pixels, 2 or more.

    Returns:
        The measurement.
    """
    check_count(2, factor=factor)
    return Measurement(
        "super_resolve",
        factor,
        lambda x: avg_pool2d(x, factor),
        lambda y: keep_small(y, factor),
        lambda y: interpolate(y, scale_factor=factor),
    )


def blurred(sigma: float, height: int, width: int, cutoff: float = 1e-3) -> Measurement:
    """A Gaussian blur with mirrored edges, exact on the cosines of the pixels.

    Args:
        sigma: Its standard deviation in pixels, above 0.
        height: Height of the images in pixels.
        width: Their width.
        cutoff: The projection leaves frequencies alone of which less than this share is left.

    Returns:
        The measurement, as `Blur` degrades.
    """
    check_number(above=0, blur_sigma=sigma, hint=", in pixels")
    rows, columns = (_left(size, sigma) for size in (height, width))
    left = rows[:, None] * columns
    inverse = torch.where(left >= cutoff, 1 / left, 0.0)

    def filtered(x: Tensor, gain: Tensor) -> Tensor:
        up, across = cosines(height).to(x), cosines(width).to(x)
        return up.T @ (gain.to(x) * (up @ x @ across.T)) @ across

    def apply(x: Tensor) -> Tensor:
        return filtered(x, left)

    def project(y: Tensor) -> Project:
        return lambda x: x + filtered(y.to(x) - apply(x), inverse)

    return Measurement("deblur", sigma, apply, project, lambda y: y)


def _left(size: int, sigma: float) -> Tensor:
    """Share of each cosine that a blur of this width in pixels leaves, float64 (size,)."""
    return torch.exp(-0.5 * (math.pi * torch.arange(size, dtype=torch.float64) * sigma / size) ** 2)


def keep_known(images: Tensor, known: Tensor) -> Project:
    """The projection of inpainting: known pixels are those of the image, bit for bit.

    Args:
        images: Shape (B, C, H, W).
        known: Nonzero where a pixel is known, shape (B or 1, 1, H, W).

    Returns:
        The projection.
    """
    return lambda x: torch.where(known.to(x.device) != 0, images.to(x), x)


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
