"""The checkpoint from which a run continues, and how a run is interrupted.

A checkpoint is only ever taken between two optimizer steps, never between batches whose gradients are still being
summed, since those would be lost. SIGTERM and Ctrl-C are noted and obeyed at the end of the step: the state is saved,
and the run ends with the exit status that the shell expects, 143 or 130.
"""

import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from diffusion_lit.checks import check_count
from diffusion_lit.runtime.stopping import RunStopped
from diffusion_lit.runtime.watchdog import SAME

NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class LastCheckpoint(ModelCheckpoint):
    """Keeps `checkpoints/last.ckpt`: the state after each validation, at the end of training and when interrupted.

    To keep the best by a metric as well, add `lightning.pytorch.callbacks.ModelCheckpoint` with `monitor` to
    `trainer.callbacks`.

    Args:
        every_n_train_steps: Also saves every so many training steps.
    """

    def __init__(self, every_n_train_steps: int | None = None) -> None:
        check_count(every_n_train_steps=every_n_train_steps, hint=", or leave it out for every validation")
        super().__init__(filename="last", enable_version_counter=False)
        self.every = every_n_train_steps
        self._due = False  # a save that waits for the end of the optimizer step
        self._validation_due = False  # the state is that of a step after which validation comes
        self._signal: int | None = None
        self._heard = 0.0  # when it came
        self._hosts: Any = None  # the group of processes through which ranks tell each other of it
        self._stopping: RunStopped | None = None
        self._requeue: Any = None
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens for signals, and makes up for a validation that the checkpoint was saved before."""
        super().on_train_start(trainer, pl_module)
        if trainer.world_size > 1 and trainer.strategy.root_device.type != "cpu":
            self._hosts = torch.distributed.new_group(backend="gloo")  # no host waits for its device
        self._listen(trainer)
        if self._validation_due:
            self._validation_due = False
            _validate(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Saves at the interval, and when the run is asked to stop."""
        step = trainer.global_step
        self._due |= bool(self.every) and step % (self.every or 1) == 0 and self._last_global_step_saved != step
        asked = self._asked(trainer)
        if trainer.fit_loop._should_accumulate():
            return
        if self._due or asked:
            fetcher = trainer.fit_loop._data_fetcher
            assert fetcher is not None
            self._validation_due = trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
            self._save_new(trainer)
            self._validation_due = False
        if asked and asked in NAMES:
            self._stopping = self._farewell(trainer, asked)
        elif asked:
            self._signal = None
            self._requeue(asked, None)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stops a run that was asked to, now that the last step's figures are logged."""
        self._stop()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops a run that was asked to."""
        self._stop()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops a run that was asked to: the validation is made up for when it goes on."""
        self._stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves, with the metrics of the validation."""
        if trainer.state.fn == "fit" and trainer.fit_loop._should_accumulate():
            self._due = True  # a validation that is not counted in steps: by time, or by epochs
        else:
            super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves what was trained since the last validation."""
        self._save_new(trainer)
        failure = trainer.strategy.broadcast(getattr(trainer.strategy.checkpoint_io, "failure", None))
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
        """ModelCheckpoint's, and whether validation comes next."""
        return {**super().state_dict(), "validation_due": self._validation_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state."""
        super().load_state_dict(state_dict)
        self._validation_due = state_dict.get("validation_due", False)

    def _save_new(self, trainer: Trainer) -> None:
        self._due = False
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))

    def _listen(self, trainer: Trainer) -> None:
        """Takes SIGTERM, Ctrl-C and, under SLURM, the signal to requeue, whose work is done at the end of a step."""
        if threading.current_thread() is not threading.main_thread():
            return
        numbers = [signal.SIGTERM, signal.SIGINT]
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            assert environment.requeue_signal is not None
            numbers.append(environment.requeue_signal)
            self._requeue = trainer._signal_connector._slurm_sigusr_handler_fn
        if trainer.received_sigterm:  # it came while the run was set up
            trainer._signal_connector.received_sigterm, self._signal = False, signal.SIGTERM
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
            raise RunStopped(f"Stopped at once by a second {NAMES[number]}.", 128 + number)  # type: ignore[index]
        if self._trainer.validating and self._trainer.world_size == 1:
            raise RunStopped(f"Stopped by {NAMES[number]}.", 128 + number)  # type: ignore[index]
        rank_zero_info(f"\n{NAMES[number]}: saving at the end of this step; once more to stop at once.")  # type: ignore[index]

    def _asked(self, trainer: Trainer) -> int:
        """The signal that any rank has had, the same on all ranks; 0 for none."""
        if trainer.world_size == 1:
            return self._signal or 0
        number = torch.tensor(self._signal or 0)
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX, group=self._hosts)
        return int(number)

    def _stop(self) -> None:
        if self._stopping is not None:
            raise self._stopping

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves the training so far where validation failed or was interrupted, which leaves it as it was."""
        if trainer.state.fn == "fit" and trainer.validating and trainer.world_size == 1:
            if trainer.fit_loop._should_accumulate():
                return
            self._validation_due = True
            self._save_new(trainer)
            rank_zero_info(f"{self._where(trainer)} The validation that was going on is made up for when it goes on.")
        else:
            super().on_exception(trainer, pl_module, exception)

    def _farewell(self, trainer: Trainer, number: int) -> RunStopped:
        """What a run that is stopped says."""
        return RunStopped(f"Stopped by {NAMES[number]}. {self._where(trainer)}", 128 + number)  # type: ignore[index]

    def _where(self, trainer: Trainer) -> str:
        """A sentence on where the state was saved."""
        failure = getattr(trainer.strategy.checkpoint_io, "failure", None)
        if failure:
            return f"The state could not be saved: {failure}; the last checkpoint that is whole is older."
        if not self._last_checkpoint_saved:
            return "Nothing was saved."
        return (
            f"The state after step {self._last_global_step_saved} is saved in {self._last_checkpoint_saved}; "
            "go on with --ckpt_path last."
        )


def _validate(trainer: Trainer) -> None:
    """Runs validation as the training loop does after a step."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    loop.reset_restart_stage()
    trainer.validating = True
    first = trainer._logger_connector._first_loop_iter
    epochs = trainer.fit_loop.epoch_progress.current
    edge = trainer.fit_loop.epoch_loop.batch_progress.current.ready == 0 and epochs.completed > 0
    epochs.completed -= edge  # its figures belong to the epoch that ended
    loop.run()
    epochs.completed += edge
    trainer.training = True
    trainer._logger_connector._first_loop_iter = first
