"""The prepared cache: every picture decoded once, by several processes, into one memory-mapped uint8 array.

A cache is a folder `CACHE_DIR/KEY` with `images.u8` (N x C x H x W bytes) and `index.json` (names, pools, what was
skipped). KEY is a hash of the pictures' names, sizes and times and of the transform, so that a changed folder or option
gets a cache of its own. It is written beside its place and renamed when it is whole: whoever is killed leaves nothing
that a later run takes for a cache. A lock, which the system releases with its process, keeps two runs from doing the
same work, and whoever holds it removes what a killed run left.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from datamodules.decode import Transform
from datamodules.decoding import decode_all
from datamodules.sources import Listing, Picture, Skip, printable

VERSION = 1  # raise it when decoding changes
NAMED = 5  # skipped pictures that a message names


@dataclass(frozen=True)
class Cache:
    """Decoded pictures.

    Args:
        images: Memory-mapped uint8 array (N, C, H, W), read-only.
        names: The N names.
        pools: For each pool of pictures, its first row and the row after its last.
        skipped: What could not be used.
        checksum: SHA-256 of all pixels.
    """

    images: np.ndarray
    names: list[str]
    pools: dict[str, tuple[int, int]]
    skipped: list[Skip]
    checksum: str


def default_cache_dir() -> Path:
    """Where caches go unless told otherwise: `~/.cache/diffusion-lit`, or as XDG_CACHE_HOME says."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "diffusion-lit"


def prepare(
    listing: Listing,
    pools: Mapping[str, Sequence[Picture]],
    transform: Transform,
    cache_dir: Path | None = None,
    strict: bool = False,
    processes: int | None = None,
) -> Cache:
    """Opens the cache of a set of pictures, after decoding them if there is none.

    Args:
        listing: Where the pictures lie, and what could not be listed.
        pools: The pictures of each pool ("train", "val", ...), which stay together in the order given.
        transform: What to make of each picture.
        cache_dir: Folder of all caches.
        strict: Whether a picture that cannot be used stops the run; otherwise it is left out and told.
        processes: Number of processes that decode; by default one per core that this process may use, 16 at the most.

    Returns:
        The cache.

    Raises:
        ValueError: If no picture can be used, or, with `strict`, if one cannot; or the cache cannot be written.
        PermissionError: If the folder of caches may not be written to.
    """
    key = _key(listing, pools, transform)
    cache_dir = default_cache_dir() if cache_dir is None else cache_dir
    place = cache_dir / key
    if strict and listing.skipped:
        raise ValueError(_refusal(listing, listing.skipped))
    try:
        cache = _open(place)
        if cache is None:
            with _lock(cache_dir, key):
                cache = _open(place)  # another process may have written it meanwhile
                if cache is None:
                    _clear(cache_dir, key)
                    _write(place, listing, pools, transform, strict, processes)
                    cache = _open(place)
    except OSError as error:
        kind = PermissionError if isinstance(error, PermissionError) else ValueError
        raise kind(
            f"The pictures of {listing.label} cannot be prepared in {cache_dir} ({error.strerror or error}); set "
            "cache_dir to a folder that may be written to and has enough room."
        ) from error
    assert cache is not None
    if cache.skipped:
        if strict:
            raise ValueError(_refusal(listing, cache.skipped))
        rank_zero_warn(f"{listing.label}: {_summary(cache.skipped, place)}")
    return cache


def _key(listing: Listing, pools: Mapping[str, Sequence[Picture]], transform: Transform) -> str:
    digest = hashlib.sha256()
    what = [VERSION, str(listing.root.resolve()), asdict(transform), listing.skipped]
    digest.update(json.dumps(what, sort_keys=True).encode())
    for pool, pictures in pools.items():
        digest.update(json.dumps([pool, len(pictures)]).encode())
        for picture in pictures:
            digest.update(f"{picture.name}\0{picture.size}\0{picture.stamp}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


def _open(place: Path) -> Cache | None:
    """The cache in a folder, or None where there is none that is whole."""
    try:
        index = json.loads((place / "index.json").read_text())
        shape = tuple(index["shape"])
        if (place / "images.u8").stat().st_size != int(np.prod(shape)):
            return None
        images = np.memmap(place / "images.u8", np.uint8, "r", shape=shape)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError):  # damaged after it was written
        return None
    pools = {name: (start, end) for name, (start, end) in index["pools"].items()}
    return Cache(images, index["names"], pools, [Skip(*skip) for skip in index["skipped"]], index["sha256"])


