"""Atomic writes: a file is written under a temporary name, flushed to the disk and renamed over the old one.

At any moment, also when the machine dies, the name holds the old content or the new.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from diffusion_lit.storage.folders import scratch_of


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[IO[bytes]]:
    """Opens a file for writing, which replaces the old one when it is complete and flushed to disk.

    Args:
        path: Its name; the folder is made where it is missing.

    Raises:
        OSError: If it cannot be written; the old file of that name is as it was and nothing is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{scratch_of(path).name}.tmp")  # no other process of any host has it
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # not every file system can flush a folder
            _flush_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
