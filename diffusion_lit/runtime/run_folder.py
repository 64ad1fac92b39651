"""Where a run writes: one folder, decided once, by all ranks together.

Lightning's `Trainer.log_dir` is a collective: it broadcasts rank 0's answer. Read on one rank alone, as by a callback
that draws on rank 0, it waits for the others for ever. So all ranks decide in `setup`, and from then on each knows.
"""

from pathlib import Path
from weakref import WeakKeyDictionary

from lightning.pytorch import Callback, LightningModule, Trainer

_FOLDERS: "WeakKeyDictionary[Trainer, Path]" = WeakKeyDictionary()


class WritesToRunFolder(Callback):
    """A callback that writes files of its own: it has the ranks agree on the run's folder before anything runs."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Decides the run's folder, on all ranks."""
        super().setup(trainer, pl_module, stage)
        decide_run_folder(trainer)


def decide_run_folder(trainer: Trainer) -> Path:
    """Decides where the run writes. A collective: call it on all ranks.

    Args:
        trainer: The trainer, whose logger names the folder.

    Returns:
        The run's folder.
    """
    if trainer not in _FOLDERS:
        _FOLDERS[trainer] = Path(trainer.log_dir or trainer.default_root_dir)
    return _FOLDERS[trainer]


def run_folder(trainer: Trainer) -> Path:
    """Where the run writes. No collective: any rank may ask by itself.

    Args:
        trainer: The trainer.

    Returns:
        The run's folder.

    Raises:
        RuntimeError: If no callback has decided it in `setup`, where all ranks are.
    """
    if trainer not in _FOLDERS:
        raise RuntimeError(
            "The run has no folder yet: call decide_run_folder(trainer) in the setup of a callback, on all ranks."
        )
    return _FOLDERS[trainer]
