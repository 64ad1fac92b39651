"""The prepared cache: every image decoded once, by several processes, into one memory-mapped uint8 array.

A cache is a folder `CACHE_DIR/KEY` with `images.u8` (N x C x H x W bytes) and `index.json` (names, hashes, pools,
skipped files). KEY is a hash of the images' names, sizes and times and of the transform, so that a changed folder or
option makes a new cache. It is written under a temporary name and renamed when complete, so that a killed run leaves no
partial cache. A lock, which the system releases with its process, keeps two runs from doing the same work; without
locks both do it, which is harmless.

Opening a cache reads it once and compares the CRC-32 of the pixels and the SHA-256 of the index with the recorded
values, at more than 1 GB/s; a damaged cache is reported and rebuilt. If the disk is full, the images are decoded into
memory.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from datamodules.decode import BadImageError, Transform, significant_bits, way_in
from datamodules.decode_pool import decode_all
from datamodules.sources import Image, Listing, Skip, printable
from diffusion_lit.runtime.lock import Lock
from diffusion_lit.storage.arrays import PRIVATE, open_array, write_index
from diffusion_lit.storage.cache import cache_folder
from diffusion_lit.storage.folders import publish, scratch_of, sweep
from diffusion_lit.storage.room import fits_in_memory, reserve
from diffusion_lit.words import counted

VERSION = 2  # raise it when decoding changes
NAMED = 5  # skipped images that a message names


@dataclass(frozen=True)
class Cache:
    """Decoded images.

    Args:
        images: Memory-mapped uint8 array (N, C, H, W), whose file stays as it is; (N, squares, C, H, W) of several
            squares of each.
        names: The N names.
        hashes: Of each file's contents, 16 hexadecimal digits; empty where they were not asked for.
        pools: For each pool of images, its first row and the row after its last.
        skipped: What could not be used.
        checksum: SHA-256 of all pixels.
    """

    images: np.ndarray
    names: list[str]
    hashes: list[str]
    pools: dict[str, tuple[int, int]]
    skipped: list[Skip]
    checksum: str


def prepare(
    listing: Listing,
    pools: Mapping[str, Sequence[Image]],
    transform: Transform,
    cache_dir: Path | None = None,
    strict: bool = False,
    processes: int | None = None,
    by_content: bool = False,
) -> Cache:
    """Opens the cache of a set of images, after decoding them if there is none.

    Args:
        listing: Where the images lie, and what could not be listed.
        pools: The images of each pool ("train", "val", ...), which stay together in the order given.
        transform: What to make of each image.
        cache_dir: Folder of all caches of images; `images` in the folder of all caches by default.
        strict: Whether an image that cannot be used stops the run; otherwise it is left out and told.
        processes: Number of processes that decode; by default one per core that this process may use, 16 at the most.
        by_content: Whether the images of each pool are put in the order of the hashes of their files' contents.

    Raises:
        ValueError: If no image can be used, or, with `strict`, if one cannot; or the cache can neither be written nor
            held in memory.
        PermissionError: If the folder of caches may not be written to.
    """
    work = _Work(listing, pools, transform, strict, processes, by_content)
    key = work.key()
    cache_dir = cache_folder() / "images" if cache_dir is None else cache_dir
    place = cache_dir / key
    if strict and listing.skipped:
        raise ValueError(_refusal(listing, listing.skipped))
    try:
        cache = _open(place)
        if cache is None:
            cache_dir.mkdir(parents=True, exist_ok=True)
            told = f"Another process is preparing the same images in {cache_dir}; waiting for it."
            with Lock(cache_dir / f"{key}.lock", lambda: rank_zero_info(told)):
                cache = _open(place)  # another process may have written it meanwhile
                if cache is None:
                    if place.exists():
                        rank_zero_warn(f"The prepared images in {place} are damaged; they are prepared anew.")
                    sweep(place)
                    work.write(place)
                    cache = _open(place)
    except OSError as error:
        refusal = (
            f"The images of {listing.label} cannot be prepared in {cache_dir} ({error.strerror or error}); set "
            "cache_dir to a folder that may be written to and has enough room."
        )
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full or not fits_in_memory(work.size):
            kind = PermissionError if isinstance(error, PermissionError) else ValueError
            raise kind(refusal) from error
        rank_zero_warn(f"{refusal} Until then every process decodes them into its memory.")
        cache = work.in_memory()
    if cache is None:
        raise ValueError(f"The prepared images in {place} are damaged as soon as they are written; check the disk.")
    if cache.skipped:
        if strict:
            raise ValueError(_refusal(listing, cache.skipped))
        rank_zero_warn(f"{listing.label}: {_summary(cache.skipped, place if place.exists() else None)}")
    return cache


def _open(place: Path) -> Cache | None:
    """The cache in a folder, or None if there is no complete and intact one."""
    found = open_array(place / "images.u8", np.uint8, lambda index: tuple(index["shape"]))
    return None if found is None else _cache(*found)


def _cache(index: dict[str, Any], images: np.ndarray) -> Cache:
    """The cache of an index and its pixels."""
    pools = {name: (start, end) for name, (start, end) in index["pools"].items()}
    skipped = [Skip(*skip) for skip in index["skipped"]]
    return Cache(images, index["names"], index["hashes"], pools, skipped, index["sha256"])


@dataclass(frozen=True)
class _Work:
    """What is to be decoded, and how; see `prepare`."""

    listing: Listing
    pools: Mapping[str, Sequence[Image]]
    transform: Transform
    strict: bool
    processes: int | None
    by_content: bool

    def key(self) -> str:
        """The hash of what the cache depends on."""
        digest, listing = hashlib.sha256(), self.listing
        what = [VERSION, str(listing.root.resolve()), asdict(self.transform), listing.skipped, self.by_content]
        digest.update(json.dumps(what, sort_keys=True).encode())
        for pool, images in self.pools.items():
            digest.update(json.dumps([pool, len(images)]).encode())
            for image in images:
                digest.update(f"{image.name}\0{image.size}\0{image.stamp}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:32]

    @property
    def size(self) -> int:
        """Bytes of all images, once decoded."""
        return sum(map(len, self.pools.values())) * int(np.prod(self.transform.row_shape))

    def write(self, place: Path) -> None:
        """Decodes all images into a folder beside the place, and renames it."""
        scratch = scratch_of(place)
        scratch.mkdir()
        try:
            with (scratch / "images.u8").open("wb") as file:
                reserve(file, self.size, scratch / "images.u8")
            index = self._decode(scratch / "images.u8")
            write_index(scratch / "images.u8", index)
            publish(scratch, place, lambda: _open(place) is not None)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        size = int(np.prod(index["shape"])) / 2**20
        rank_zero_info(
            f"Prepared {counted(index['shape'][0], 'image')} of {self.listing.label} in {place} ({size:.1f} MiB)."
        )

    def in_memory(self) -> Cache:
        """The same without the disk: memory that processes reach by a name (Linux), elsewhere a temporary file."""
        with contextlib.ExitStack() as stack:
            if hasattr(os, "memfd_create"):
                descriptor = os.memfd_create("images")
                stack.callback(os.close, descriptor)
                os.truncate(descriptor, self.size)
                path = Path(f"/proc/self/fd/{descriptor}")
            else:
                path = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))) / "images.u8"
                with path.open("wb") as file:
                    reserve(file, self.size, path)
            index = self._decode(path)
            return _cache(index, np.memmap(path, np.uint8, PRIVATE, shape=tuple(index["shape"])))

    def _decode(self, path: Path) -> dict[str, Any]:
        """Decodes all images into a file that has their size, leaves the broken ones out, and returns the index."""
        listing, pools = self.listing, self.pools
        hashes = content_hashes(listing, pools) if self.by_content else {}
        if self.by_content:
            pools = {pool: sorted(own, key=lambda one: (hashes[one.name], one.name)) for pool, own in pools.items()}
        names = [image.name for pool in pools.values() for image in pool]
        transform = replace(self.transform, bits=self.transform.bits or bits_of(listing, names))
        reasons = decode_all(listing, names, transform, path, self.processes, self.strict)
        skipped = [*listing.skipped, *(Skip(names[number], reason) for number, reason in sorted(reasons.items()))]
        if self.strict and skipped:
            raise ValueError(_refusal(listing, skipped))
        kept = [number for number in range(len(names)) if number not in reasons]
        if not kept:
            raise ValueError(f"No image of {listing.label} can be used: {_summary(skipped, None)}")
        sha256, crc32 = _compact(path, kept, int(np.prod(transform.row_shape)))
        return {
            "shape": [len(kept), *transform.row_shape],
            "names": [names[number] for number in kept],
            "hashes": [hashes[names[number]] for number in kept] if self.by_content else [],
            "pools": _kept_pools(pools, kept),
            "skipped": skipped,
            "sha256": sha256,
            "crc32": crc32,
            "root": str(listing.root),
            "transform": asdict(transform),
        }


def content_hashes(listing: Listing, pools: Mapping[str, Sequence[Image]]) -> dict[str, str]:
    """The hash of each file's contents by name, or of its name if it is unreadable, which decoding will report."""

    def hashed(name: str) -> str:
        try:
            with listing.open(name) as file:
                return hashlib.sha256(file.read()).hexdigest()[:16]
        except (BadImageError, OSError):
            return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    names = [image.name for pool in pools.values() for image in pool]
    with ThreadPoolExecutor(8) as threads:
        return dict(zip(names, threads.map(hashed, names), strict=True))


