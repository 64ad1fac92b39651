"""Atomic checkpoint writes.

A file is written under a temporary name in its own folder, flushed to the disk and renamed over the old one, so that at
any moment, also when the machine dies, the name holds the old content or the new. If a write fails (a full disk, no
permission, a deleted folder), training goes on with a warning, and no older checkpoint is removed until a write
succeeds.
"""

from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from diffusion_lit.storage.atomic import atomic


class SafeCheckpointIO(CheckpointIO):
    """Writes checkpoints atomically and reads them without executing anything.

    Attributes:
        failure: Why the last write failed, or None where it did not.
        whole: The last checkpoint that was written, or None.
    """

    def __init__(self) -> None:
        self.failure: str | None = None
        self.whole: str | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint, or says that it could not."""
        try:
            with atomic(path) as file:
                _save(checkpoint, file)
        except OSError as error:
            self.failure = error.strerror or str(error)
            kept = f"the last one that is whole is {self.whole}" if self.whole else "an older file is as it was"
            rank_zero_warn(
                f"The checkpoint {path} of step {checkpoint.get('global_step')} could not be written: {self.failure}. "
                f"Training goes on; {kept}."
            )
            return
        self.failure, self.whole = None, str(path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint to the CPU, always without executing anything that it holds; the options are ignored."""
        from diffusion_lit.storage.checkpoints import read_training_state

        if Path(path).name == ".temp.ckpt":  # bare weights, handed back by forked ranks
            return cast(dict[str, Any], torch.load(path, map_location="cpu", weights_only=True))
        return read_training_state(path)

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a checkpoint, unless the newer one that replaces it could not be written."""
        if self.failure is None:
            Path(path).unlink(missing_ok=True)


class _Checked:
    """A file that keeps its first error, which `torch.save` replaces by one of its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def _save(checkpoint: dict[str, Any], file: IO[bytes]) -> None:
    checked = _Checked(file)
    try:
        torch.save(checkpoint, cast(Any, checked))
    except RuntimeError as error:
        raise (checked.error or error) from error
