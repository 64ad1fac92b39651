"""Decodes many images in parallel, into one file, with a progress bar.

Process w of W takes the images w, w + W, w + 2W, ..., writes each to its row and reports it. They share nothing but the
file, so that a process that dies (a crashing decoder, too little memory) costs one image and is replaced. A process
whose parent is gone exits. Huge images are decoded one at a time, which bounds the memory.
"""

import contextlib
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from datamodules.decode import BadImageError, Transform, decode
from datamodules.sources import Listing
from diffusion_lit.runtime.lock import Lock

FEW = 64  # up to this many images, processes do not pay
MOST_PROCESSES = 16
Decoded = Generator[tuple[int, str | None], None, None]
"""The number of each image that was dealt with, and why it cannot be used or None."""


def decode_all(
    listing: Listing,
    names: list[str],
    transform: Transform,
    path: Path,
    processes: int | None = None,
    strict: bool = False,
) -> dict[int, str]:
    """Decodes images into the rows of a file.

    Args:
        listing: Where the images lie.
        names: Their names, in the order of the rows.
        transform: What to make of each.
        path: The file, which is as large as all rows.
        processes: Number of processes; by default one per core that this process may use, 16 at the most.
        strict: Whether to stop at the first image that cannot be used.

    Returns:
        For the number of each image that cannot be used, why.

    Raises:
        OSError: If the file cannot be written.
    """
    if processes is None:
        processes = min(MOST_PROCESSES, _cores())
    alone = processes <= 1 or len(names) <= FEW or "fork" not in multiprocessing.get_all_start_methods()
    work = partial(_decode_some, listing, names, transform, path)
    decoded = work(range(len(names))) if alone else _by_processes(work, len(names), processes)
    reasons: dict[int, str] = {}
    pause = 0.5 if sys.stderr.isatty() else 15  # seconds between two states of the bar
    with closing(decoded), tqdm(total=len(names), desc="Preparing images", unit="", delay=1, mininterval=pause) as bar:
        for number, reason in decoded:
            bar.update()
            if reason:
                reasons[number] = reason
                if strict:
                    break
    return reasons


def _decode_some(listing: Listing, names: list[str], transform: Transform, path: Path, numbers: range) -> Decoded:
    """Decodes some of the images and writes each to its row."""
    row = math.prod(transform.row_shape)
    with path.open("r+b", buffering=0) as output:
        for number in numbers:
            try:
                with listing.open(names[number]) as file:
                    array = decode(file, transform, lambda: Lock(path, nullcontext))
                output.seek(number * row)
                output.write(array.tobytes())
                yield number, None
            except BadImageError as error:
                yield number, str(error)


def _by_processes(work: Callable[[range], Decoded], count: int, size: int) -> Decoded:
    """Decodes all images in several processes; if one dies, the image that it was decoding is to blame."""
    context = multiprocessing.get_context("fork")
    running: dict[Any, tuple[Any, range]] = {}  # each process by its pipe, and the images that it has to report

    def start(numbers: range) -> None:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(work, numbers, theirs, os.getpid()), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process closes the pipe
        running[ours] = process, numbers

    try:
        for first in range(size):
            start(range(first, count, size))
        while running:
            ready: list[Any] = wait(list(running))
            for pipe in ready:
                process, numbers = running[pipe]
                try:
                    reason = pipe.recv()
                    running[pipe] = process, numbers[1:]
                except (EOFError, OSError):
                    del running[pipe]
                    pipe.close()
                    process.join()
                    if not numbers:
                        continue
                    reason = f"ended the process that decoded it (exit status {process.exitcode}; short of memory?)"
                    start(numbers[1:])
                if isinstance(reason, OSError):
                    raise reason
                yield numbers[0], reason
    finally:
        for process, _ in running.values():
            process.kill()
        for process, _ in running.values():
            process.join()


def _run(work: Callable[[range], Decoded], numbers: range, pipe: Connection, parent: int) -> None:
    """What a process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt reaches the parent, which stops us
    try:
        for _, reason in work(numbers):
            if os.getppid() != parent:
                return
            pipe.send(reason)
    except OSError as error:  # an error of the disk; errors of images are reported above
        with contextlib.suppress(OSError):
            pipe.send(OSError(error.errno, error.strerror or str(error)))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
