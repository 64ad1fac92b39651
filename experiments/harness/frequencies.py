"""Frequency bands (by the DCT) and tiles of an image, and the step at which an error settles.

A band is a ring of the orthonormal DCT-II, in cycles per image: coefficient (i, j) has the frequency
sqrt(i^2 + j^2) / 2. By Parseval the powers of all bands and of the mean add up to the image's sum of squares.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from diffusion_lit.diffusion.degradations import cosines


def band_edges(size: int, bands: int) -> list[float]:
    """Where bands begin and end, in cycles per image; the last ends in the corner, beyond size / 2.

    Args:
        size: Side of the images.
        bands: Number of bands, of equal width up to size / 2.

    Returns:
        Their bands + 1 edges. The mean of an image (0 cycles) is in none.
    """
    return [*(size / 2 * band / bands for band in range(bands)), size / math.sqrt(2)]


def band_masks(size: int, bands: int) -> Tensor:
    """Which coefficients are in which band, (bands, size, size) of 0 and 1."""
    k = torch.arange(size) / 2  # cycles per image
    radius = (k[:, None] ** 2 + k**2).sqrt()
    edges = torch.tensor(band_edges(size, bands))
    edges[-1] = torch.inf
    return torch.stack([(radius > low) & (radius <= high) for low, high in pairwise(edges)]).float()


def band_power(x: Tensor, masks: Tensor) -> Tensor:
    """The sum of squared cosine coefficients of images (N, C, H, W) in each band, (N, bands)."""
    matrix = cosines(x.shape[-1]).to(x)
    power = (matrix @ x @ matrix.T).square().sum(1)
    return torch.einsum("nhw,bhw->nb", power, masks.to(x))


def tile_mean(x: Tensor, tiles: int, each: bool = False) -> Tensor:
    """The mean over each tile of images (N, C, H, W): (N, tiles^2), or of `each` channel (N, C, tiles^2)."""
    means = adaptive_avg_pool2d(x, tiles).flatten(2)
    return means if each else means.mean(1)


def settled(errors: Tensor, tolerance: float) -> Tensor:
    """The first step from which on an error stays within the tolerance.

    Args:
        errors: Shape (S, ...), of the steps in their order.
        tolerance: The tolerance.

    Returns:
        Steps int64 (...), S where the last one is still beyond it.
    """
    beyond = errors > tolerance
    steps = torch.arange(1, len(errors) + 1).reshape(-1, *[1] * (errors.ndim - 1))
    return (beyond * steps).amax(0)
