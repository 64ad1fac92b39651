"""A lock on a file that ends with its process, however that ends."""

import contextlib
import errno
import os
import socket
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

HELD = (errno.EACCES, errno.EAGAIN)


class ProcessLock:
    """A POSIX record lock: it belongs to this process, not to its children, and ends with it, after SIGKILL too.

    Locks nothing on Windows and on file systems without locks.

    Args:
        path: The file, made where it is missing.

    Raises:
        BlockingIOError: If another process holds it; the message says which.
        OSError: If the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (open as long as it is held)
        if fcntl is None:
            return
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in HELD:
                return  # a file system without locks
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            raise BlockingIOError(error.errno, f"held by {holder or 'another process'}", str(path)) from None
        with contextlib.suppress(OSError):  # a full disk
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._file.flush()

    def release(self) -> None:
        """Gives the lock back."""
        with contextlib.suppress(OSError):
            self._file.close()
