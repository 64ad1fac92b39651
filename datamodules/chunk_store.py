"""The files of a set in chunks: in place, or through a cache on this machine's disk; see `chunks`."""

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datamodules.catalogue import ITEM, WRITE, BadChunkError, Catalogue
from diffusion_lit.runtime.lock import Lock
from diffusion_lit.storage.cache import cache_folder
from diffusion_lit.storage.room import try_folder
from diffusion_lit.words import first_line

KINDS = ["numpy", "int"]  # of litdata's items: pixels and class
SCHEMES = ("s3://", "gs://", "r2://", "azure://", "hf://", "local:")


class Chunk(NamedTuple):
    """One file of a split: its name below the root, and its images and their hashes and classes (`ITEM`)."""

    name: str
    items: np.ndarray


class Store:
    """The files of a set: where they are, or in a cache of limited size.

    Several processes and threads may share a cache: a chunk is fetched by one of them, and what was not used for the
    longest time makes room. While NAME is fetched, NAME.fetch is locked and as long as NAME will be, so that all of
    them count the bytes that are on their way.

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
        """What the set holds; each process reads it itself."""
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
        """Where the files lie on this machine: a rewritten set has a new cache."""
        if not self.remote:
            return Path(self.root)
        return self._caches / hashlib.sha256(self.root.encode() + b"\0" + self._catalogue).hexdigest()[:32]

    def fetch(self, name: str, size: int | None = None) -> Path:
        """Has a file on this machine.

        Args:
            name: Its name below the root.
            size: Its bytes, of a chunk.

        Raises:
            OSError: If it cannot be fetched.
        """
        place = self.folder / name
        if not self.remote:
            return place
        if not self._there(place, size):
            claim = place.with_name(f"{place.name}.fetch")  # litdata's own lock is NAME.lock
            with Lock(claim, lambda: None):
                if not self._there(place, size):
                    place.unlink(missing_ok=True)
                    try:
                        self._make_room(claim, size or 0)
                        self._download(name, place)
                        _mark_used(place)
                    finally:
                        os.truncate(claim, 0)
        return place

    def keep(self, name: str) -> None:
        """Counts a file that is in the cache as used now, so that others make room first.

        Args:
            name: Its name below the root.
        """
        if self.remote:
            self._there(self.folder / name, None)

    def _there(self, place: Path, size: int | None) -> bool:
        """Whether a file is in the cache and whole; it counts as used now."""
        try:
            if size is not None and place.stat().st_size != size:
                return False
            _mark_used(place)
        except FileNotFoundError:
            return False
        return True

    def _make_room(self, claim: Path, size: int) -> None:
        """Claims room for a chunk, and removes those that were not used for the longest time until all fit.

        Chunks that are open stay readable.
        """
        with Lock(self.folder / "room", lambda: None):
            os.truncate(claim, size)
            coming = {path.with_suffix(""): status.st_size for path, status in self._files("*/*.bin.fetch")}
            chunks = dict(self._files("*/*.bin"))  # after what is coming, which may have come meanwhile
            total = sum({**coming, **{path: status.st_size for path, status in chunks.items()}}.values())
            for path in sorted(chunks, key=lambda path: chunks[path].st_mtime_ns):
                if total <= self.cache_bytes:
                    return
                path.unlink(missing_ok=True)
                total -= chunks[path].st_size

    def _files(self, pattern: str) -> Iterator[tuple[Path, os.stat_result]]:
        """Files of the cache with their sizes and times."""
        for path in self.folder.glob(pattern):
            with contextlib.suppress(FileNotFoundError):  # another process removes them too
                yield path, path.stat()

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


def _mark_used(place: Path) -> None:
    """Sets a file's time to now, in nanoseconds; by itself the system sets it to the last tick of its clock."""
    now = time.time_ns()
    os.utime(place, ns=(now, now))


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
