"""Condition images, the samples drawn from them, and the original images, in three rows."""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from diffusion_lit.modules.given import GivenImages
from diffusion_lit.report.images import titled_grid


def given_sheet(module: GivenImages, seeds: Sequence[int], samples: Tensor) -> Image.Image:
    """Lays out condition images, samples and originals.

    Args:
        module: A model with a part `condition`, which has held-out images.
        seeds: One seed per sample.
        samples: Samples (B, C, H, W) in [-1, 1].

    Returns:
        Three rows: given, sample, image.
    """
    images, pairs = module.originals(seeds)
    conditions = module.conditions(seeds, images, pairs)
    assert conditions is not None
    given = conditions[:, :-1].cpu()
    channels = max(given.shape[1], samples.shape[1])
    rows = [list(row.cpu().expand(-1, channels, -1, -1)) for row in (given, samples, images)]
    return titled_grid(rows, ["given", "sample", "image"])
