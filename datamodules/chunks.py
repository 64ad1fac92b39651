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

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datamodules.files import first_line
from diffusion_lit.runtime.lock import Lock
from diffusion_lit.storage.cache import cache_folder
from diffusion_lit.storage.room import try_folder

FORMAT = 1  # of the catalogue
KINDS = ["numpy", "int"]  # of litdata's items: pixels and class
ITEM = np.dtype([("hash", "<u8"), ("label", "<i4")])  # of items.dat
UINT8 = 4  # litdata's number of the type
HEADER, LABEL = 20, 8  # bytes before the pixels of an item, and after them
SCHEMES = ("s3://", "gs://", "r2://", "azure://", "hf://", "local:")
WRITE = "make the set anew with python -m datamodules.write_chunks"


class BadChunkError(ValueError):
    """A set that is not as it was written."""


class Chunk(NamedTuple):
    """One file of a split: its name below the root, and its images and their hashes and classes (`ITEM`)."""

    name: str
    items: np.ndarray


def hash_of(pixels: bytes) -> int:
    """The hash of an image as items.dat has it: the first 8 bytes of its SHA-256."""
    return int.from_bytes(hashlib.sha256(pixels).digest()[:8], "little")


@dataclass
class Catalogue:
    """What a set holds.

    Args:
        shape: Shape (C, H, W) of all images.
        classes: Names of the classes by their numbers; empty where there are none.
        counts: Images of each split.
        hashes: Of each split, the SHA-256 of its items.dat.
    """

    shape: tuple[int, int, int]
    classes: list[str]
    counts: dict[str, int]
    hashes: dict[str, str]

    def record(self) -> dict[str, Any]:
        """The catalogue as plain values."""
        return {"format": FORMAT, **self.__dict__}

    @classmethod
    def parse(cls, text: bytes, where: str) -> "Catalogue":
        """Reads a catalogue.

        Args:
            text: The file.
            where: What messages call it.

        Raises:
            BadChunkError: If it is none.
        """
        try:
            found = json.loads(text)
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']!r}")
            channels, height, width = (int(side) for side in found["shape"])
            if channels not in (1, 3) or not 1 <= height == width <= 4096:
                raise ValueError(f"shape {found['shape']!r}")
            counts = {str(split): int(count) for split, count in found["counts"].items()}
            hashes = {split: str(found["hashes"][split]) for split in counts}
            if set(counts) - {"train", "val", "test"} or min(counts.values()) < 1:
                raise ValueError(f"counts {found['counts']!r}")
            return cls((channels, height, width), [str(name) for name in found["classes"]], counts, hashes)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise BadChunkError(f"{where} is no catalogue of this version ({first_line(error)}); {WRITE}.") from error


