"""Validation at the interval and at the end of a run, also without held-out images.

Lightning skips validation if there is nothing to validate on, and with it the callbacks: the checkpoint, the image
grid, FID.
"""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import CombinedLoader

from diffusion_lit.runtime.internals import EvaluationLoop, ends_epoch, stops_early


def ends(trainer: Trainer) -> bool:
    """Whether training ends after the step that was just done.

    Args:
        trainer: The trainer, in training or in a validation.

    Returns:
        Whether it was the last step of `max_steps`, of the last epoch, or before an early stop.
    """
    loop = trainer.fit_loop
    progress: Any = loop.epoch_progress.current
    epochs = progress.processed + ends_epoch(trainer)
    return 0 < trainer.max_steps <= trainer.global_step or 0 < (loop.max_epochs or -1) <= epochs or stops_early(trainer)


class ValidationLoop(EvaluationLoop):
    """Lightning's loop, which also calls the callbacks when there is no batch to validate on."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer, TrainerFn.FITTING, RunningStage.VALIDATING, verbose=False, inference_mode=False)

    @property
    def skip(self) -> bool:
        """Skips only the check before training."""
        return self.trainer.sanity_checking and super().skip

    def setup_data(self) -> None:
        """Gets the held-out images, possibly none."""
        super().setup_data()
        if self._combined_loader is None:
            self._combined_loader, self._max_batches = CombinedLoader([], "sequential"), [0]

    def increment_progress_to_evaluation_end(self) -> None:
        """Counts the batches of a validation as done, where it has any."""
        self.setup_data()
        if sum(self.max_batches):
            super().increment_progress_to_evaluation_end()
