"""Images in chunks that litdata wrote, read by their row: in place, or through a cache on this machine's disk.

A set is a folder or URL with `catalogue.json` and a folder for each split, of litdata's `index.json` and chunks, and of
`items.dat`, which holds the class and a hash of each image. A chunk of n images is

    n, n + 1 offsets (uint32)         then, for each image,
    28 + C x H x W, 8 (uint32)        the sizes of its two parts: a numpy array and an integer
    type, 3, C, H, W (uint32)         and the pixels (uint8); then the class (int64)

so that each image lies where arithmetic says. litdata can read more kinds of items, among them pickles, which run
code. Nothing here interprets them: an index that names another kind is refused, and so is an image whose hash is not as
it was when it was written.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.catalogue import WRITE, BadChunkError, hash_of
from datamodules.chunk_store import Chunk, Store

UINT8 = 4  # litdata's number of the type
HEADER, LABEL = 20, 8  # bytes before the pixels of an item, and after them


class Chunked:
    """The images of chunks as one array, uint8 (N, C, H, W), of which rows are read when they are asked for.

    Args:
        store: The files.
        chunks: The chunks, one after the other.
    """

    def __init__(self, store: Store, chunks: Sequence[Chunk]) -> None:
        self.store = store
        self.chunks = list(chunks)
        self.counts = np.array([len(chunk.items) for chunk in self.chunks], dtype=np.int64)
        self.starts = np.cumsum(self.counts) - self.counts

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (N, C, H, W)."""
        return (len(self), *self.store.catalogue.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return int(np.prod(self.shape))

    @property
    def labels(self) -> np.ndarray:
        """The class of each image, int64 (N,)."""
        return np.concatenate([chunk.items["label"] for chunk in self.chunks]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def size(self, chunk: int) -> int:
        """Bytes of a chunk's file."""
        count, item = int(self.counts[chunk]), 8 + HEADER + self.nbytes // len(self) + LABEL
        return 4 * (count + 2) + count * item

    def rows(self, chunk: int) -> Tensor:
        """The rows of a chunk's images, int64 (n,)."""
        return torch.arange(int(self.starts[chunk]), int(self.starts[chunk] + self.counts[chunk]))

    def fetch(self, chunk: int) -> Path:
        """Has a chunk on this machine; see `Store.fetch`."""
        return self.store.fetch(self.chunks[chunk].name, self.size(chunk))

    def keep(self, chunks: Sequence[int]) -> None:
        """Keeps what is there of some chunks while others are fetched; see `Store.keep`."""
        for chunk in chunks:
            self.store.keep(self.chunks[chunk].name)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Images (B, C, H, W) at a slice or an array of rows, or the image (C, H, W) at one."""
        places = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows, np.int64)
        if places.size and not -len(self) <= places.min() <= places.max() < len(self):
            raise IndexError(f"There are {len(self)} images, and none of them is {places.min()} or {places.max()}.")
        flat = np.atleast_1d(np.where(places < 0, places + len(self), places))
        images = np.empty((len(flat), *self.shape[1:]), np.uint8)
        owners = np.searchsorted(self.starts, flat, "right") - 1
        for chunk in np.unique(owners).tolist():
            mine = np.flatnonzero(owners == chunk)
            self._read(chunk, (flat[mine] - self.starts[chunk]).tolist(), images, mine.tolist())
        return images if places.ndim else images[0]

    def _read(self, chunk: int, numbers: list[int], images: np.ndarray, rows: list[int]) -> None:
        """Reads some images of a chunk into the rows of an array."""
        pixels = self.nbytes // len(self)
        item = 8 + HEADER + pixels + LABEL
        head = np.array([HEADER + pixels, LABEL, UINT8, 3, *self.shape[1:]], "<u4").tobytes()
        first = 4 * (int(self.counts[chunk]) + 2)
        descriptor = self._open(chunk)
        try:
            for number, row in zip(numbers, rows, strict=True):
                raw = os.pread(descriptor, item, first + number * item)
                body = raw[len(head) : len(head) + pixels]
                if len(raw) != item or raw[: len(head)] != head or hash_of(body) != self.chunks[chunk].items[number][0]:
                    raise BadChunkError(
                        f"Image {number} of {self.store.root}/{self.chunks[chunk].name} is not as it was written: the "
                        f"file is damaged or another one; {WRITE}"
                        + (f", or empty {self.store.folder}." if self.store.remote else ".")
                    )
                images[row] = np.frombuffer(body, np.uint8).reshape(self.shape[1:])
        finally:
            os.close(descriptor)

    def _open(self, chunk: int) -> int:
        """Opens a chunk, fetched once more where another process made room at that moment."""
        for trial in range(5):
            path = self.fetch(chunk)
            try:
                return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            except FileNotFoundError as error:
                if trial == 4 or not self.store.remote:
                    raise FileNotFoundError(f"{path} is gone; {WRITE}.") from error
        raise AssertionError("unreachable")
