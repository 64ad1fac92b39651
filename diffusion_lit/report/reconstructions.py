"""Images of reconstructions: inputs, reconstructions and differences."""

import torch
from PIL import Image
from torch import Tensor

from diffusion_lit.report.images import titled_grid

GAIN = 3.0  # factor on differences, most of which would be invisible otherwise


def difference(made: Tensor, images: Tensor) -> Tensor:
    """The differences of images to others, as images.

    Args:
        made: Images (B, C, H, W) in [-1, 1] up to overshoot.
        images: Images of the same shape.

    Returns:
        Three times the difference in [-1, 1]: grey where there is none, bright where `made` is brighter.
    """
    return ((made.clamp(-1, 1) - images) * GAIN / 2).clamp(-1, 1)


def differences_image(pairs: Tensor) -> Image.Image:
    """A row each of inputs, reconstructions and differences.

    Args:
        pairs: Images beside their reconstructions (n, 2, C, H, W) in [-1, 1].
    """
    images, made = pairs.unbind(1)
    rows: list[list[Tensor]] = [list(torch.unbind(row)) for row in (images, made, difference(made, images))]
    return titled_grid(rows, names=["input", "reconstruction", f"difference x {GAIN:g}"])