def bits_of(listing: Listing, names: Sequence[str]) -> int:
    """How many of 16 bits the images use, by the largest value of up to 64 of them."""
    found = []
    for name in names[:: max(1, len(names) // 64)]:
        with contextlib.suppress(BadImageError, OSError), listing.open(name) as file:
            found.append(significant_bits(file))
    bits = max((number for number in found if number is not None), default=16)
    if bits < 16:
        rank_zero_info(f"{listing.label}: of 16 bits per channel {bits} are used, which become the full range.")
    return bits


def _compact(path: Path, kept: list[int], row: int) -> tuple[str, int]:
    """Moves the rows that are kept to the start of the file; returns the SHA-256 and CRC-32 of all that stays."""
    digest, crc32 = hashlib.sha256(), 0
    with path.open("r+b") as file:
        for new, old in enumerate(kept):
            file.seek(old * row)
            pixels = file.read(row)
            digest.update(pixels)
            crc32 = zlib.crc32(pixels, crc32)
            if new != old:
                file.seek(new * row)
                file.write(pixels)
        file.truncate(len(kept) * row)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), crc32


def _kept_pools(pools: Mapping[str, Sequence[Image]], kept: list[int]) -> dict[str, tuple[int, int]]:
    """The rows of each pool after some images were left out."""
    ends = np.searchsorted(kept, np.cumsum([len(images) for images in pools.values()])).tolist()
    return dict(zip(pools, itertools.pairwise([0, *ends]), strict=True))


def _summary(skipped: Sequence[Skip], place: Path | None) -> str:
    """What was left out, the first few by name."""
    shown = "; ".join(f"{printable(skip.name)} {skip.reason}" for skip in skipped[:NAMED])
    more = "" if len(skipped) <= NAMED else f"; and {len(skipped) - NAMED} more"
    where = "" if place is None or not more else f", all listed in {place / 'index.json'}"
    told = f"{counted(len(skipped), 'image', 'was', 'were')} skipped: {shown}{more}{where}."
    ways = dict.fromkeys(filter(None, (way_in(skip.reason) for skip in skipped)))
    return told + "".join(f" Those that are too small are taken in by {way}." for way in ways)


def _refusal(listing: Listing, skipped: Sequence[Skip]) -> str:
    return (
        f"{printable(str(listing.root / skipped[0].name))} {skipped[0].reason}; it is one of {len(skipped)} that "
        "cannot be used, and strict is true: mend or remove it, or set strict to false to leave it out."
    )
