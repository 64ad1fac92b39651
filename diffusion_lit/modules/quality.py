"""Structural similarity of reconstructions, and how much of a latent is in use."""

from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

ACTIVE_VARIANCE = 0.01


def ssim(x_hat: Tensor, x: Tensor) -> Tensor:
    """Mean structural similarity of images, with Gaussian windows of 11 pixels.

    Args:
        x_hat: Reconstructions (B, C, H, W) in [-1, 1], H and W at least 6.
        x: Images of the same shape.

    Returns:
        A scalar, 1 for equal images.

    Source: Wang 2004, Image quality assessment: from error visibility to structural similarity.
    """
    made = structural_similarity_index_measure(x_hat.float(), x.float(), data_range=(-1.0, 1.0))
    assert isinstance(made, Tensor)
    return made


def active_channels(sums: Tensor) -> Tensor:
    """Number of active latent channels.

    A channel is active where the variance over images of its posterior mean, averaged over positions, is above 0.01.

    Args:
        sums: Number, sum and sum of squares of the means over images, shape (3, c, h, w).

    Returns:
        Their number, a scalar.

    Source: Burda 2016, arXiv 1509.00519, section 5.2 (of single units; 0.01 is its threshold).
    """
    count, total, squares = sums
    variance = squares / count - (total / count).square()
    active: Tensor = variance.mean(dim=(1, 2)) > ACTIVE_VARIANCE
    return active.sum()
