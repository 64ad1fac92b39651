"""A thread that ends a process that hangs, was asked twice to stop, or lost its parent.

A main thread that waits in a collective, a system call or a kernel runs no Python, so signal handlers and hooks never
run. This thread does. If the main thread stays at the same instruction in each of its frames, with no batch finished
(`beat`) and no progress bar moved, for longer than the patience, it hangs. Then the thread says where each rank stands
and ends the process. Checkpoints are written atomically, so the last one stays intact.
"""

import contextlib
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from diffusion_lit.runtime.installation import PROGRAM

PERIOD = 2.0  # seconds between two looks
GRACE = 5.0  # seconds that a second signal's own handler has
SAME = 1.0  # signals this many seconds apart are one: a launcher passes on what a terminal sends to all by itself
HERE = Path(__file__).resolve().parents[2]
STOPPING = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}

_beats = 0
_waiting: list[str] = []
_thread: "_Watch | None" = None


def beat() -> None:
    """Reports progress; to be called in long loops without a progress bar."""
    global _beats
    _beats += 1


@contextlib.contextmanager
def waiting(reason: str) -> Iterator[None]:
    """Within this context the main thread may wait for any time."""
    _waiting.append(reason)
    try:
        yield
    finally:
        _waiting.pop()


def watch(patience: float = 0.0, rank: int = 0) -> None:
    """Starts to watch the main thread, which calls this; it replaces an earlier watch.

    Args:
        patience: Seconds that it may stand in one place; 0 for any time.
        rank: This rank; those above 0 also end when the process that started them is gone.
    """
    global _thread
    rest()
    _thread = _Watch(patience, rank)
    _thread.start()


def rest() -> None:
    """Stops watching."""
    global _thread
    if _thread is not None and _thread.pid == os.getpid():
        _thread.stop()
    _thread = None


def end_within(seconds: float, reason: str) -> None:
    """Gives a process that is failing so long to end by itself.

    Args:
        seconds: How long.
        reason: Why it is failing, to be said if it does not.
    """
    if _thread is not None:
        _thread.deadline = (time.monotonic() + seconds, reason)


# A loader's process must not tell its parent's watch of signals of its own.
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


class _Watch(threading.Thread):
    def __init__(self, patience: float, rank: int) -> None:
        super().__init__(daemon=True, name="watchdog")
        self.patience, self.rank = patience, rank
        self.pid, self.parent = os.getpid(), os.getppid()
        self.main: Any = threading.main_thread().ident
        self.deadline: tuple[float, str] | None = None
        self.heard, self.ours = socket.socketpair()
        for end in (self.heard, self.ours):
            end.setblocking(False)
        self.before: int | None = None
        if threading.current_thread() is threading.main_thread():
            # Written to by C code when a signal comes, also while the main thread is within C code itself.
            self.before = signal.set_wakeup_fd(self.ours.fileno(), warn_on_full_buffer=False)
        self.stopped = False

    def stop(self) -> None:
        self.stopped = True
        if self.before is not None and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self.before)
        with contextlib.suppress(OSError):
            self.ours.send(b"\0")

    def run(self) -> None:
        stands, since, heard = None, time.monotonic(), float("inf")
        selector = selectors.DefaultSelector()
        selector.register(self.heard, selectors.EVENT_READ)
        while True:
            for _ in selector.select(PERIOD):
                numbers = [number for number in self.heard.recv(64) if number in STOPPING]
                if numbers and time.monotonic() < heard:
                    heard = time.monotonic()
                elif numbers and time.monotonic() - heard > SAME:
                    name = STOPPING[signal.Signals(numbers[-1])]
                    self.deadline = (time.monotonic() + GRACE, f"it was stopped at once by a second {name}")
                    self.status = 128 + numbers[-1]
            if self.stopped:
                break
            now = time.monotonic()
            if self.rank > 0 and os.getppid() != self.parent:
                self.end("the process that started it is gone")
            if self.deadline is not None and now > self.deadline[0]:
                self.end(self.deadline[1])
            here = self.place()
            if here != stands or _waiting:
                stands, since = here, now
            elif self.patience and now - since > self.patience:
                self.hangs(now - since)
        for end in (self.heard, self.ours):
            end.close()
        selector.close()

    status = 1

    def frames(self) -> list[FrameType]:
        """The main thread's frames, the innermost first."""
        frame, found = sys._current_frames().get(self.main), []
        while frame is not None:
            found.append(frame)
            frame = frame.f_back
        return found

    def place(self) -> Any:
        """Where the main thread stands, and how far the work has got."""
        bars = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
        try:
            done = sum(bar.n for bar in list(getattr(bars, "_instances", ())))
        except RuntimeError:  # a bar came or went meanwhile: something moves
            done = time.monotonic()
        return tuple((id(frame.f_code), frame.f_lasti) for frame in self.frames()), _beats, done

    def hangs(self, seconds: float) -> None:
        """Reports where the main thread hangs, waits for the reports of other ranks, and ends the process."""
        self.say(
            f"rank {self.rank} has stood in one place for {seconds / 60:.3g} minutes, {name_place(self.frames())}, so "
            "the run is ended. Ranks that wait for each other are the likely cause; each says where it stood. What was "
            "saved last is whole; go on from it with --ckpt_path last. --watchdog.minutes N is more patient; 0 never "
            "ends a run."
        )
        time.sleep(3 * PERIOD)
        os._exit(1)

    def end(self, reason: str) -> None:
        """Says why, and ends the process."""
        self.say(f"rank {self.rank} is ended: {reason}. What was saved last is whole.")
        os._exit(self.status)

    def say(self, text: str) -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"\n{PROGRAM}: {text}\n".encode())


def name_place(frames: list[FrameType]) -> str:
    """Names the position of a thread: the hook of a callback or module, and the line of this project.

    Args:
        frames: Its frames, the innermost first.

    Returns:
        Such as "in SampleGrid.on_validation_epoch_end (diffusion_lit/callbacks/samples.py:44)".
    """
    ours = [frame for frame in frames if frame.f_code.co_filename.startswith(str(HERE)) and ".venv" not in
            frame.f_code.co_filename.removeprefix(str(HERE))]  # fmt: skip
    named = ""
    for frame in reversed(frames):  # the outermost hook
        owner = frame.f_locals.get("self")
        if frame.f_code.co_name.startswith("on_") and owner is not None:
            kinds = [base.__name__ for base in type(owner).__mro__]
            if "Callback" in kinds or "LightningModule" in kinds:
                named = f"in {type(owner).__name__}.{frame.f_code.co_name} "
                break
    innermost = next(iter(ours or frames), None)
    if innermost is None:
        return named or "nowhere"
    path = Path(innermost.f_code.co_filename)
    short = path.relative_to(HERE) if path.is_relative_to(HERE) else path
    inside = f", in {frames[0].f_code.co_name}" if frames and frames[0] is not innermost else ""
    return f"{named or 'at '}({short}:{innermost.f_lineno}{inside})"
