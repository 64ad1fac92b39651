"""Results computed from a file, kept while the file is unchanged."""

import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")
SETTLED = 100_000_000  # ns after a change within which a second one may bear the same time


class Unchanged(Generic[T]):
    """Results by the file that they were made from: its name, place on the disk, size and times.

    Args:
        count: How many are kept, the last used ones.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._kept: OrderedDict[tuple[object, ...], T] = OrderedDict()

    def get(self, path: Path, make: Callable[[], T]) -> T:
        """The result for a file, computed if it is unknown or the file has changed.

        Args:
            path: The file, or a folder, of which each file counts.
            make: Makes it, and raises where there is no such file.

        Returns:
            The result, shared with other callers.
        """
        state = _state(path)
        if state is None:
            return make()
        if state in self._kept:
            self._kept.move_to_end(state)
            return self._kept[state]
        made = make()
        if _state(path) == state:
            self._kept[state] = made
            while len(self._kept) > self.count:
                self._kept.popitem(last=False)
        return made

    def clear(self) -> None:
        """Forgets all."""
        self._kept.clear()


def _state(path: Path) -> tuple[object, ...] | None:
    """The state of a file that changes with it; None if there is no file or it changed just now."""
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        found = [file.stat() for file in files]
    except OSError:
        return None
    if any(time.time_ns() - max(one.st_mtime_ns, one.st_ctime_ns) < SETTLED for one in found):
        return None
    return (path.resolve(), *((one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for one in found))
