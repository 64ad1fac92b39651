"""Samples as an .npz that is written batch by batch, so that memory holds one batch.

The file is written under a temporary name, with its space reserved, and renamed when complete. If the work ends early
(an interrupt, an error, a full disk), the samples so far are in NAME.partial.npz.
"""

import contextlib
import os
import zipfile
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from diffusion_lit.storage.room import reserve

SLACK = 2**16  # bytes for headers, and for pixels that do not compress
BLOCK = 2**20


class SampleArchive:
    """Writes `arr_0`, uint8 images N x H x W x C, batch by batch, and `labels` where there are classes.

    Args:
        path: The .npz file.
        shape: Shape (N, H, W, C) of the images.
        labels: Class of each, int64 (N,), or None.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], labels: np.ndarray[Any, Any] | None) -> None:
        self.path = path
        self.shape = shape
        self.labels = labels
        self.rows = 0  # written so far
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self.partial: Path | None = None

    def __enter__(self) -> "SampleArchive":
        """Opens the file and claims its room.

        Raises:
            OSError: If it cannot be written, or the disk has too little room.
        """
        try:
            self.file = self.temporary.open("w+b")
            size = int(np.prod(self.shape)) + (0 if self.labels is None else self.labels.nbytes)
            reserve(self.file, size + size // 1000 + SLACK, self.temporary)
        except OSError as error:
            self._discard()
            raise OSError(f"The samples cannot be written to {self.path}: {error.strerror or error}.") from error
        self.archive = zipfile.ZipFile(self.file, "w", zipfile.ZIP_DEFLATED)
        if self.labels is not None:
            with self.archive.open("labels.npy", "w") as member:
                np.lib.format.write_array(member, self.labels)
        self.member: IO[bytes] = self.archive.open("arr_0.npy", "w", force_zip64=True)
        header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(self.member, header)
        return self

    def add(self, images: np.ndarray[Any, Any]) -> None:
        """Writes the next images.

        Args:
            images: uint8 (B, H, W, C).

        Raises:
            OSError: If the disk is full after all.
        """
        self.member.write(np.ascontiguousarray(images).tobytes())
        self.rows += len(images)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives the file its name where all is there, else keeps what is."""
        try:
            if kind is None:
                self._close()
                os.fsync(self.file.fileno())
                os.replace(self.temporary, self.path)
            elif self.rows:
                with contextlib.suppress(OSError, ValueError):
                    self._close()
                    self.partial = self._rescue()
        finally:
            self._discard()

    def _close(self) -> None:
        """Ends the zip and gives back the room that it did not need."""
        self.member.close()
        self.archive.close()
        self.file.truncate(self.file.tell())
        self.file.flush()

    def _rescue(self) -> Path:
        """Copies the rows that are whole into an archive of their own."""
        path = self.path.with_suffix(".partial.npz")
        row = int(np.prod(self.shape[1:]))
        labels = None if self.labels is None else self.labels[: self.rows]
        step = max(1, BLOCK // row)
        with (
            zipfile.ZipFile(self.temporary).open("arr_0.npy") as member,
            SampleArchive(path, (self.rows, *self.shape[1:]), labels) as kept,
        ):
            np.lib.format.read_magic(member)
            np.lib.format.read_array_header_1_0(member)
            for start in range(0, self.rows, step):
                count = min(step, self.rows - start)
                kept.add(np.frombuffer(member.read(count * row), np.uint8).reshape(count, *self.shape[1:]))
        return path

    def _discard(self) -> None:
        for part in ("member", "archive", "file"):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                getattr(self, part).close()
        with contextlib.suppress(OSError):
            self.temporary.unlink(missing_ok=True)
