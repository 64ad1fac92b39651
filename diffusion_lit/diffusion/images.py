"""Images as bytes, as batches and without colour: rounding to uint8, rows of an array, grey, PSNR."""

from typing import Any

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)


def to_uint8(images: Tensor) -> Tensor:
    """Rounds images to bytes.

    Args:
        images: Images of any shape, values in [-1, 1]; what overshoots is clipped.

    Returns:
        The same shape in uint8 on the CPU, -1 as 0 and 1 as 255.

    Raises:
        ValueError: If a value is not finite, of which no image and no figure can be made.
    """
    finite = torch.isfinite(images)
    if not finite.all():
        raise ValueError(
            f"{int((~finite).sum()):,} of {finite.numel():,} values of the images are not finite (NaN or infinite), so "
            "that they show and measure nothing; take an earlier checkpoint if its weights are ruined, and another "
            "sampler or more steps if they are not."
        )
    return images.float().mul(127.5).add(127.5).round().clamp(0, 255).to("cpu", torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """The inverse of `to_uint8`: float32 images in [-1, 1] on the device that they are on."""
    return images.float() / 127.5 - 1


def to_grey(images: Tensor) -> Tensor:
    """The grey of colours by ITU-R BT.601, which is the mode L of image files.

    Args:
        images: Shape (B, 3, H, W).

    Returns:
        Shape (B, 1, H, W).
    """
    weights = images.new_tensor(LUMA).reshape(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def take(images: Any, rows: Tensor) -> Tensor:
    """Some images of an array-like.

    Args:
        images: A tensor or an array (N, C, H, W), such as a memory map.
        rows: Indices int64 (B,), rising for a memory map's sake.

    Returns:
        The images (B, C, H, W) as a tensor.
    """
    return images[rows] if isinstance(images, Tensor) else torch.as_tensor(images[rows.numpy()])


def psnr(x_hat: Tensor, x: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image.

    Args:
        x_hat: Images (B, C, H, W), uint8, or floating point in [-1, 1].
        x: What they should be, of the same type and of the same shape or that of one image.

    Returns:
        10 log10(range^2 / mean squared error) in dB, float32 (B,); at most 100.
    """
    span = 2.0 if x_hat.is_floating_point() else 255.0
    error = ((x_hat.float() - x.float()) / span).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp(min=1e-10))
