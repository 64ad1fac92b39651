"""Messages of a run: images per second, and where its files lie."""

import time
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger as LightningTensorBoardLogger
from torch import Tensor

from diffusion_lit.callbacks.loggers import TensorBoardLogger, note
from diffusion_lit.report.facts import count_parameters
from diffusion_lit.report.receipt_tables import plain_table
from diffusion_lit.runtime.hardware import describe, hardware
from diffusion_lit.runtime.installation import PROGRAM
from diffusion_lit.runtime.internals import bare, logs_now
from diffusion_lit.runtime.precision import TrainInBf16
from diffusion_lit.runtime.ranks import images_of
from diffusion_lit.runtime.run_folder import WritesToRunFolder, run_folder


class Throughput(Callback):
    """Logs training images per second over all ranks, without the time of validation and drawing."""

    def __init__(self) -> None:
        self._since = 0.0
        self._images = 0

    def _restart(self, *args: Any, **kwargs: Any) -> None:
        """Starts the clock anew."""
        self._since, self._images = time.perf_counter(), 0

    on_train_start = on_train_epoch_start = on_validation_end = _restart  # a run that is resumed begins no epoch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Counts, and logs at the trainer's interval."""
        self._images += images_of(batch, trainer)
        if logs_now(trainer):
            rate = self._images / (time.perf_counter() - self._since)
            pl_module.log("train/images_per_second", rate, batch_size=1)
            self._restart()


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, drawn at most twice a second; drawing it after every step costs 0.5 ms."""

    def __init__(self) -> None:
        super().__init__()
        self._drawn = 0.0
        self._pending: int | None = None  # the last step, where it was not drawn

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draws the bar where it is due."""
        now = time.monotonic()
        if now - self._drawn < 0.5:
            self._pending = batch_idx
            return
        self._drawn, self._pending = now, None
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Lightning's, without the last characters of the version, of version_5 "on_5"."""
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws what is still to be drawn of the epoch."""
        if self._pending is not None:
            super().on_train_batch_end(trainer, pl_module, None, None, self._pending)
            self._pending = None
        super().on_train_epoch_end(trainer, pl_module)


class LayerTable(Callback):
    """Prints the layers of a module, for `--trainer.enable_model_summary true`.

    Lightning's table ends in a count of FLOPs that is 0 for modules without an example input; `Cost` tells the cost.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints them on rank 0."""
        if trainer.is_global_zero:
            children = [*pl_module.named_children(), ("Total", pl_module)]
            rows = [[name, type(part).__name__, f"{count_parameters(part):,}"] for name, part in children]
            print(plain_table([["layer", "class", "parameters"], *rows]))


class RunSummary(WritesToRunFolder):
    """Prints the choices for the hardware at the start, and results and files at the end."""

    _started_at: int | None = None  # the step at which training started, where it did

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints and logs the choices for the hardware and the options that change them."""
        self._started_at = trainer.global_step
        if not trainer.is_global_zero:
            return
        lines = hardware_lines(trainer, pl_module)
        print("\n".join([*lines, *time_budget(trainer), *other_length(trainer)]))
        record = f"{hardware(pl_module.device, trainer.world_size)['processor']}. {lines[0]}"
        for logger in trainer.loggers:
            write = partial(note, logger, "hardware", record, trainer.global_step)
            logger.attempt(write) if isinstance(logger, TensorBoardLogger) else write()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the summary on rank 0."""
        if not trainer.is_global_zero:
            return
        folder = run_folder(trainer)
        lines = ["", "The run is over."]
        if self._started_at in (None, trainer.global_step):
            lines.insert(1, nothing_trained(trainer))
        for label, value in self._figures(trainer):
            lines.append(f"  {label + ':':<21} {value}")
        for label, pattern in (
            ("sample grid", "samples/*.png"),
            ("trajectory", "trajectory/*.png"),
            ("reconstructions", "reconstructions/*.png"),
            ("interpolations", "interpolations/*.png"),
            ("denoising animation", "trajectory/*.gif"),
            ("checkpoint", "checkpoints/last.ckpt"),
            ("the best one", "checkpoints/best.ckpt"),
        ):
            found = sorted(folder.glob(pattern))
            if found:
                lines.append(f"  {label + ':':<21} {_short(found[-1])}")
        lines.append(f"  {'everything else:':<21} {_short(folder)}")
        lines.append(f"  {'on one page:':<21} {PROGRAM} report --run {quote(_short(folder))}")
        if any(isinstance(logger, LightningTensorBoardLogger) for logger in trainer.loggers):
            lines.append(f"  {'its curves:':<21} tensorboard --logdir {quote(_short(folder.parent))}")
        print("\n".join([*lines, ""]))

    def _figures(self, trainer: Trainer) -> list[tuple[str, str]]:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        figures = []
        for name, value in metrics.items():
            if name.startswith(("fid_", "fd_", "rfid_", "rfd_")) and not name.endswith("_floor"):
                stem = name.removeprefix("r").rsplit("_", 1)[0]
                floors = [key for key in metrics if key.endswith("_floor") and key.startswith(stem)]
                same = f"{name.removeprefix('r')}_floor"
                floors = [same] if same in floors else floors
                beside = "".join(f"; real against real, {key}: {metrics[key]:.3g}" for key in floors)
                figures.append((name, f"{value:.3g}{beside}"))
        if "val/psnr" in metrics:
            figures.append(("reconstructions", f"{metrics['val/psnr']:.2f} dB, SSIM {metrics['val/ssim']:.4f}"))
        if "val/bits_per_dim" in metrics:
            figures.append(("bits per dimension", f"{metrics['val/bits_per_dim']:.3f}, at the most"))
        if "psnr" in metrics:
            figures.append(("PSNR of samples", f"{metrics['psnr']:.1f} dB"))
        if "val/loss" in metrics:
            figures.append(("validation loss", f"{metrics['val/loss']:.4g}"))
        return figures


