"""Condition images of a module: in training, of held-out images, and of samples.

Draws are keyed as all others are: in training for the global batch, of which each rank takes its rows, of held-out
images by their row, and of samples by their seed. The sample of seed s is given held-out image s, modulo their number:
of the validation split in training, of the test split afterwards.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from diffusion_lit.diffusion.conditions import ConditionDraws, DegradedImage, ImageCondition
from diffusion_lit.diffusion.generate import Sampling, StepCallback
from diffusion_lit.diffusion.images import from_uint8, take
from diffusion_lit.diffusion.models import PixelModel
from diffusion_lit.diffusion.rng import BLOCK, drawn_by_index, keyed_generator
from diffusion_lit.modules.protocols import HasImages, HasPairs
from diffusion_lit.runtime.internals import data_of, trainer_of

PAIR = "given"  # of a batch: the image that the data pairs with each one


class Source(NamedTuple):
    """Held-out images that samples are given: uint8 (N, C, H, W), what the data pairs with them, and their split."""

    images: Any
    pairs: Any
    split: str


def as_given(model: object) -> "GivenImages | None":
    """The model if its samples are given images, else None."""
    return model if isinstance(model, GivenImages) and model.condition is not None else None


class GivenImages(PixelModel):
    """Draws and passes condition images for a module that has a `condition`; without one nothing changes."""

    def take_condition(self, condition: ImageCondition | None) -> None:
        """Takes the condition, and checks that it suits the network.

        Args:
            condition: What the network is given, or None.

        Raises:
            ValueError: If the network has other channels for it.
        """
        self.condition = condition
        self._source: Callable[[], Source | None] = lambda: None  # a closure, which the EMA's deepcopy shares
        told = self.denoiser.condition_channels
        wanted = 0 if condition is None else condition.channels(self.x_shape[0])
        if told != wanted:
            name = "none" if condition is None else type(condition).__name__
            raise ValueError(
                f"The network has condition_channels {told}, but the condition ({name}) needs {wanted}; set the "
                f"network's condition_channels to {wanted}, or change condition."
            )

    def give(self, data: HasImages, split: str = "test") -> None:
        """Sets the data set whose images samples are given.

        Args:
            data: A data module, set up.
            split: Its split; where that has no image, those of validation stand in, and then those of training.
        """

        def source() -> Source:
            chosen = next((one for one in (split, "val", "train") if len(data.reference_images(one))), split)
            pairs = data.reference_pairs(chosen) if isinstance(data, HasPairs) else None
            return Source(data.reference_images(chosen), pairs, chosen)

        self._source = source

    def source(self) -> Source:
        """The held-out images that samples are given.

        Returns:
            As `give` said; in training those of the validation split, or of the training split if none is held out.

        Raises:
            ValueError: If there are none.
        """
        given = self._source()
        data = data_of(trainer_of(cast(LightningModule, self)))
        if given is None and isinstance(data, HasImages):
            self.give(data, "val")
            given = self._source()
        if given is None or len(given.images) == 0:
            raise ValueError(
                "The model is given an image and there is none: give it data by `give`, or condition images by "
                "`condition`."
            )
        return given

    def told(self) -> str:
        """What samples are given, in words; empty for a model without a condition."""
        if self.condition is None:
            return ""
        kind = type(self.condition.degradation).__name__ if isinstance(self.condition, DegradedImage) else None
        how = "its pair" if kind is None else f"it degraded by {kind}"
        return f"sample with seed s is given {how}, image s of the {self.source().split} split"

    def training_condition(
        self, images: Tensor, pair: Tensor | None, ranks: tuple[int, int], *key: int | str
    ) -> Tensor | None:
        """The conditions of a training batch, some of them null.

        Args:
            images: This rank's images (B, C, H, W).
            pair: What the data pairs with them, or None.
            ranks: Number of ranks, and this one.
            key: Names the draw, which is made for the global batch.

        Returns:
            Shape (B, C', H, W), or None.
        """
        if self.condition is None:
            return None
        world, rank = ranks
        generator = keyed_generator("condition", *key, device=images.device)
        total, rows = len(images) * world, slice(rank, None, world)
        drawn = torch.rand(2, total, generator=generator, device=images.device)[:, rows]
        noise = torch.randn(total, 1, *images.shape[2:], generator=generator, device=images.device)[rows]
        condition: Tensor = self.condition(images, pair, ConditionDraws(drawn[0], noise))
        return condition * (drawn[1] >= self.condition.dropout).to(condition)[:, None, None, None]

    def held_out_condition(self, images: Tensor, pair: Tensor | None, index: Tensor, split: str) -> Tensor | None:
        """The conditions of held-out images, none of them null.

        Args:
            images: Shape (B, C, H, W).
            pair: What the data pairs with them, or None.
            index: Their rows in the split, int64 (B,), on the images' device.
            split: The split.

        Returns:
            Shape (B, C', H, W), or None.
        """
        if self.condition is None:
            return None
        size = images.shape[2:]
        share = drawn_by_index(index, lambda draw: torch.rand(BLOCK, generator=draw), split, "share")
        noise = drawn_by_index(index, lambda draw: torch.randn(BLOCK, 1, *size, generator=draw), split, "map")
        condition: Tensor = self.condition(images, pair, ConditionDraws(share, noise))
        return condition

    def conditions(
        self, seeds: Sequence[int], images: Tensor | None = None, pairs: Tensor | None = None
    ) -> Tensor | None:
        """The conditions of samples.

        Args:
            seeds: One seed per sample.
            images: The images that they are given, (B, C, H, W) in [-1, 1]; by default those of `source`.
            pairs: What the data pairs with them.

        Returns:
            Shape (B, C', H, W), each a function of its seed and its image; None for a model that is given no image.
        """
        if self.condition is None:
            return None
        if images is None:
            images, pairs = self.originals(seeds)
        size = images.shape[2:]
        draws = [keyed_generator("condition", int(seed)) for seed in seeds]
        share = torch.cat([torch.rand(1, generator=draw) for draw in draws])
        noise = torch.cat([torch.randn(1, 1, *size, generator=draw) for draw in draws])
        device = next(self.parameters()).device
        drawn = ConditionDraws(share.to(device), noise.to(device))
        condition: Tensor = self.condition(images.to(device), None if pairs is None else pairs.to(device), drawn)
        return condition

    def originals(self, seeds: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """The held-out images that samples are given, before they are degraded, and their pairs.

        Args:
            seeds: One seed per sample.

        Returns:
            Images (B, C, H, W) in [-1, 1], and what the data pairs with them or None.
        """
        given = self.source()
        rows = torch.tensor([int(seed) % len(given.images) for seed in seeds])
        found = [
            None if array is None else from_uint8(torch.stack([take(array, row[None])[0] for row in rows]))
            for array in (given.images, given.pairs)
        ]
        return cast(Tensor, found[0]), found[1]

    def generate(
        self,
        seeds: Sequence[int],
        labels: Tensor | None = None,
        sampling: Sampling | None = None,
        callback: StepCallback | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Draws one image per seed, each given its condition; see `PixelModel.generate` and `conditions`."""
        if condition is None:
            condition = self.conditions(seeds)
        return super().generate(seeds, labels, sampling, callback, condition)