@contextlib.contextmanager
def _lock(cache_dir: Path, key: str) -> Iterator[None]:
    """Holds the lock of a cache, which the system releases if this process dies."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # not on Windows: two runs may then do the same work, each in a folder of its own
        yield
        return
    with (cache_dir / f"{key}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            rank_zero_info(f"Another process is preparing the same pictures in {cache_dir}; waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _clear(cache_dir: Path, key: str) -> None:
    """Removes what killed runs left of this cache, and a damaged one."""
    for left in [*cache_dir.glob(f".{key}.*"), cache_dir / key]:
        shutil.rmtree(left, ignore_errors=True)


def _write(
    place: Path,
    listing: Listing,
    pools: Mapping[str, Sequence[Picture]],
    transform: Transform,
    strict: bool,
    processes: int | None,
) -> None:
    """Decodes all pictures into a folder beside the place, and renames it."""
    pictures = [picture for pool in pools.values() for picture in pool]
    row = int(np.prod(transform.shape))
    scratch = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        _reserve(scratch / "images.u8", len(pictures) * row)
        names = [picture.name for picture in pictures]
        reasons = decode_all(listing, names, transform, scratch / "images.u8", processes, strict)
        skipped = [*listing.skipped, *(Skip(names[number], reason) for number, reason in sorted(reasons.items()))]
        if strict and skipped:
            raise ValueError(_refusal(listing, skipped))
        kept = [number for number in range(len(pictures)) if number not in reasons]
        if not kept:
            raise ValueError(f"No picture of {listing.label} can be used: {_summary(skipped, None)}")
        checksum = _compact(scratch / "images.u8", kept, row)
        index = {
            "shape": [len(kept), *transform.shape],
            "names": [names[number] for number in kept],
            "pools": _kept_pools(pools, kept),
            "skipped": skipped,
            "sha256": checksum,
            "root": str(listing.root),
            "transform": asdict(transform),
        }
        _write_json(scratch / "index.json", index)
        scratch.chmod(0o755)
        os.replace(scratch, place)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    size = len(kept) * row / 2**20
    rank_zero_info(f"Prepared {len(kept)} pictures of {listing.label} in {place} ({size:.1f} MiB).")


def _reserve(path: Path, size: int) -> None:
    """Makes a file of a size and claims its room on the disk, so that a full disk is told now and not in the middle."""
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise OSError(f"it takes {size / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free")
    with path.open("wb") as file:
        file.truncate(size)
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)


def _compact(path: Path, kept: list[int], row: int) -> str:
    """Moves the rows that are kept together at the start of the file; returns the SHA-256 of all that stays."""
    digest = hashlib.sha256()
    with path.open("r+b") as file:
        for new, old in enumerate(kept):
            file.seek(old * row)
            pixels = file.read(row)
            digest.update(pixels)
            if new != old:
                file.seek(new * row)
                file.write(pixels)
        file.truncate(len(kept) * row)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _kept_pools(pools: Mapping[str, Sequence[Picture]], kept: list[int]) -> dict[str, tuple[int, int]]:
    """The rows of each pool after some pictures were left out."""
    rows, start, first = {}, 0, 0
    numbers = np.array(kept)
    for pool, pictures in pools.items():
        start += len(pictures)
        last = int(np.searchsorted(numbers, start))
        rows[pool] = (first, last)
        first = last
    return rows


def _write_json(path: Path, index: dict[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(index, file)
        file.flush()
        os.fsync(file.fileno())


def _summary(skipped: Sequence[Skip], place: Path | None) -> str:
    """What was left out, the first few by name."""
    shown = "; ".join(f"{printable(skip.name)} {skip.reason}" for skip in skipped[:NAMED])
    more = "" if len(skipped) <= NAMED else f"; and {len(skipped) - NAMED} more"
    where = "" if place is None or not more else f", all listed in {place / 'index.json'}"
    return f"{len(skipped)} picture{'s were' if len(skipped) != 1 else ' was'} skipped: {shown}{more}{where}."


def _refusal(listing: Listing, skipped: Sequence[Skip]) -> str:
    return (
        f"{printable(str(listing.root / skipped[0].name))} {skipped[0].reason}; it is one of {len(skipped)} that "
        "cannot be used, and strict is true: mend or remove it, or set strict to false to leave it out."
    )
