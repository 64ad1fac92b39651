"""Ends a run that hangs, and says where."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from diffusion_lit.checks import check_number
from diffusion_lit.runtime import watchdog

TIME_TO_END = 30.0  # seconds that a rank has which raised an error


class Watchdog(Callback):
    """Ends a run that hangs, and names the rank and the callback that hang.

    It also ends a rank that does not exit after an error, a second signal, or the death of its parent process.

    Args:
        minutes: Time that the run may stand in one place, less than the 30 minutes after which collective operations
            fail; 0 for any time.

    Raises:
        ValueError: If the time is negative.
    """

    def __init__(self, minutes: float = 20.0) -> None:
        check_number(least=0, minutes=minutes, hint="; 0 is never")
        self.minutes = minutes

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts watching."""
        watchdog.watch(60 * self.minutes, trainer.global_rank)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stops watching."""
        watchdog.rest()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Limits the time for clean-up, which may wait for other ranks."""
        if trainer.world_size > 1:
            watchdog.end_within(TIME_TO_END, str(exception) or type(exception).__name__)
        else:
            watchdog.rest()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Sees that the run goes on."""
        watchdog.beat()

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = on_train_batch_end