def hardware_lines(trainer: Trainer, pl_module: LightningModule) -> list[str]:
    """Device, precision and memory format of a run, and the options that change them.

    Args:
        trainer: The trainer, its optimizers made.
        pl_module: The module.
    """
    mixed = trainer.precision != "32-true" and isinstance(trainer.precision_plugin, TrainInBf16)
    figures = ", figures in 32-true" if mixed else ""
    optimizers = [bare(optimizer) for optimizer in trainer.optimizers]
    kinds = [f"{'fused ' if one.param_groups[0].get('fused') else ''}{type(one).__name__}" for one in optimizers]
    ranks = f"{trainer.world_size} x " if trainer.world_size > 1 else ""
    where = f"{ranks}{describe(pl_module.device.type)}"
    weights = [one for one in pl_module.parameters() if one.dim() == 4 and not one.is_contiguous()]
    layout = "; NHWC" if any(one.is_contiguous(memory_format=torch.channels_last) for one in weights) else ""
    return [
        f"On {where}: training in {trainer.precision}{figures}{layout}; {', '.join(kinds)}.",
        "Chosen by the hardware; --trainer.precision 32-true, --channels_last false, OMP_NUM_THREADS=N and "
        "--model.init_args.optimizer.init_args.fused false say otherwise.",
    ]


def lengths(trainer: Trainer) -> list[tuple[Any, str, int]]:
    """The schedules of a fixed number of steps, each with the name of this number and the number."""
    schedules: list[Any] = [config.scheduler for config in trainer.lr_scheduler_configs]
    named = [(one, "total_steps" if getattr(one, "total_steps", None) else "T_max") for one in schedules]
    return [(one, name, steps) for one, name in named if (steps := getattr(one, name, None))]


def time_budget(trainer: Trainer) -> list[str]:
    """What a budget of time means for the learning rate.

    Args:
        trainer: The trainer, its schedules made.

    Returns:
        A sentence where the run may end by the clock and the learning rate decays by the step, or none.
    """
    timers = [one for one in trainer.callbacks if isinstance(one, Timer)]  # type: ignore[attr-defined]
    told = []
    for schedule, _, steps in lengths(trainer) if timers else []:
        start = round(steps * (1 - getattr(schedule, "decay_fraction", 1)))
        told.append(
            f"--trainer.max_time may end the run before its learning rate has decayed: it does from step {start:,} to "
            f"step {steps:,}, by the step and not by the clock. For a decay in time, set --trainer.max_steps to what "
            "fits into it; the time to the end is told after 20 steps."
        )
    return told


def other_length(trainer: Trainer) -> list[str]:
    """What it means that a schedule has a fixed length which is not the run's.

    Args:
        trainer: The trainer, its schedules made, which are stepped at each training step.

    Returns:
        A sentence for each such schedule.
    """
    run = trainer.estimated_stepping_batches
    told = []
    for schedule, name, steps in lengths(trainer) if run != float("inf") else []:
        if steps == run or getattr(schedule, "decay_fraction", 1) == 0:
            continue
        means = "does not come to its end" if steps > run else "ends, or rises again, before the run does"
        told.append(
            f"The schedule {type(schedule).__name__} has {name} {steps:,} and the run {run:,} steps, so that it "
            f"{means}; for the run's length set --model.init_args.lr_scheduler.init_args.{name} {run}."
        )
    return told


def nothing_trained(trainer: Trainer) -> str:
    """Why a run ended without a step.

    Args:
        trainer: The trainer, at the end.
    """
    progress: Any = trainer.fit_loop.epoch_progress.current
    step, epochs = trainer.global_step, progress.processed
    if 0 <= trainer.max_steps <= step:
        why, more = f"step {step:,}, and trainer.max_steps is {trainer.max_steps:,}", "trainer.max_steps"
    elif 0 <= (trainer.max_epochs or -1) <= epochs:
        why, more = f"epoch {epochs:,}, and trainer.max_epochs is {trainer.max_epochs:,}", "trainer.max_epochs"
    else:
        why, more = f"step {step:,}, and its limits allow none", "the limits"
    return f"Nothing was trained: the run stood at {why}. To go on, raise {more}."


def _short(path: Path) -> str:
    """The path from here where it lies below, as a user would type it."""
    return str(path.resolve().relative_to(Path.cwd()) if path.resolve().is_relative_to(Path.cwd()) else path)
