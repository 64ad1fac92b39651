"""Image of the samples most like a training image."""

from PIL import Image
from torch import Tensor

from diffusion_lit.diffusion.images import from_uint8
from diffusion_lit.report.images import titled_grid


def pairs_image(triples: Tensor) -> Image.Image:
    """Two triples a row, worst first: the sample, its nearest training image, its nearest held-out image.

    Args:
        triples: From `diffusion_lit.evaluation.memorization.worst_triples`, uint8 (n, 3, C, H, W).
    """
    images = from_uint8(triples).flatten(0, 1)
    rows = [list(images[start : start + 6]) for start in range(0, len(images), 6)]
    return titled_grid(rows, headings=["sample", "nearest training", "nearest held-out"] * (len(rows[0]) // 3))
