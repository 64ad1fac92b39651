"""The exponential moving average (EMA) of the weights, which sampling and metrics use.

Built on Lightning's `WeightAveraging`: a checkpoint's `state_dict` holds the average, `current_model_state` the raw
weights. Four things differ. The average is in place during the whole of validation (`on_validation_start` to
`on_validation_end`), so that all callbacks see it, whatever their order; the raw weights are restored if validation
fails, and stay in place at the end of training; frozen weights are shared, not copied. With `sigma_rel` several
averages of different widths are kept; validation uses the first.
"""

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from diffusion_lit.checks import check_count, check_number
from diffusion_lit.diffusion.averaging import exponent, power_beta
from diffusion_lit.modules.base import BaseModule
from diffusion_lit.modules.labels import class_names_of
from diffusion_lit.runtime.internals import data_of
from diffusion_lit.runtime.ranks import images_of
from diffusion_lit.runtime.run_folder import WritesToRunFolder, run_folder
from diffusion_lit.storage.snapshots import Snapshots

AVERAGES = (WeightAveraging, StochasticWeightAveraging)


class EMA(WritesToRunFolder, WeightAveraging):
    """Averages the weights with a half-life counted in training images, ramped up at the start.

    After each step of B images the average moves by `1 - beta` towards the raw weights, with `beta = 0.5 ^ (B /
    min(half_life, ramp_up * images seen))` (Karras 2022, arXiv 2206.00364, appendix F.2), or with a fixed `decay`. With
    `sigma_rel` the averages have power-function profiles of these relative widths (`diffusion.averaging`), and their
    snapshots, in the run's folder `averages/`, give the average of any other width after training: `python -m
    experiments.posthoc_ema`.

    Args:
        half_life: Images after which an old weight counts half; `null` with `decay` or `sigma_rel`, which go before it.
        ramp_up: The half-life is at most this share of the images seen so far, so that the random start is soon
            forgotten; `null` for none.
        decay: A fixed beta in [0, 1) per step instead of a half-life.
        sigma_rel: Widths of power-function averages relative to the training time, such as [0.05, 0.1], instead of a
            half-life; samples and metrics come from the first.
        snapshot_every: Writes the power-function averages to `averages/` every this many steps; 0 for never.

    Raises:
        ValueError: If a number is out of range or two kinds of average are asked for.
    """

    def __init__(
        self,
        half_life: float | None = 50_000,
        ramp_up: float | None = 0.05,
        decay: float | None = None,
        sigma_rel: list[float] | None = None,
        snapshot_every: int = 0,
    ) -> None:
        check_number(least=0, below=1, decay=decay)
        check_number(above=0, half_life=half_life, ramp_up=ramp_up, hint=", or null")
        check_count(0, snapshot_every=snapshot_every)
        if half_life is None and decay is None and not sigma_rel:
            raise ValueError("EMA half_life is null; give a number of images, or decay or sigma_rel in its place.")
        if sigma_rel is not None and (decay is not None or not sigma_rel or len(set(sigma_rel)) < len(sigma_rel)):
            raise ValueError(
                f"EMA has sigma_rel {sigma_rel} and decay {decay}; give different widths, at least one, and no decay."
            )
        if snapshot_every and not sigma_rel:
            raise ValueError(f"EMA snapshot_every is {snapshot_every}; it takes sigma_rel beside it.")
        self.sigma_rel = sigma_rel or []
        self.gammas = [exponent(width) for width in self.sigma_rel]
        self.snapshot_every = snapshot_every
        self._weights: tuple[list[Tensor], list[Tensor]] = ([], [])  # of the average, and of the module in that order
        self._buffers: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._others: list[list[Tensor]] = []  # the averages of sigma_rel after the first
        self._step = 0
        self.half_life = half_life
        self.ramp_up = ramp_up
        self.decay = decay
        self._images_seen = 0
        self._batch_size = 1  # images of the last step, all its batches and ranks
        self._since_step = 0  # images since then
        self._swapped = False
        super().__init__(use_buffers=False, multi_avg_fn=self._average)

    def beta(self) -> float:
        """The weight of the old average at this step, in [0, 1)."""
        if self.gammas:
            return power_beta(self._step, self.gammas[0])
        if self.decay is not None:
            return self.decay
        half_life = self.half_life
        assert half_life is not None
        if self.ramp_up is not None:
            half_life = min(half_life, self.ramp_up * self._images_seen)
        return math.exp2(-self._batch_size / max(half_life, 1e-8))

    @torch.no_grad()
    def _average(self, averages: Any, currents: Any, num_averaged: Any) -> None:
        torch._foreach_lerp_(averages, currents, 1 - self.beta())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Counts the images and moves the average after each optimizer step."""
        self._since_step += images_of(batch, trainer)
        self._step = trainer.global_step
        if self._step == self._latest_update_step:
            return
        self._batch_size, self._since_step = self._since_step, 0
        self._images_seen += self._batch_size
        self._move(pl_module)
        self._latest_update_step = self._step
        self._move_others(pl_module)
        if self.snapshot_every and self._step % self.snapshot_every == 0 and trainer.is_global_zero:
            self._write_snapshots(trainer, pl_module)

    @torch.no_grad()
    def _move(self, pl_module: LightningModule) -> None:
        """Updates the first average, like `AveragedModel.update_parameters` without a walk through all modules."""
        assert self._average_model is not None
        if not self._weights[0]:  # the parameters stay the same objects for the whole run, also where they are swapped
            module = self._average_model.module
            pairs = zip(module.parameters(), pl_module.parameters(), strict=True)
            trained = [pair for pair in pairs if _is_averaged(pair[1], pl_module)]
            self._weights = ([mine for mine, _ in trained], [current for _, current in trained])
            self._buffers = (list(module.buffers()), list(pl_module.buffers()))
        averages, currents = self._weights
        if self._average_model.n_averaged == 0:
            torch._foreach_copy_(averages, currents)
        else:
            self._average(averages, currents, None)
        if self._buffers[0]:
            torch._foreach_copy_(self._buffers[0], self._buffers[1])
        self._average_model.n_averaged += 1

    @torch.no_grad()
    def _move_others(self, pl_module: LightningModule) -> None:
        if not self.gammas[1:]:
            return
        currents = [parameter.detach() for parameter in pl_module.parameters() if _is_averaged(parameter, pl_module)]
        if self._step == 1 and not self._others:
            self._others = [[current.clone() for current in currents] for _ in self.gammas[1:]]
        for average, gamma in zip(self._others, self.gammas[1:], strict=True):
            torch._foreach_lerp_(average, currents, 1 - power_beta(self._step, gamma))

    def _write_snapshots(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._average_model is not None
        names = [name for name, parameter in pl_module.named_parameters() if _is_averaged(parameter, pl_module)]
        first = dict(self._average_model.module.named_parameters())
        averages: list[list[Tensor]] = [[first[name] for name in names], *self._others]
        folder = run_folder(trainer) / "averages"
        classes = [str(name) for name in class_names_of(data_of(trainer))]
        try:
            for width, average in zip(self.sigma_rel, averages, strict=True):
                Snapshots.write(folder, self._step, width, dict(zip(names, average, strict=True)), classes)
        except OSError as error:
            rank_zero_warn(f"A snapshot of the averages could not be written to {folder}: {error}. Training goes on.")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes the averaged model; its counter stays on the CPU, where reading it needs no synchronisation.

        Raises:
            ValueError: If another callback averages the weights too: each would take the other's for the raw ones.
        """
        others = [one for one in trainer.callbacks if isinstance(one, AVERAGES) and one is not self]  # type: ignore[attr-defined]
        if others:
            raise ValueError(
                "Two averages of the weights do not go together: the run keeps one already (ema), and "
                f"{type(others[0]).__name__} in trainer.callbacks is a second. Leave it out; --ema.half_life, "
                "--ema.decay and --ema.sigma_rel, which takes several widths, say what is averaged."
            )
        super().setup(trainer, pl_module, stage)
        self._weights, self._buffers = ([], []), ([], [])
        if self._average_model is not None:
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shares weights that are frozen, or an adversary's, with the module instead of averaging a copy of them."""
        assert self._average_model is not None
        for mine, current in zip(self._average_model.module.parameters(), pl_module.parameters(), strict=True):
            if not _is_averaged(current, pl_module):
                mine.data = current.data
        trained = [parameter for parameter in pl_module.parameters() if _is_averaged(parameter, pl_module)]
        self._others = [
            [value.to(parameter.device) for value, parameter in zip(average, trained, strict=True)]
            for average in self._others
        ]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swaps in the average of the weights."""
        if self._average_model is not None and not self._swapped:
            self._swap_models(pl_module)
            self._swapped = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the raw weights back."""
        if self._swapped:
            self._swap_models(pl_module)
            self._swapped = False

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: the average has been in place since `on_validation_start`."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: the average stays in place until `on_validation_end`."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restores the raw weights if validation failed, before anything is saved."""
        self.on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: the raw weights stay; the checkpoint holds both."""

    def state_dict(self) -> dict[str, Any]:
        """The counters that a resumed run needs."""
        return {**super().state_dict(), "images_seen": self._images_seen, "others": self._others}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the counters."""
        super().load_state_dict(state_dict)
        self._images_seen = state_dict["images_seen"]
        self._others = state_dict.get("others", [])
        if len(self._others) != len(self.gammas[1:]):
            raise ValueError(
                f"The checkpoint holds {len(self._others) + 1} averages, but this run asks for {len(self.gammas) or 1} "
                "(--ema.sigma_rel); go on with the setting that it was trained with."
            )


def _is_averaged(parameter: Tensor, module: LightningModule) -> bool:
    """Whether a parameter is trained and not one that its module keeps apart, as an adversary's."""
    apart = module.unaveraged if isinstance(module, BaseModule) else []
    return parameter.requires_grad and not any(parameter is one for one in apart)
