"""Decodes many images in parallel, into one file, with a progress bar.

Process w of W takes the images w, w + W, w + 2W, ... and writes each to its row. There is no lock and no queue, so that
a process that dies (a crashing decoder, too little memory) costs one image and is replaced. A process whose parent is
gone exits. Huge images are decoded one at a time, which bounds the memory.
"""

import contextlib
import math
import mmap
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from datamodules.decode import BadImageError, Transform, decode
from datamodules.sources import Listing
from diffusion_lit.runtime.lock import Lock

FEW = 64  # up to this many images, processes do not pay
MOST_PROCESSES = 16
PATIENCE = 0.2  # seconds between two looks at the progress


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
    reasons: dict[int, str] = {}
    pause = 0.5 if sys.stderr.isatty() else 15  # seconds between two states of the bar
    with tqdm(total=len(names), desc="Preparing images", unit="", delay=1, mininterval=pause) as bar:
        if processes <= 1 or len(names) <= FEW or "fork" not in multiprocessing.get_all_start_methods():
            for number, reason in _decode_some(listing, names, transform, path, 0, 1):
                bar.update()
                if reason:
                    reasons[number] = reason
                    if strict:
                        break
            return reasons
        pool = DecoderPool(listing, names, transform, path, processes)
        try:
            for done, found in pool.run():
                bar.update(done - bar.n)
                reasons |= found
                if strict and reasons:
                    break
        finally:
            pool.stop()
    return reasons


class CannotWriteError(OSError):
    """A process could not write to the file."""


class DecoderPool:
    """Processes that decode, and for each the number of images that it and its predecessors have dealt with.

    Args:
        listing: Where the images lie.
        names: Their names.
        transform: What to make of each.
        path: The file that is written to.
        size: Number of processes.
    """

    def __init__(self, listing: Listing, names: list[str], transform: Transform, path: Path, size: int) -> None:
        self.work = (listing, names, transform, path)
        self.count = len(names)
        self.size = size
        self.context = multiprocessing.get_context("fork")
        self.done = np.frombuffer(mmap.mmap(-1, 8 * size), np.int64)  # one for each process, in shared memory
        self.processes: list[Any] = [None] * size
        self.pipes: list[Connection | None] = [None] * size

    def start(self, worker: int) -> None:
        """Starts one process where its predecessor stopped."""
        ours, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_run, args=(self, worker, theirs, os.getpid()), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process closes the pipe
        self.processes[worker], self.pipes[worker] = process, ours

    def run(self) -> Iterator[tuple[int, dict[int, str]]]:
        """Starts all and watches them.

        Yields:
            The number of images dealt with so far, and what was found wrong since.
        """
        for worker in range(self.size):
            self.start(worker)
        while any(pipe is not None for pipe in self.pipes):
            found: dict[int, str] = {}
            ready = wait([pipe for pipe in self.pipes if pipe is not None], PATIENCE)
            for worker, pipe in enumerate(self.pipes):
                if pipe is not None and pipe in ready:
                    found |= self._listen(worker, pipe)
            yield int(self.done.sum()), found

    def _listen(self, worker: int, pipe: Connection) -> dict[int, str]:
        """The report of a process; if it died early, the image that it was decoding is to blame."""
        try:
            number, reason = pipe.recv()
            if number < 0:
                raise CannotWriteError(*reason)
            return {number: reason}
        except CannotWriteError:
            raise
        except (EOFError, OSError):
            pipe.close()
            self.pipes[worker] = None
            self.processes[worker].join()
        number = worker + self.size * int(self.done[worker])
        if number >= self.count:
            return {}
        code = self.processes[worker].exitcode
        self.done[worker] += 1
        self.start(worker)
        return {number: f"ended the process that decoded it (exit status {code}; short of memory?)"}

    def stop(self) -> None:
        """Ends all processes."""
        for process in self.processes:
            if process is not None and process.is_alive():
                process.kill()
        for process in self.processes:
            if process is not None:
                process.join()


def _run(pool: DecoderPool, worker: int, pipe: Connection, parent: int) -> None:
    """What a process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt reaches the parent, which stops us
    listing, names, transform, path = pool.work
    first = worker + pool.size * int(pool.done[worker])
    try:
        listing.reopen()
        for number, reason in _decode_some(listing, names, transform, path, first, pool.size):
            if os.getppid() != parent:
                return
            if reason:
                pipe.send((number, reason))
            pool.done[worker] += 1
    except OSError as error:  # an error of the disk or the zip; errors of images are reported above
        with contextlib.suppress(OSError):
            pipe.send((-1, (error.errno, error.strerror or str(error))))


def _decode_some(
    listing: Listing, names: list[str], transform: Transform, path: Path, first: int, step: int
) -> Iterator[tuple[int, str | None]]:
    """Decodes every `step`-th image and writes it to its row.

    Yields:
        The image's number, and why it cannot be used or None.
    """
    row = math.prod(transform.row_shape)
    with path.open("r+b", buffering=0) as output:
        for number in range(first, len(names), step):
            try:
                with listing.open(names[number]) as file:
                    array = decode(file, transform, lambda: Lock(path, nullcontext))
                output.seek(number * row)
                output.write(array.tobytes())
                yield number, None
            except BadImageError as error:
                yield number, str(error)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
