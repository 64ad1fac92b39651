"""The exponential moving average of the weights, from which samples and metrics come.

Built on Lightning's `WeightAveraging`: a checkpoint's `state_dict` holds the average, `current_model_state` the raw
weights. Three things differ. The average stands in during the whole of validation (from `on_validation_start` to
`on_validation_end`), so every other callback sees it wherever it is listed; the raw weights come back when validation
fails; and they are left in place at the end of training.
"""

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class EMA(WeightAveraging):
    """Averages the weights with a half-life counted in training images, ramped up at the start.

    After each step of B images the average moves by `1 - beta` towards the raw weights, with
    `beta = 0.5 ^ (B / min(half_life, ramp_up * images seen))` (Karras 2022, arXiv 2206.00364, appendix F.2), or with a
    fixed `decay` where one is given.

    Args:
        half_life: Images after which an old weight counts half.
        ramp_up: The half-life is at most this share of the images seen so far, so that the random start is soon
            forgotten; `null` for none.
        decay: A fixed beta in [0, 1) per step instead of a half-life.
    """

    def __init__(self, half_life: float = 50_000, ramp_up: float | None = 0.05, decay: float | None = None) -> None:
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"EMA decay is {decay}; it must be at least 0 and below 1.")
        if half_life <= 0:
            raise ValueError(f"EMA half_life is {half_life} images; it must be above 0.")
        self.half_life = half_life
        self.ramp_up = ramp_up
        self.decay = decay
        self._images_seen = 0
        self._batch_size = 1
        self._swapped = False
        super().__init__(use_buffers=False, multi_avg_fn=self._average)

    def beta(self) -> float:
        """The weight of the old average at this step, in [0, 1)."""
        if self.decay is not None:
            return self.decay
        half_life = self.half_life
        if self.ramp_up is not None:
            half_life = min(half_life, self.ramp_up * self._images_seen)
        return math.exp2(-self._batch_size / max(half_life, 1e-8))

    @torch.no_grad()
    def _average(self, averages: Any, currents: Any, num_averaged: Any) -> None:
        torch._foreach_lerp_(list(averages), list(currents), 1 - self.beta())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Counts the images and moves the average after each optimizer step."""
        images = next(iter(batch.values())).shape[0] * trainer.world_size
        self._images_seen += images
        self._batch_size = images * trainer.accumulate_grad_batches
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the average in the place of the raw weights."""
        if self._average_model is not None and not self._swapped:
            self._swap_models(pl_module)
            self._swapped = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the raw weights back."""
        if self._swapped:
            self._swap_models(pl_module)
            self._swapped = False

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: the average has stood in since `on_validation_start`."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: the average stands in until `on_validation_end`."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Puts the raw weights back when validation failed, before anything is saved."""
        self.on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: the raw weights stay; the checkpoint holds both."""

    def state_dict(self) -> dict[str, Any]:
        """The counters that a resumed run needs."""
        return {**super().state_dict(), "images_seen": self._images_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the counters."""
        super().load_state_dict(state_dict)
        self._images_seen = state_dict["images_seen"]
