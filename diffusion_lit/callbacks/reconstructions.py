"""Callbacks for autoencoders: reconstructions, interpolations, and the FID of reconstructions."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from diffusion_lit.callbacks.fid import FID, too_few_images
from diffusion_lit.callbacks.samples import MOST, DrawingCallback, check_size
from diffusion_lit.checks import check_count, check_number
from diffusion_lit.diffusion.images import from_uint8, take
from diffusion_lit.evaluation.features import FeatureExtractor
from diffusion_lit.modules.latent import LatentDiffusion
from diffusion_lit.modules.protocols import HasImages, Interpolates, Reconstructs
from diffusion_lit.report.images import grid_image
from diffusion_lit.report.reconstructions import difference
from diffusion_lit.runtime.internals import data_of
from diffusion_lit.runtime.ranks import rank_zero_alone
from diffusion_lit.words import short_count


class Reconstructions(DrawingCallback):
    """Held-out images above their reconstructions, and these above the differences, three times enlarged.

    Args:
        count: Number of images.
        columns: Number of columns.
        every: Draws at every n-th validation; 0 for never.
    """

    def __init__(self, count: int = 24, columns: int = 12, every: int = 1) -> None:
        super().__init__(every)
        check_number(least=1, most=MOST, whole=True, count=count)
        check_count(columns=columns)
        self.count = count
        self.columns = columns

    def show(self, trainer: Trainer, module: LightningModule) -> None:
        """Draws rows of images, each above the rows of what became of them and of the differences."""
        if not isinstance(module, Reconstructs):
            return
        images = real_images(trainer, self.count).to(module.device)
        made = rank_zero_alone(lambda: module.reconstruct(images), "reconstructions")
        if made is None:
            return
        columns = min(self.columns, len(images))
        rows = [part for start in range(0, len(images), columns) for part in _above(images, made, start, columns)]
        self.write(trainer, "reconstructions", "reconstructions", grid_image(torch.cat(rows), columns))


class Interpolations(DrawingCallback):
    """Decoded linear interpolations between the latents of pairs of images: held-out ones where there are two.

    Args:
        rows: Number of pairs.
        columns: Number of images along a way, the reconstructions of its ends among them.
        every: Draws at every n-th validation; 0 for never.
    """

    def __init__(self, rows: int = 6, columns: int = 9, every: int = 1) -> None:
        super().__init__(every)
        check_count(rows=rows)
        check_count(2, columns=columns)
        check_size(type(self).__name__, rows, columns)
        self.rows = rows
        self.columns = columns

    def show(self, trainer: Trainer, module: LightningModule) -> None:
        """Draws a row for each pair."""
        if not isinstance(module, Interpolates):
            return
        images = real_images(trainer, 2 * self.rows, least=2).to(module.device)
        half = len(images) // 2
        if not half:
            return  # the only image there is has no other to go to
        shares = torch.linspace(0, 1, self.columns, device=module.device)
        pairs = (images[:half], images[half : 2 * half])
        made = rank_zero_alone(lambda: module.interpolate(*pairs, shares), "interpolations")
        if made is None:
            return
        self.write(trainer, "interpolations", "interpolations", grid_image(made.flatten(0, 1), self.columns))


class ReconstructionFID(FID):
    """The Fréchet distance of reconstructed held-out images to the training images: `rfid_inception_5k`.

    The score of a perfect model of the latents, with the extractor, reference and code of the samples' FID. A frozen
    autoencoder is measured once.

    Args:
        extractor: What images are compared by.
        num_samples: Number of held-out images; all there are where there are fewer.
        held_out: Split of the images that are reconstructed.
        options: Further arguments of `FID`.
    """

    def __init__(
        self, extractor: FeatureExtractor, num_samples: int = 1000, held_out: str = "val", **options: Any
    ) -> None:
        super().__init__(extractor, num_samples, seed=0, **options)
        self.held_out = held_out
        self._measured: Tensor | None = None

    @property
    def tag(self) -> str:
        """Name of the metric, such as `rfid_inception_5k`."""
        return f"r{self.extractor.metric}_{short_count(self.num_samples)}"

    def may_log(self, name: str) -> bool:
        """Whether a figure is this one at some number of images: at fewer than asked for, where there are fewer."""
        return name.startswith(f"r{self.extractor.metric}_")

    def draw(self, trainer: Trainer, module: LightningModule, rows: Tensor) -> Tensor:
        """Reconstructions of some of the held-out images; see `FID.draw`."""
        assert isinstance(module, Reconstructs)
        return module.reconstruct(real_images(trainer, self.num_samples, self.held_out, rows).to(module.device))

    def measure(self, trainer: Trainer, module: LightningModule) -> Tensor:
        """The distance, taken once where the autoencoder is not in training; see `FID.measure`."""
        if self._measured is None or not (isinstance(module, LatentDiffusion) and module.autoencoder_is_frozen):
            self._measured = super().measure(trainer, module)
        return self._measured

    def problem(self, trainer: Any, module: LightningModule) -> str | None:
        """Why it cannot be measured, or None; takes as many images as there are."""
        data = data_of(trainer)
        if not isinstance(module, Reconstructs) or not isinstance(data, HasImages):
            return f"{type(module).__name__} on {type(data).__name__} reconstructs no images"
        problem = too_few_images(trainer, data, self.held_out) or too_few_images(trainer, data, self.split)
        if problem is None:
            self.num_samples = min(self.num_samples, len(data.reference_images(self.held_out)))
        return problem


def real_images(trainer: Any, count: int, split: str = "val", rows: Tensor | None = None, least: int = 1) -> Tensor:
    """Images of a split, spread evenly over it.

    Args:
        trainer: The trainer, whose data has them.
        count: Number of images; all there are where there are fewer.
        split: "train", "val" or "test".
        rows: Which of the `count`; all by default.
        least: The training split stands in for a split of fewer images.

    Returns:
        Images (B, C, H, W) in [-1, 1] on the CPU.
    """
    data = trainer.datamodule
    images = data.reference_images(split)
    images = images if len(images) >= least else data.reference_images("train")
    count = min(count, len(images))
    chosen = torch.arange(count) * len(images) // count
    return from_uint8(take(images, chosen if rows is None else chosen[rows]))


def _above(images: Tensor, made: Tensor, start: int, columns: int) -> list[Tensor]:
    """Interleaves rows of images with the rows below, padding the last with white."""
    rows = []
    for part in (images, made, difference(made, images)):
        row = part[start : start + columns]
        rows.append(torch.cat([row, torch.ones_like(row[:1]).expand(columns - len(row), -1, -1, -1)]))
    return rows
