"""The folder of a run: chosen once by all ranks, and locked by one process at a time.

Lightning's `Trainer.log_dir` is a collective, which broadcasts rank 0's value. Read on one rank alone, such as by a
callback that draws on rank 0, it hangs. So all ranks choose the folder in `setup` and keep it.
"""

from pathlib import Path
from weakref import WeakKeyDictionary

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from diffusion_lit.runtime.lock import Busy, Lock

_FOLDERS: "WeakKeyDictionary[Trainer, Path]" = WeakKeyDictionary()


class WritesToRunFolder(Callback):
    """Base class of callbacks that write files: all ranks choose the run's folder before anything runs."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Decides the run's folder, on all ranks."""
        super().setup(trainer, pl_module, stage)
        decide_run_folder(trainer)


class RunFolder(WritesToRunFolder):
    """Chooses the folder of a run, whatever its logger, and keeps other processes from training there.

    Args:
        folder: The folder, as rank 0 knows it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: Lock | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Chooses the folder, locks it for training, and directs checkpoints to it."""
        super().setup(trainer, pl_module, stage)
        folder = run_folder(trainer)
        if stage == "fit":
            refusal = self._take(folder) if trainer.is_global_zero else None
            refusal = trainer.strategy.broadcast(refusal)
            if refusal:
                raise ValueError(refusal)
        run = folder if stage == "fit" else folder.parent
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(run / "checkpoints")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go of the folder."""
        self.release()

    def release(self) -> None:
        """Lets go of the folder, also where a run ended by an error, after which Lightning tears down no callback."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _take(self, folder: Path) -> str | None:
        """Locks the folder, or says why another process must not train in it."""
        try:
            self._lock = lock_run(folder)
        except ValueError as error:
            return str(error)
        return None


def lock_run(folder: Path) -> Lock:
    """Locks a run's folder for training, until the lock is released or this process ends, however it ends.

    Raises:
        ValueError: If another process trains there.
    """
    try:
        return Lock(folder / ".lock")
    except Busy as holder:
        raise ValueError(
            f"{folder} is being trained by another process ({holder}); wait until it ends or stop it, or "
            "start a run of your own without --ckpt_path."
        ) from None


def decide_run_folder(trainer: Trainer) -> Path:
    """Decides where the run writes. A collective: call it on all ranks.

    Args:
        trainer: The trainer, whose `RunFolder` or else its logger names the folder.
    """
    if trainer not in _FOLDERS:
        said = [one for one in trainer.callbacks if isinstance(one, RunFolder)]  # type: ignore[attr-defined]
        here = trainer.strategy.broadcast(said[0].folder) if said else trainer.log_dir or trainer.default_root_dir
        _FOLDERS[trainer] = Path(here)
    return _FOLDERS[trainer]


def run_folder(trainer: Trainer) -> Path:
    """Where the run writes. No collective: any rank may ask by itself.

    Raises:
        RuntimeError: If no callback has decided it in `setup`, where all ranks are.
    """
    if trainer not in _FOLDERS:
        raise RuntimeError(
            "The run has no folder yet: call decide_run_folder(trainer) in the setup of a callback, on all ranks."
        )
    return _FOLDERS[trainer]