class Store:
    """The files of a set: where they are, or in a cache of limited size.

    Several processes and threads may share a cache: a chunk is fetched by one of them, and what was not used for the
    longest time makes room.

    Args:
        root: A folder, or a URL of litdata's: s3://, gs://, r2://, azure://, hf://, or local:FOLDER for a folder on
            another disk that is to be read through the cache.
        cache_dir: Folder of the caches; `chunks` in the folder of all caches by default.
        cache_bytes: Bytes of chunks that the cache of this set may hold.
    """

    def __init__(self, root: str, cache_dir: Path | None, cache_bytes: float) -> None:
        self.root = root.rstrip("/")
        self.cache_bytes = cache_bytes
        self._caches = cache_folder() / "chunks" if cache_dir is None else cache_dir

    @property
    def remote(self) -> bool:
        """Whether the set is read through the cache."""
        return self.root.startswith(SCHEMES)

    @cached_property
    def catalogue(self) -> Catalogue:
        """What the set holds, read anew by each process."""
        return Catalogue.parse(self._catalogue, f"{self.root}/catalogue.json")

    @cached_property
    def _catalogue(self) -> bytes:
        if not self.remote:
            try:
                return Path(self.root, "catalogue.json").read_bytes()
            except OSError as error:
                raise FileNotFoundError(
                    f"{self.root}/catalogue.json cannot be read ({error.strerror}); root is a folder or URL that "
                    "python -m datamodules.write_chunks wrote."
                ) from error
        try_folder(self._caches)
        with tempfile.TemporaryDirectory(prefix=".catalogue-", dir=self._caches) as scratch:
            place = Path(scratch, "catalogue.json")  # one that is there already would be taken for the newest
            self._download(place.name, place)
            return place.read_bytes()

    @cached_property
    def folder(self) -> Path:
        """Where the files lie on this machine: a set that was written anew has a new cache."""
        if not self.remote:
            return Path(self.root)
        return self._caches / hashlib.sha256(self.root.encode() + b"\0" + self._catalogue).hexdigest()[:32]

    def fetch(self, name: str, size: int | None = None) -> Path:
        """Has a file on this machine.

        Args:
            name: Its name below the root.
            size: Its bytes, of a chunk.

        Returns:
            Its path.

        Raises:
            OSError: If it cannot be fetched.
        """
        place = self.folder / name
        if not self.remote:
            return place
        if not self._there(place, size):
            with Lock(place.with_name(f"{place.name}.fetch"), lambda: None):  # litdata's own lock is NAME.lock
                if not self._there(place, size):
                    place.unlink(missing_ok=True)
                    self._make_room(size or 0)
                    self._download(name, place)
        return place

    def _there(self, place: Path, size: int | None) -> bool:
        """Whether a file is in the cache and whole; it counts as used now."""
        try:
            if size is not None and place.stat().st_size != size:
                return False
            os.utime(place)
        except FileNotFoundError:
            return False
        return True

    def _make_room(self, size: int) -> None:
        """Removes the chunks that were not used for the longest time until one more fits; open ones stay readable."""
        chunks = []
        for path in self.folder.glob("*/*.bin"):
            with contextlib.suppress(FileNotFoundError):  # another process removes them too
                status = path.stat()
                chunks.append((status.st_mtime_ns, status.st_size, path))
        total = size + sum(bytes_ for _, bytes_, _ in chunks)
        for _, bytes_, path in sorted(chunks):
            if total <= self.cache_bytes:
                return
            path.unlink(missing_ok=True)
            total -= bytes_

    def _download(self, name: str, place: Path) -> None:
        """Fetches a file by litdata, which writes it under another name first."""
        downloader = downloader_of(self.root, str(place.parent))
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            downloader.download_file(f"{self.root}/{name}", str(place))
            found = place.exists()
        except Exception as error:  # each cloud's library has its own
            raise OSError(f"{self.root}/{name} cannot be fetched to {place.parent} ({first_line(error)}).") from error
        if not found:
            raise OSError(f"{self.root}/{name} was not fetched to {place.parent}; is it there, and is there room?")

    def chunks(self, split: str) -> list[Chunk]:
        """The chunks of a split.

        Args:
            split: "train", "val" or "test".

        Raises:
            BadChunkError: If the index, the items and the catalogue do not belong together, or items are not of the
                kinds that are read here.
        """
        if split not in self.catalogue.counts:
            return []
        where = f"{self.root}/{split}"
        items = self._items(split)
        try:
            index = json.loads(self.fetch(f"{split}/index.json").read_bytes())
            config = index["config"]
            kinds, packed = config["data_format"], config.get("compression") or config.get("encryption")
            files = [(str(chunk["filename"]), int(chunk["chunk_size"])) for chunk in index["chunks"]]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise BadChunkError(f"{where}/index.json is no index of litdata ({first_line(error)}); {WRITE}.") from error
        if kinds != KINDS or packed:
            raise BadChunkError(
                f"{where}/index.json has items of the kinds {str(kinds)[:80]}{', packed' if packed else ''}; only "
                f"{KINDS} are read, since others may run code. {WRITE[0].upper()}{WRITE[1:]}."
            )
        for name, count in files:
            if not re.fullmatch(r"[A-Za-z0-9_-]+\.bin", name) or count < 1:
                raise BadChunkError(f"{where}/index.json names a chunk {name[:80]!r} of {count} images; {WRITE}.")
        ends = np.cumsum([count for _, count in files])
        if not files or ends[-1] != len(items):
            raise BadChunkError(f"{where} has {ends[-1:]} images in its index and {len(items)} in items.dat; {WRITE}.")
        return [
            Chunk(f"{split}/{name}", items[end - count : end])
            for (name, count), end in zip(files, ends.tolist(), strict=True)
        ]

    def _items(self, split: str) -> np.ndarray:
        """The hashes and classes of a split's images."""
        path = self.fetch(f"{split}/items.dat")
        count = self.catalogue.counts[split]
        try:
            if path.stat().st_size != count * ITEM.itemsize:
                raise BadChunkError(f"{self.root}/{split}/items.dat is not of {count} images; {WRITE}.")
            items = np.memmap(path, ITEM, "r")
        except OSError as error:
            raise FileNotFoundError(f"{path} cannot be read ({error.strerror}); {WRITE}.") from error
        if hashlib.sha256(items.tobytes()).hexdigest() != self.catalogue.hashes[split]:
            raise BadChunkError(f"{self.root}/{split}/items.dat is not as it was written; {WRITE}.")
        return items


def downloader_of(root: str, folder: str) -> Any:
    """The downloader of litdata for a URL.

    Args:
        root: The URL.
        folder: Where the files go.

    Raises:
        ModuleNotFoundError: If litdata is not installed.
    """
    try:
        from litdata.streaming.downloader import get_downloader
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{root} is read by litdata, which is not installed; pip install 'diffusion-lit[streaming]'."
        ) from error
    return get_downloader(root, folder, [])


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
