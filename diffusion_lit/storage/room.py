"""Reserves disk space before work begins, so that a full disk is reported at once."""

import errno
import os
import shutil
from pathlib import Path
from typing import IO


def reserve(file: IO[bytes], size: int, path: Path) -> None:
    """Makes an open file as large as it may become and claims its room.

    Args:
        file: The file, open for writing.
        size: Bytes.
        path: Its name, whose disk is asked.

    Raises:
        OSError: If there is not so much room.
    """
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise OSError(errno.ENOSPC, f"it takes {size / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free", str(path))
    file.truncate(size)
    if size and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)


def try_folder(folder: Path) -> None:
    """Makes a folder and writes a test file, so that missing permissions are reported before any work.

    Raises:
        OSError: If it cannot be made or written to; the message names it and the way out.
    """
    trial = folder / f".trial.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(b"\0" * 4096)
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror or str(error)
        raise OSError(
            f"Nothing can be written to {folder} ({reason}); give a folder that may be written to and has room."
        ) from error
    finally:
        if trial.parent.is_dir():
            trial.unlink(missing_ok=True)


def fits_in_memory(size: int) -> bool:
    """Whether this many bytes fit: at most half of the machine's memory, if that is known."""
    try:
        return size <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    except (AttributeError, ValueError, OSError):  # Windows, or a system that does not say
        return True
