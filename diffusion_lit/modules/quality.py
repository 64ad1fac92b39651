"""Structural similarity of reconstructions, and how much of the latents is in use."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from diffusion_lit.nets.bottlenecks import Bottleneck

ACTIVE_VARIANCE = 0.01
MOST_CODES = 2**20  # that are counted


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


class LatentUse:
    """How much of the latents is in use over the images of a validation: active channels, and perplexity of codes."""

    def __init__(self) -> None:
        self._moments: Tensor | None = None
        self._counts: Tensor | None = None

    def add(self, means: Tensor, bottleneck: Bottleneck | None) -> None:
        """Counts a batch.

        Args:
            means: Means of the latents (B, c, h, w).
            bottleneck: The autoencoder's, or None.
        """
        means = means.detach()
        exact = means.double() if means.device.type != "mps" else means
        sums = torch.stack([torch.ones_like(exact[0]) * len(exact), exact.sum(0), exact.square().sum(0)])
        self._moments = sums if self._moments is None else self._moments + sums
        if bottleneck is not None and 0 < bottleneck.count <= MOST_CODES:
            seen = torch.bincount(bottleneck.index(means).flatten(), minlength=bottleneck.count)
            self._counts = seen if self._counts is None else self._counts + seen

    def figures(self, over_ranks: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The figures since the last call.

        Args:
            over_ranks: Sums a tensor over ranks.

        Returns:
            `active_channels` and, of codes, `code_perplexity`: exp of the entropy of their frequencies, at most their
            number; none where nothing was counted.
        """
        if self._moments is None:
            return {}
        found = {"active_channels": active_channels(over_ranks(self._moments)).float()}
        if self._counts is not None:
            shares = over_ranks(self._counts).float()
            found["code_perplexity"] = torch.special.entr(shares / shares.sum()).sum().exp()
        self._moments = self._counts = None
        return found


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
