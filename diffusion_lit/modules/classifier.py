"""A classifier of a data set, whose features serve to measure samples."""

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import functional as F

from diffusion_lit.checks import check_count, check_number
from diffusion_lit.diffusion.rng import keyed_generator, run_seed
from diffusion_lit.modules.base import BaseModule
from diffusion_lit.nets.classifier import ConvClassifier


class Classifier(BaseModule):
    """Trains a classifier by cross-entropy; its checkpoint is an extractor for `evaluate` and for the FID callback.

    Args:
        net: The network.
        label_smoothing: Share in [0, 1) of the target that is spread over all classes.
        shift: Training images are moved by up to this many pixels in each direction, the border filled with -1.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning-rate schedule from the optimizer, stepped each training step.

    Raises:
        ValueError: If `shift` is negative or `label_smoothing` no share.
    """

    def __init__(
        self,
        net: ConvClassifier,
        label_smoothing: float = 0.05,
        shift: int = 0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        check_count(0, shift=shift)
        check_number(least=0, below=1, label_smoothing=label_smoothing)
        self.net = net
        self.label_smoothing = label_smoothing
        self.shift = shift

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch `{"image": (B, C, H, W) in [-1, 1], "label": (B,)}`."""
        images, labels = self._shifted(batch["image"], batch_idx), self._labels(batch)
        logits = self.net(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        accuracy = (logits.argmax(1) == labels).float().mean()
        self.log_step({"train/loss": loss.detach(), "train/accuracy": accuracy}, len(labels))
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Records the network's arguments, from which an extractor builds it."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["classifier"] = dict(self.net.config)

    def held_out(self, split: str, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs loss and accuracy; see `BaseModule.held_out`."""
        labels = self._labels(batch)
        logits = self.net(batch["image"])
        figures = {
            f"{split}/loss": F.cross_entropy(logits, labels),
            f"{split}/accuracy": (logits.argmax(1) == labels).float().mean(),
        }
        self.log_dict(figures, prog_bar=True, batch_size=len(labels), sync_dist=True)

    def _labels(self, batch: dict[str, Tensor]) -> Tensor:
        if "label" not in batch:
            raise ValueError("A classifier needs labels, and this data has none; leave use_labels true.")
        return batch["label"]

    def _shifted(self, images: Tensor, batch_idx: int) -> Tensor:
        """Shifts each image by a random whole number of pixels, keyed for the global batch."""
        if self.shift == 0:
            return images
        world, rank = self.ranks
        count, _, height, width = images.shape
        generator = keyed_generator("shift", run_seed(), self.current_epoch, batch_idx)
        corner = torch.randint(2 * self.shift + 1, (count * world, 2), generator=generator)[rank::world].to(
            images.device
        )
        padded = F.pad(images, (self.shift,) * 4, value=-1.0).permute(0, 2, 3, 1)
        rows = corner[:, 0, None] + torch.arange(height, device=images.device)
        columns = corner[:, 1, None] + torch.arange(width, device=images.device)
        image = torch.arange(count, device=images.device)[:, None, None]
        return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
