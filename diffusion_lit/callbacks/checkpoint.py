"""Saves the checkpoint that a run resumes from, and handles interruption.

Checkpoints are taken only between optimizer steps, never between accumulated batches, whose gradients would be lost,
and only when the step's figures are on disk. SIGTERM and Ctrl-C take effect at the end of the step: the state is saved,
and the run exits with the usual status, 143 or 130.
"""

import contextlib
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from diffusion_lit.callbacks.fid import FID
from diffusion_lit.checks import check_count, check_number
from diffusion_lit.runtime.internals import (
    accumulates,
    as_in_validation,
    cluster_of,
    requeue_of,
    take_sigterm,
    validates_next,
)
from diffusion_lit.runtime.stopping import RunStopped
from diffusion_lit.runtime.watchdog import SAME
from diffusion_lit.storage.checkpoint_io import SafeCheckpointIO

NAMES: dict[int, str] = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class LastCheckpoint(ModelCheckpoint):
    """Saves `checkpoints/last.ckpt` after each validation, at the end of training and when interrupted.

    Beside it lie `previous.ckpt`, the one before, and `best.ckpt`, that of the validation with the lowest FID where the
    run measures one, and otherwise with the lowest `val/loss`. Other metrics are for
    `lightning.pytorch.callbacks.ModelCheckpoint` with `monitor`, in `trainer.callbacks`.

    Args:
        every_n_train_steps: Also saves every this many training steps.
        every_n_minutes: Also saves this many minutes after the last save; `null` for never.
    """

    def __init__(self, every_n_train_steps: int | None = None, every_n_minutes: float | None = 10) -> None:
        check_count(every_n_train_steps=every_n_train_steps, hint=", or leave it out for every validation")
        super().__init__(filename="last", enable_version_counter=False)
        check_number(above=0, infinite=True, hint=", or null for never", every_n_minutes=every_n_minutes)
        self.every = every_n_train_steps
        self.every_n_minutes = every_n_minutes
        self.best: dict[str, Any] = {}  # figure, value and step of best.ckpt
        self._saved_at = time.monotonic()
        self._due = False  # a save that waits for the end of the optimizer step
        self._validation_due = False  # the state is that of a step after which validation comes
        self._signal: int | None = None
        self._heard = 0.0  # when it came
        self._hosts: Any = None  # the group of processes through which ranks tell each other of it
        self._requeue: Any = None
        self._handlers: dict[int, Any] = {}

    @property
    def saved(self) -> str:
        """The file that was written last; empty before."""
        return self._last_checkpoint_saved

    @property
    def saved_step(self) -> int:
        """Its training step."""
        return self._last_global_step_saved

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Installs signal handlers, and runs the validation that an interruption skipped."""
        super().on_train_start(trainer, pl_module)
        self._saved_at = time.monotonic()
        if trainer.world_size > 1 and trainer.strategy.root_device.type != "cpu":
            self._hosts = torch.distributed.new_group(backend="gloo")  # no host waits for its device
        self._listen(trainer)
        if self._validation_due:
            self._validation_due = False
            _validate(trainer)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Saves nothing: the step's figures are not logged yet; see `on_step_end`."""

    def on_step_end(self, trainer: Trainer) -> None:
        """Saves at the interval, and when the run is asked to stop; the loop calls it when a step's figures are logged.

        Args:
            trainer: The trainer, after a batch and before the validation that may be due.

        Raises:
            RunStopped: If the run was asked to stop: a validation that is due is made up for when it goes on.
        """
        step = trainer.global_step
        self._due |= bool(self.every) and step % (self.every or 1) == 0 and self._last_global_step_saved != step
        asked, overdue = self._asked(trainer)
        self._due |= overdue
        if accumulates(trainer):
            return
        if self._due or asked:
            self._validation_due = validates_next(trainer)
            self._save_new(trainer)
            self._validation_due = False
        if asked and asked in NAMES:
            raise RunStopped(f"Stopped by {NAMES[asked]}. {self._where(trainer)}", 128 + asked)
        if asked:
            self._signal = None
            self._requeue(asked, None)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves, with the metrics of the validation, and keeps it where it is the best so far."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if accumulates(trainer):
            self._due = True  # a validation that is not counted in steps: by time, or by epochs
            return
        improved = self._improved(trainer)
        self._save_new(trainer)
        if improved and trainer.is_global_zero:
            self._keep(trainer, "best")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves what was trained since the last validation."""
        self._save_new(trainer)
        failure = trainer.strategy.broadcast(failure_of(trainer))
        if failure:
            raise RunStopped(
                f"The run is over, but its last checkpoint could not be written to {self.dirpath}: {failure}. Make "
                "room and go on from the last one that is whole with --ckpt_path last."
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def state_dict(self) -> dict[str, Any]:
        """ModelCheckpoint's, the best figure, and whether validation comes next."""
        return {**super().state_dict(), "validation_due": self._validation_due, "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state."""
        super().load_state_dict(state_dict)
        self._validation_due = state_dict.get("validation_due", False)
        self.best = state_dict.get("best", {})

    def _save_new(self, trainer: Trainer) -> None:
        self._due = False
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Has loggers write what they hold, so that no figure is lost, keeps the checkpoint before, and saves."""
        for logger in trainer.loggers:
            logger.save()
        if trainer.is_global_zero:
            self._keep(trainer, "previous")
        super()._save_checkpoint(trainer, filepath)
        self._saved_at = time.monotonic()

    def _keep(self, trainer: Trainer, name: str) -> None:
        """Links last.ckpt under a second name, which survives its replacement."""
        last = Path(str(self.dirpath)) / "last.ckpt"
        if not last.exists() or (name == "best" and failure_of(trainer)):
            return
        temporary = last.with_name(f".{name}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
            try:
                os.link(last, temporary)
            except OSError:  # a file system without hard links
                shutil.copyfile(last, temporary)
            os.replace(temporary, last.with_name(f"{name}.ckpt"))
        with contextlib.suppress(OSError):  # two names of one file are not replaced, and both stay
            temporary.unlink(missing_ok=True)

    def _improved(self, trainer: Trainer) -> bool:
        """Whether the validation that just ended gave the best figure so far; the same on all ranks."""
        figure = _figure(trainer)
        if figure is None:
            return False
        name, value = figure
        before = self.best.get("value", math.inf) if self.best.get("figure") == name else math.inf
        improved: bool = trainer.strategy.broadcast(value < before)
        if improved:
            self.best = {"figure": name, "value": value, "step": trainer.global_step}
        return improved

    def _listen(self, trainer: Trainer) -> None:
        """Handles SIGTERM, Ctrl-C and SLURM's signal to requeue, at the end of a step."""
        if threading.current_thread() is not threading.main_thread():
            return
        numbers = [signal.SIGTERM, signal.SIGINT]
        environment = cluster_of(trainer)
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            assert environment.requeue_signal is not None
            numbers.append(environment.requeue_signal)
            self._requeue = requeue_of(trainer)
        if take_sigterm(trainer):  # it came while the run was set up
            self._signal = signal.SIGTERM
        self._trainer = trainer
        self._handlers = {number: signal.signal(number, self._note) for number in numbers}

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal: the first is noted; a second one, or one during validation on one rank, acts at once."""
        first, now = self._signal is None, time.monotonic()
        self._signal = number
        if number not in NAMES:
            return
        if not first and now - self._heard < SAME:
            return
        self._heard = now
        if not first:
            raise RunStopped(f"Stopped at once by a second {NAMES[number]}.", 128 + number)
        if self._trainer.validating and self._trainer.world_size == 1:
            raise RunStopped(f"Stopped by {NAMES[number]}.", 128 + number)
        rank_zero_info(f"\n{NAMES[number]}: saving at the end of this step; once more to stop at once.")

    def _asked(self, trainer: Trainer) -> tuple[int, bool]:
        """The signal that any rank received, 0 for none, and whether a save is overdue; the same on all ranks."""
        overdue = self.every_n_minutes is not None and time.monotonic() - self._saved_at > 60 * self.every_n_minutes
        if trainer.world_size == 1:
            return self._signal or 0, overdue
        both = torch.tensor([self._signal or 0, int(overdue)])
        torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MAX, group=self._hosts)
        number, late = both.tolist()
        return number, bool(late)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves when validation failed or was interrupted, since it leaves training unchanged."""
        if trainer.state.fn == "fit" and trainer.validating and trainer.world_size == 1:
            if accumulates(trainer):
                return
            self._validation_due = True
            self._save_new(trainer)
            rank_zero_info(f"{self._where(trainer)} The validation that was going on is made up for when it goes on.")
        else:
            super().on_exception(trainer, pl_module, exception)

    def _where(self, trainer: Trainer) -> str:
        """A sentence on where the state was saved."""
        failure = failure_of(trainer)
        if failure:
            return f"The state could not be saved: {failure}; the last checkpoint that is whole is older."
        if not self._last_checkpoint_saved:
            return "Nothing was saved."
        return (
            f"The state after step {self._last_global_step_saved} is saved in {self._last_checkpoint_saved}; "
            "go on with --ckpt_path last."
        )


def _figure(trainer: Trainer) -> tuple[str, float] | None:
    """The figure that ranks checkpoints, lower is better: FID, or else `val/loss`."""
    tags = sorted((one.tag for one in trainer.callbacks if isinstance(one, FID)), key=lambda tag: tag.startswith("r"))  # type: ignore[attr-defined]
    metrics = trainer.callback_metrics
    name = next((name for name in (*tags, "val/loss") if name in metrics), None)
    return None if name is None else (name, float(metrics[name]))


def _validate(trainer: Trainer) -> None:
    """Runs validation as the training loop does after a step."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    loop.reset_restart_stage()
    epochs = trainer.fit_loop.epoch_progress.current
    edge = trainer.fit_loop.epoch_loop.batch_progress.current.ready == 0 and epochs.completed > 0
    epochs.completed -= edge  # its figures belong to the epoch that ended
    with as_in_validation(trainer):
        loop.run()
    epochs.completed += edge


def failure_of(trainer: Trainer) -> str | None:
    """Why the last checkpoint could not be written, None where it was."""
    files = trainer.strategy.checkpoint_io
    return files.failure if isinstance(files, SafeCheckpointIO) else None
