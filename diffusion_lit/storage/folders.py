"""Folders that are written atomically, even if several processes write the same one, with or without locks.

A folder is written under a scratch name that is unique over hosts and processes, and renamed when complete. Locks only
save work: on a shared file system without locks each host does the work and the first folder stays.
"""

import hashlib
import os
import re
import secrets
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path

ABANDONED = 86400  # seconds without a write after which the scratch folder of another host is taken for left over


def scratch_of(place: Path) -> Path:
    """A name for a folder to write that shall appear at a place.

    Returns:
        A name beside it that no other process of any host uses; the folder is not made.
    """
    return place.with_name(f".{place.name}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}")


def publish(scratch: Path, place: Path, is_sound: Callable[[], bool]) -> None:
    """Renames a folder that is whole to its place.

    Args:
        scratch: The folder.
        place: Where it shall appear.
        is_sound: Whether what already lies at the place may stay; if so, the folder is removed instead.

    Raises:
        OSError: If it cannot be renamed.
    """
    while True:
        try:
            os.rename(scratch, place)
            return
        except OSError:
            if not os.path.lexists(place):
                raise
        if is_sound():  # another process was faster
            _remove(scratch)
            return
        aside = scratch_of(place)
        os.rename(place, aside)
        _remove(aside)


def sweep(place: Path) -> None:
    """Removes the scratch folders of killed processes, but not those of running ones.

    Args:
        place: Where the folders would have appeared.
    """
    pattern = re.compile(re.escape(f".{place.name}.") + r"([0-9a-f]{8})\.([0-9]+)\.[0-9a-f]{8}")
    for left in place.parent.glob(f".{place.name}.*"):
        named = pattern.fullmatch(left.name)
        ours = named is not None and named[1] == _host()
        if (named is not None and ours and not _is_alive(int(named[2]))) or (not ours and _age(left) > ABANDONED):
            _remove(left)


def _is_alive(process: int) -> bool:
    """Whether a process of this host runs; in doubt it does."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _host() -> str:
    """Identifies this machine, and the container in it: 8 hexadecimal digits."""
    space = os.readlink("/proc/self/ns/pid") if os.path.islink("/proc/self/ns/pid") else ""
    return hashlib.sha256(f"{socket.gethostname()} {uuid.getnode()} {space}".encode()).hexdigest()[:8]


def _age(folder: Path) -> float:
    """Seconds since anything in a folder was written."""
    try:
        return time.time() - max(path.stat().st_mtime for path in [folder, *folder.glob("*")])
    except OSError:
        return 0.0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
