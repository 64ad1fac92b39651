"""What an image-conditioned network is given: an image, and a mask of where it is known, as further channels.

    condition = (given (B, C', H, W), known (B, 1, H, W)),    and zeros, nothing known, for the null condition

In training `given` is made of the clean image by a degradation, or comes with it from the data. Samples of the training
set lose their condition with a probability, so that the network learns the null condition too and guidance has an
unconditional branch.

Source: Saharia et al. 2021 (arXiv 2104.07636), section 2, and 2022 (arXiv 2111.05826), for the concatenation; Ho and
Salimans 2022 (arXiv 2207.12598) for the dropout.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusion_lit.checks import check_count, check_share
from diffusion_lit.diffusion.degradations import Degradation


def join(given: Tensor, known: Tensor) -> Tensor:
    """A condition of its two parts.

    Args:
        given: Images (B, C', H, W).
        known: 1 where they are known, 0 elsewhere, of a shape that broadcasts to (B, 1, H, W).

    Returns:
        Shape (B, C' + 1, H, W).
    """
    return torch.cat([given, known.to(given).expand(len(given), 1, *given.shape[2:])], dim=1)


class ConditionDraws(NamedTuple):
    """The random draws of conditions.

    Attributes:
        share: How far an image is degraded, uniform in [0, 1), shape (B,).
        map: Standard normal map, shape (B, 1, H, W).
    """

    share: Tensor
    map: Tensor


class ImageCondition(nn.Module, ABC):
    """Base class: how an image becomes what the network is given of it.

    Args:
        dropout: Probability in [0, 1] of training a sample with the null condition.

    Raises:
        ValueError: If `dropout` is no probability.
    """

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        check_share(dropout=dropout)
        self.dropout = dropout

    @abstractmethod
    def channels(self, image_channels: int) -> int:
        """Channels of a condition, which the network's `condition_channels` must be.

        Args:
            image_channels: Channels of an image.

        Returns:
            Those of the given image and one of the mask.
        """

    @abstractmethod
    def forward(self, images: Tensor, other: Tensor | None, draws: ConditionDraws) -> Tensor:
        """The conditions of images.

        Args:
            images: Clean images (B, C, H, W) in [-1, 1].
            other: The images that the data pairs with them, (B, C', H, W), or None.
            draws: What chance decides.

        Returns:
            Shape (B, channels, H, W).
        """

    def fits(self, task: str, strength: float, size: int) -> bool:
        """Whether it is a measurement of this kind that the network is trained on.

        Args:
            task: inpaint, colorize, super_resolve or deblur.
            strength: Pixels of a square or a blur.
            size: Side of the images in pixels.

        Returns:
            No, here.
        """
        return False


class DegradedImage(ImageCondition):
    """The image itself, degraded.

    Args:
        degradation: What is done to it.
        steps: First and last step of the degradation, of which each image draws one; by default the last alone.
        dropout: Probability in [0, 1] of training a sample with the null condition.

    Raises:
        ValueError: If there are no such steps, or `dropout` is no probability.
    """

    def __init__(self, degradation: Degradation, steps: tuple[int, int] | None = None, dropout: float = 0.1) -> None:
        super().__init__(dropout)
        last = degradation.num_steps
        first, last = (last, last) if steps is None else steps
        check_count(0, steps=first)
        check_count(max(1, first), steps=last)
        if last > degradation.num_steps:
            raise ValueError(
                f"steps is {(first, last)}, but {type(degradation).__name__} has {degradation.num_steps}; end there."
            )
        self.degradation, self.steps = degradation, (first, last)

    def channels(self, image_channels: int) -> int:
        """See `ImageCondition.channels`."""
        return image_channels + 1

    def forward(self, images: Tensor, other: Tensor | None, draws: ConditionDraws) -> Tensor:
        """See `ImageCondition.forward`."""
        first, last = self.steps
        t = (first + (draws.share * (last - first + 1)).long()).clamp(max=last)
        return join(self.degradation(images, t, draws.map), self.degradation.known(images, t, draws.map))

    def fits(self, task: str, strength: float, size: int) -> bool:
        """See `ImageCondition.fits`; strengths within a percent of those that are trained on count."""
        if self.degradation.task != task:
            return False
        strengths = self.degradation.strengths(size)
        if strengths is None:
            return True
        first, last = (float(strengths[step]) for step in self.steps)
        return 0.99 * first <= strength <= 1.01 * last


class PairedImage(ImageCondition):
    """The image that the data pairs with each one; see `datamodules.PairedFolder`.

    Args:
        channels: Its channels.
        dropout: Probability in [0, 1] of training a sample with the null condition.

    Raises:
        ValueError: If there is no channel, or `dropout` is no probability.
    """

    def __init__(self, channels: int = 3, dropout: float = 0.1) -> None:
        super().__init__(dropout)
        check_count(channels=channels)
        self.given_channels = channels

    def channels(self, image_channels: int) -> int:
        """See `ImageCondition.channels`."""
        return self.given_channels + 1

    def forward(self, images: Tensor, other: Tensor | None, draws: ConditionDraws) -> Tensor:
        """See `ImageCondition.forward`."""
        if other is None:
            raise ValueError(
                "The model is given the image that the data pairs with each one, and the data has none; use "
                "datamodules.PairedFolder."
            )
        wanted = (self.given_channels, *images.shape[2:])
        if other.shape[1:] != wanted:
            raise ValueError(
                f"The data pairs each image with one of shape {tuple(other.shape[1:])}, and the model is given "
                f"{wanted}; make the condition's channels the data's given_channels, and the network's "
                "condition_channels one more."
            )
        return join(other, other.new_ones(1))
