"""Image of the samples most like a training image."""

from PIL import Image
from torch import Tensor

from diffusion_lit.report.images import grid_image


def pairs_image(triples: Tensor) -> Image.Image:
    """Two triples a row, worst first: the sample, its nearest training image, its nearest held-out image.

    Args:
        triples: From `diffusion_lit.evaluation.memorization.worst_triples`, uint8 (n, 3, C, H, W).

    Returns:
        The image.
    """
    return grid_image(triples.flatten(0, 1).float() / 127.5 - 1, columns=6)
