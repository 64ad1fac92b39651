"""Processes that are stopped when this one is."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Children:
    """The running processes, so that they can be stopped."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopped = False
        self._lock = threading.Lock()

    def run(self, command: list[str], **options: Any) -> int:
        """Runs a command to its end and gives its exit status."""
        with self._lock:
            if self.stopped:
                return 143
            child = subprocess.Popen(command, start_new_session=True, **options)  # Ctrl-C reaches them by `stop` alone
            self.running.add(child)
        try:
            return child.wait()
        finally:
            self.running.discard(child)

    def stop(self) -> None:
        """Asks all to save and end, and waits for them."""
        with self._lock:
            self.stopped = True
            running = list(self.running)
        for child in running:
            child.terminate()
        for child in running:
            child.wait()


@contextmanager
def ended_with_this(stop: Callable[[], None]) -> Iterator[None]:
    """Within this context, processes are stopped when this one is interrupted or terminated.

    Args:
        stop: Stops them.
    """
    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    except BaseException:
        stop()
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
