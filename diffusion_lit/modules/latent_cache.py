"""Latents on disk, encoded once: mean and standard deviation of each image's posterior, mirrored as a second copy.

A cache is a folder `latents/KEY` with `moments.f32`, float32 (copies, N, 2, c, h, w), and `index.json`. KEY is a hash
of the encoder's weights, the fingerprint of the data (its transformed pixels) and whether there are mirrored
copies, so that a change of any of them makes a new cache. All ranks write into one temporary file, which is renamed
when complete, so that a killed run leaves no partial cache. A lock keeps two runs from doing the same work; without
locks both do it, which is harmless. Opening a cache reads it once and compares its CRC-32 and the hash of its index
with the recorded values; a damaged cache is reported and rebuilt. If it cannot be written, each rank encodes the same
chunks into memory.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from tqdm import tqdm

from diffusion_lit.diffusion.rng import send
from diffusion_lit.modules.latent_scale import encode_all
from diffusion_lit.modules.latent_space import LatentSpace
from diffusion_lit.modules.protocols import ImageSource
from diffusion_lit.nets.autoencoder import Posterior
from diffusion_lit.runtime import watchdog
from diffusion_lit.runtime.lock import Lock
from diffusion_lit.runtime.ranks import over_ranks, rank_zero_alone
from diffusion_lit.storage.arrays import open_array, write_index
from diffusion_lit.storage.cache import cache_folder
from diffusion_lit.storage.folders import publish, scratch_of, sweep
from diffusion_lit.storage.hashing import key_of
from diffusion_lit.storage.room import fits_in_memory, reserve
from diffusion_lit.words import counted

FORMAT = 3
DEVICE_SHARE = 0.25  # of a GPU's free memory that a cache may take


class LatentCache:
    """Posteriors of a set of images.

    Args:
        moments: Mean and standard deviation, float32 (copies, N, 2, c, h, w), memory-mapped or on a device.
        sums: The moments' sums, as `encode_all` gives them.
    """

    def __init__(self, moments: Any, sums: Tensor) -> None:
        self.moments = moments
        self.sums = sums

    def to(self, device: torch.device) -> "LatentCache":
        """Moves the latents to a GPU where they take less than a quarter of its free memory.

        Args:
            device: The training device.

        Returns:
            The cache itself.
        """
        if device.type == "cuda" and self.moments.nbytes <= DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
            self.moments = torch.from_numpy(np.array(self.moments)).to(device)
        return self

    def posterior(self, rows: Tensor, mirrored: Tensor | None) -> Posterior:
        """Posteriors of some images.

        Args:
            rows: Their rows, int64 (B,).
            mirrored: Which of them are mirrored, bool (B,); None for none.

        Returns:
            Mean and standard deviation (B, c, h, w) on the device of `rows`.
        """
        copies = torch.zeros_like(rows) if mirrored is None else send(mirrored, rows.device).to(rows.dtype)
        if isinstance(self.moments, Tensor):
            taken = self.moments[copies, rows]
        else:
            taken = send(torch.from_numpy(self.moments[copies.cpu().numpy(), rows.cpu().numpy()]), rows.device)
        return Posterior(taken[:, 0], taken[:, 1])


def latent_cache(
    trainer: Trainer,
    space: LatentSpace,
    data: ImageSource,
    split: str,
    mirrored: bool,
    folder: str | None,
    device: torch.device,
) -> LatentCache:
    """Opens the cache of a split, after encoding it if there is none. Called on every rank.

    Args:
        trainer: The trainer, whose ranks share the work.
        space: The latent space.
        data: The data module, set up.
        split: "train" or "val".
        mirrored: Whether there are mirrored copies.
        folder: Folder of all caches, on a file system that all ranks see; the user's cache folder by default.
        device: Where to encode.

    Returns:
        The cache.

    Raises:
        OSError: If it cannot be written and does not fit into memory.
    """
    images = data.reference_images(split)
    record: dict[str, Any] = {
        "format": FORMAT,
        "encoder_sha256": space.encoder_sha256,
        "precision": space.precision,
        "data": type(data).__name__,
        "fingerprint": data.fingerprint(split),
        "image_shape": list(space.image_shape),
        "mirrored": mirrored,
        "shape": [2 if mirrored else 1, len(images), 2, *space.shape],
    }
    parent = Path(folder).expanduser() if folder is not None else cache_folder() / "latents"
    place = parent / key_of(record)[:32]
    with _held(trainer, place) as problem:
        cache = None if problem else _open(place, record)
        if not problem and not trainer.strategy.reduce_boolean_decision(cache is not None):
            problem = _write(trainer, place, record, space, images, device)
            cache = None if problem else _open(place, record)
    if cache is None:
        problem = problem or "they are damaged as soon as they are written"
        refusal = (
            f"The latents cannot be kept in {parent} ({problem}); set "
            "cache_dir to a folder that may be written to and has enough room, or cache_latents to false."
        )
        if not fits_in_memory(4 * int(np.prod(record["shape"]))):
            raise OSError(refusal)
        rank_zero_warn(f"{refusal} Until then every rank encodes all of them and keeps them in memory.")
        cache = _in_memory(record, space, images, device)
    return cache


def _in_memory(record: dict[str, Any], space: LatentSpace, images: Any, device: torch.device) -> LatentCache:
    """The cache without a disk: encoded in the same chunks, so that no digit differs."""
    moments = np.empty(tuple(record["shape"]), np.float32)
    sums = encode_all(space, images, bool(record["mirrored"]), device, keep=_keeper(moments))
    return LatentCache(moments, sums)


def _keeper(moments: Any) -> Callable[[int, int, Posterior], None]:
    """Writes each chunk to its rows."""

    def keep(copy: int, start: int, posterior: Posterior) -> None:
        rows = slice(start, start + len(posterior.mean))
        moments[copy, rows, 0], moments[copy, rows, 1] = posterior.mean.cpu().numpy(), posterior.std.cpu().numpy()

    return keep


def _open(place: Path, record: dict[str, Any]) -> LatentCache | None:
    """The cache in a folder, or None if there is no complete one."""

    def shape_of(index: dict[str, Any]) -> tuple[int, ...] | None:
        return tuple(record["shape"]) if index["record"] == record else None

    found = open_array(place / "moments.f32", np.float32, shape_of)
    if found is None:
        return None
    return LatentCache(found[1], torch.tensor(found[0]["sums"], dtype=torch.float64))


def _write(
    trainer: Trainer, place: Path, record: dict[str, Any], space: LatentSpace, images: Any, device: torch.device
) -> str:
    """Encodes the images into a temporary folder, each rank its share, and renames it; returns what failed."""
    scratch = Path(trainer.strategy.broadcast(str(scratch_of(place))))
    shape, world = tuple(record["shape"]), trainer.world_size

    def begin() -> None:
        if place.exists():
            rank_zero_warn(f"The latents in {place} are damaged; they are encoded anew.")
        sweep(place)
        scratch.mkdir(parents=True)
        with (scratch / "moments.f32").open("wb") as file:
            reserve(file, 4 * int(np.prod(shape)), scratch / "moments.f32")

    def finish() -> None:
        write_index(scratch / "moments.f32", {"record": record, "sums": sums.tolist()})
        publish(scratch, place, lambda: _open(place, record) is not None)
        size = 4 * int(np.prod(shape)) / 2**20
        rank_zero_info(
            f"Encoded {counted(shape[1], 'image')} into {place} ({size:.1f} MiB); training reads them from there."
        )

    problem = _on_rank_zero(trainer, begin, "room for the latents")
    if problem:
        shutil.rmtree(scratch, ignore_errors=True)
        return problem
    moments = np.memmap(scratch / "moments.f32", np.float32, "r+", shape=shape)

    with tqdm(
        desc="encoding images once", total=shape[0] * shape[1] // world, unit="img", leave=False, delay=2,
        disable=not trainer.is_global_zero,
    ) as bar:  # fmt: skip
        sums = encode_all(
            space, images, bool(record["mirrored"]), device, (world, trainer.global_rank), _keeper(moments), bar.update
        )
    moments.flush()
    sums = over_ranks(trainer, sums, "sum")
    trainer.strategy.barrier()  # all have written
    problem = _on_rank_zero(trainer, finish, "the index of the latents")
    if problem:
        shutil.rmtree(scratch, ignore_errors=True)
    return problem


def _on_rank_zero(trainer: Trainer, work: Callable[[], None], what: str) -> str:
    """Does something with the disk on rank 0; all ranks learn why it failed, or an empty text."""

    def attempt() -> str:
        try:
            work()
        except OSError as error:
            return error.strerror or str(error)
        return ""

    return str(trainer.strategy.broadcast(rank_zero_alone(attempt, what)))


@contextlib.contextmanager
def _held(trainer: Trainer, place: Path) -> Iterator[str]:
    """Rank 0 holds the cache's lock, which the system releases if it dies; the others wait. Yields what failed."""
    with contextlib.ExitStack() as stack:

        def hold() -> None:
            place.parent.mkdir(parents=True, exist_ok=True)
            told = f"Another run is encoding the same images into {place.parent}; waiting for it."

            def waiting() -> AbstractContextManager[object]:
                rank_zero_info(told)
                return watchdog.waiting("another run")

            stack.enter_context(Lock(place.with_name(f"{place.name}.lock"), waiting))

        yield _on_rank_zero(trainer, hold, f"the lock of {place.parent}")
