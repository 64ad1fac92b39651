"""The checkpoint from which a run continues."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Keeps `checkpoints/last.ckpt`: the state after each validation and at the end of training.

    To keep the best by a metric as well, add `lightning.pytorch.callbacks.ModelCheckpoint` with `monitor` to
    `trainer.callbacks`.

    Args:
        every_n_train_steps: Also saves every so many training steps.
    """

    def __init__(self, every_n_train_steps: int | None = None) -> None:
        super().__init__(filename="last", enable_version_counter=False)
        self.every = every_n_train_steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Saves at the interval."""
        if self.every and trainer.global_step % self.every == 0:
            self._save_new(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves what was trained since the last validation."""
        self._save_new(trainer)

    def _save_new(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))
