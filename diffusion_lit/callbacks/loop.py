"""Lightning's training loop with one meaning of a step: when it validates, and where a resumed run goes on.

Validation runs after every `val_check_interval` optimizer steps, whatever the number of accumulated batches, and after
the last step. A position in the run is one pair: the epoch, and the number of its batches that are done. Lightning's
counters differ after a batch, a validation, an epoch and a resumption, so they are normalised before the loop reads a
checkpoint.
"""

from typing import Any

from lightning.pytorch import Trainer

from diffusion_lit.callbacks.checkpoint import LastCheckpoint
from diffusion_lit.callbacks.intervals import ValidationLoop, ends
from diffusion_lit.runtime.internals import FitLoop, TrainingEpochLoop

TRACKED = ("ready", "started", "processed", "completed")


def position(state: dict[str, Any]) -> tuple[int, int]:
    """Where the run stood that saved a state of the loop.

    Args:
        state: Lightning's state of the fit loop, saved between two optimizer steps.

    Returns:
        The epoch, and the number of its batches that were trained.
    """
    epochs = state["epoch_progress"]["current"]
    batches = state["epoch_loop.batch_progress"]
    begun, trained = epochs["ready"], batches["current"]["ready"]
    over = batches["is_last_batch"] or (trained == 0 and epochs["processed"] == begun)
    return (begun, 0) if over or begun == 0 else (begun - 1, trained)


def brought_to(epoch: int, batch: int, state: dict[str, Any]) -> dict[str, Any]:
    """A state of the loop at a position, as Lightning writes it in `on_train_batch_end`.

    Args:
        epoch: The epoch.
        batch: Number of its batches that were trained; 0 where it is still to begin.
        state: Lightning's state of the fit loop, of which the totals are kept.

    Returns:
        The state from which Lightning goes on with this batch of this epoch.
    """
    total = state["epoch_loop.batch_progress"]["total"]["ready"]
    begun = epoch + (batch > 0)
    epochs = {"ready": begun, "started": begun, "processed": epoch, "completed": epoch}
    steps = state["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
    return {
        **state,
        "epoch_progress": {"total": dict(epochs), "current": dict(epochs)},
        "epoch_loop.batch_progress": {
            "total": {**dict.fromkeys(TRACKED, total), "completed": total - 1},
            "current": {**dict.fromkeys(TRACKED, batch), "completed": batch - 1},
            "is_last_batch": False,
        },
        "epoch_loop.val_loop.batch_progress": {
            "total": dict.fromkeys(TRACKED, 0),
            "current": dict.fromkeys(TRACKED, 0),
            "is_last_batch": False,
        },
        "epoch_loop.state_dict": {"_batches_that_stepped": steps - 1},
    }


class StepLoop(TrainingEpochLoop):
    """Lightning's loop over the batches of an epoch, which counts intervals in optimizer steps."""

    def __init__(self, trainer: Trainer, min_steps: int | None, max_steps: int) -> None:
        super().__init__(trainer, min_steps, max_steps)
        self.val_loop = ValidationLoop(trainer)

    def due(self) -> bool:
        """Whether the batch just trained ended an optimizer step after which the run validates, draws and measures."""
        interval = int(self.trainer.val_check_interval)
        return not self._should_accumulate() and (self.global_step % interval == 0 or ends(self.trainer))

    def _should_check_val_fx(self, data_fetcher: Any) -> bool:
        trainer = self.trainer
        if not self._should_accumulate() and ends(trainer):
            return True
        if trainer.check_val_every_n_epoch is not None or not isinstance(trainer.val_check_interval, int):
            return super()._should_check_val_fx(data_fetcher)
        return self.due()

    def on_advance_end(self, data_fetcher: Any) -> None:
        """Saves what is due now that the step's figures are logged, and goes on to the validation that may be due."""
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, LastCheckpoint):
                callback.on_step_end(self.trainer)
        super().on_advance_end(data_fetcher)

    def _should_check_val_epoch(self) -> bool:
        every = self.trainer.check_val_every_n_epoch
        return every is None or (self.trainer.current_epoch + 1) % every == 0

    def reset(self) -> None:
        """Begins or resumes an epoch; it logs once per step, also when resumed."""
        super().reset()
        if self.trainer.lightning_module.automatic_optimization:
            self._batches_that_stepped = self.global_step


class RunLoop(FitLoop):
    """Lightning's loop over epochs, which resumes exactly where a checkpoint was taken.

    Args:
        trainer: The trainer, whose own loop it replaces.
    """

    def __init__(self, trainer: Trainer) -> None:
        before = trainer.fit_loop
        super().__init__(trainer, min_epochs=before.min_epochs, max_epochs=before.max_epochs)
        self.epoch_loop = StepLoop(trainer, before.min_steps, before.max_steps)

    @property
    def skip(self) -> bool:
        """Whether there is nothing to train and no skipped validation to run."""
        kept = [one for one in self.trainer.checkpoint_callbacks if isinstance(one, LastCheckpoint)]
        due = any(one._validation_due for one in kept)
        return super().skip and not (due and self.max_batches)

    def setup_data(self) -> None:
        """Makes the loader, and refuses a step that would sum up more batches than an epoch has.

        Raises:
            ValueError: If an epoch is shorter than the accumulation.
        """
        super().setup_data()
        batches, step = self.max_batches, self.trainer.accumulate_grad_batches
        if 0 < batches < step and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise ValueError(
                f"trainer.accumulate_grad_batches is {step}, but an epoch has {batches} batches, and a step ends with "
                f"its epoch; choose at most {batches}, or a smaller data.init_args.batch_size."
            )

    def load_state_dict(self, state_dict: dict[str, Any], prefix: str = "") -> None:
        """Reads a state, brought into one form first."""
        if state_dict["epoch_loop.batch_progress"]["total"]["ready"]:
            state_dict = brought_to(*position(state_dict), state_dict)
        super().load_state_dict(state_dict, prefix)
