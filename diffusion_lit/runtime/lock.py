"""The one lock on a file: it belongs to this process and ends with it, however it ends.

It is `flock` on Linux and macOS and a locked byte on Windows. A file system without locks holds nothing back, and one
that honours them within a machine alone (some network file systems) keeps other machines out no longer.
"""

import contextlib
import errno
import os
import socket
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import IO, Self

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
PLACE = 2**62  # offset of the byte that Windows locks, beyond all contents


class Busy(ValueError):
    """Another holds the lock; the message says who."""


class Lock:
    """Holds a lock on a file from here to `release`, the end of a `with`, or the end of the process.

    Args:
        path: The file; it and its folder are made where they are missing.
        waiting: Where another holds the lock, this is called, what it returns is entered, and the lock is waited for;
            the file's contents are left alone. None refuses instead, and the file names its holder.

    Raises:
        Busy: If another holds it and `waiting` is None; the message is "process N on HOST".
        OSError: If the file cannot be written.
    """

    def __init__(self, path: Path, waiting: Callable[[], AbstractContextManager[object] | None] | None = None) -> None:
        self._file = _opened(path)
        try:
            while not self._taken(path, waiting):
                self._file.close()
                self._file = _opened(path)
        except BaseException:
            self._file.close()
            raise
        _HELD.add(self)
        if waiting is None:
            with contextlib.suppress(OSError):  # a full disk
                self._file.truncate(0)
                self._file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())

    def _taken(self, path: Path, waiting: Callable[[], AbstractContextManager[object] | None] | None) -> bool:
        """Takes the lock; False if the file was removed by the one that held it."""
        if not _try(self._file):
            if waiting is None:
                raise Busy(_holder(path) or "another process")
            with waiting() or nullcontext():
                while not _try(self._file):
                    time.sleep(0.05)
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Gives the lock back, though a child that was just forked has not closed its copy yet."""
        if not self._file.closed and fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)
        self.close()

    def close(self) -> None:
        """Closes the file; another copy of it, of the process that forked this one, keeps the lock."""
        with contextlib.suppress(OSError):
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


_HELD: weakref.WeakSet[Lock] = weakref.WeakSet()


def _let_go() -> None:
    """A child made by fork, such as a worker that reads data, closes its copies, so that none outlives the holder."""
    for lock in list(_HELD):
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _opened(path: Path) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("ab", buffering=0)


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8").strip()
    return ""


def _try(file: IO[bytes]) -> bool:
    """Takes the lock if it is free; true on a file system without locks."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            file.seek(PLACE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    except OSError as error:
        return error.errno not in HELD
    return True
