"""A lock on a file, which the system releases when its process ends, however it ends.

Uses `flock` on Linux and macOS and a locked byte on Windows; on a network file system that supports neither across
machines it holds within one machine.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

PLACE = 2**30  # offset of the byte that Windows locks, beyond the contents


class Busy(ValueError):
    """Another process holds the lock."""


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Holds a lock, or refuses.

    Args:
        path: The lock's file; its folder is made where it is missing.
        what: What a second process is to be told, with `{}` for "process N" and the way out.

    Yields:
        Nothing.

    Raises:
        Busy: If a process that is alive holds it.
        OSError: If the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _taken(path)
    while file is not None and not _same(file, path):  # its holder has removed it
        file.close()
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _taken(path)
    if file is None:
        holder = path.read_text().strip() if path.is_file() else ""
        raise Busy(what.replace("{}", f"process {holder}" if holder else "another process"))
    with file:
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        file.flush()
        yield


def _taken(path: Path) -> IO[bytes] | None:
    """The file with its lock, or None where another process has it."""
    file = path.open("ab")
    try:
        try:
            import fcntl
        except ImportError:  # Windows
            import msvcrt

            file.seek(PLACE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        return None
    return file


def _same(file: IO[bytes], path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
