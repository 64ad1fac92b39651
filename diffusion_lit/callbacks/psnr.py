"""How near the samples of a model of one image come to the image."""

from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from diffusion_lit.callbacks.samples import MOST
from diffusion_lit.checks import check_count, check_number
from diffusion_lit.diffusion.images import to_uint8
from diffusion_lit.evaluation.single_image import is_single, psnr_to


class ImagePSNR(Callback):
    """Logs the mean peak signal-to-noise ratio of samples against the one training image as `psnr`, in decibels.

    Above about 25 dB a sample looks like a copy. Without meaning for a model of patches or of several images, which
    trains without it.

    Args:
        count: Number of samples.
        seed: Seed of the first sample.
    """

    def __init__(self, count: int = 4, seed: int = 0) -> None:
        check_number(least=1, most=MOST, whole=True, count=count)
        check_count(0, seed=seed)
        self.count = count
        self.seed = seed
        self._suits: bool | None = None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the samples, from the average weights, and compares them; every rank draws the same."""
        if trainer.sanity_checking:
            return
        data, module = cast(Any, trainer).datamodule, cast(Any, pl_module)
        if self._suits is None:
            self._suits = is_single(data.reference_images("train"))
            if not self._suits:
                rank_zero_warn("This run trains without psnr: its training images are not all the same one.")
        if not self._suits:
            return
        image = torch.as_tensor(data.reference_images("train")[0])
        samples = module.generate(range(self.seed, self.seed + self.count))
        decibels = psnr_to(to_uint8(samples), image, data.random_flip).mean()
        pl_module.log("psnr", decibels.float(), prog_bar=True, batch_size=1, sync_dist=True)


PicturePSNR = ImagePSNR  # the name in older configurations
