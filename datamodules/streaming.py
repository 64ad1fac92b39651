"""Data that does not fit on one disk: chunks, written by litdata, on a network disk or in a cloud.

    python -m datamodules.write_chunks --root FOLDER --output OUTPUT --image_size 64

makes them. The order is keyed as that of all data modules (`loaders`), but in two steps, so that an epoch fetches each
chunk once: the order of the chunks, and within each window of `window` chunks the order of its images, are functions of
the seed and the epoch alone. An image thus meets only images of its window; as chunks were filled at random, each is a
random part of the set. Ranks take their rows of the same global batch, so that batches, resumption in mid-epoch and
another number of ranks are exact; the price is that every machine fetches every chunk.
"""

import functools
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from datamodules.base import READERS, ImageDataModule
from datamodules.chunk_store import SCHEMES, Store
from datamodules.chunks import Chunked
from datamodules.layout import describe_classes
from datamodules.loaders import Array, Split, TrainLoader
from diffusion_lit.checks import check_count, check_number

FETCHERS = 4  # chunks that are fetched at once


class WindowLoader(TrainLoader):
    """Batches in the order of windows of chunks; the chunks of the next window are fetched while one is read."""

    window = 1

    def shuffled(self, generator: torch.Generator, seen: int) -> Iterator[Tensor]:
        """The rows of each global batch of an epoch; see `TrainLoader.shuffled`."""
        images = self.images
        assert isinstance(images, Chunked)
        order = torch.randperm(len(images.chunks), generator=generator)
        windows = [order[start : start + self.window] for start in range(0, len(order), self.window)]
        seeds = torch.randint(2**62, (len(windows),), generator=generator).tolist()
        skip, left = seen * self.batch_size, torch.empty(0, dtype=torch.int64)
        fetchers, coming = ThreadPoolExecutor(FETCHERS, "fetch"), list[Future[Path]]()
        try:
            for number, (window, seed) in enumerate(zip(windows, seeds, strict=True)):
                size = int(images.counts[window.numpy()].sum())
                if skip >= size:
                    skip -= size
                    continue
                # What is there stays while the rest is fetched; some rows of the last window are still to be read.
                images.keep(torch.cat(windows[max(0, number - 1) : number + 2]).tolist())
                for fetch in coming:
                    fetch.cancel()  # it was read before it was fetched, or is asked for again
                wanted = torch.cat(windows[number : number + 2]).tolist()
                coming = [fetchers.submit(images.fetch, chunk) for chunk in wanted]  # reading reports the error
                rows = torch.cat([images.rows(chunk) for chunk in window.tolist()])
                order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
                left, skip = torch.cat([left, rows[order[skip:]]]), 0
                whole = len(left) // self.batch_size * self.batch_size
                yield from left[:whole].view(-1, self.batch_size)
                left = left[whole:]
        finally:
            fetchers.shutdown(wait=False, cancel_futures=True)


class Streamed(ImageDataModule):
    """Images of any number in chunks, which `python -m datamodules.write_chunks` writes.

    Reading them runs nothing that they hold: see `chunks`. Shape, classes and splits are those of the set.

    Args:
        root: A folder, read where it is, or a URL that is read through a cache: s3://, gs://, r2://, azure:// and hf://
            of litdata, or local:FOLDER for a folder on a slow disk.
        batch_size: Images per training step over all ranks.
        window: Chunks whose images are shuffled together.
        cache_dir: Folder of the caches, on a disk of each machine; `chunks` in the folder of all caches by default.
        cache_gb: Gigabytes (2^30 bytes) of chunks that are kept on each machine.
        num_workers: Threads that read ahead; 4 by default.
        use_labels: Whether batches carry the class, and the model is made conditional.
        random_flip: Whether half of the training images are mirrored, redrawn at each epoch.
    """

    train_loader = WindowLoader

    def __init__(
        self,
        root: str,
        batch_size: int = 64,
        window: int = 16,
        cache_dir: str | None = None,
        cache_gb: float = 100.0,
        num_workers: int | None = None,
        use_labels: bool = True,
        random_flip: bool = True,
    ) -> None:
        super().__init__(batch_size, num_workers, use_labels, random_flip, on_device=False)
        check_count(window=window)
        check_number(above=0, cache_gb=cache_gb)
        if "://" in root and not root.startswith(SCHEMES):
            raise ValueError(f"root is {root!r}; give a folder, or a URL that begins with {', '.join(SCHEMES)}.")
        self.root = root if root.startswith(SCHEMES) else str(Path(root).expanduser())
        self.window = window
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self.cache_gb = cache_gb
        self._numbered: list[str] = []

    def write_nowhere(self, but_root: bool) -> None:
        """See `ImageDataModule.write_nowhere`; a URL is not even read unless the user named it."""
        super().write_nowhere(but_root)
        self.__dict__.pop("store", None)

    @functools.cached_property
    def store(self) -> Store:
        """The files.

        Raises:
            PermissionError: If a checkpoint named the URL, and the user did not.
        """
        store = Store(self.root, self.cache_dir, self.cache_gb * 2**30)
        if store.remote and not self.writes_root:
            raise PermissionError(
                f"The checkpoint's data lies at {self.root}, which is not opened for a checkpoint's sake; give "
                f"--data_root {self.root} if you know it."
            )
        return store

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of the set's images."""
        return self.store.catalogue.shape

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the order of their numbers."""
        return (self._numbered or self.store.catalogue.classes) if self.use_labels else []

    def number_classes(self, names: list[str]) -> bool:
        """Renumbers the classes; see `ImageDataModule.number_classes`."""
        self._numbered = names
        rank_zero_info(f"The classes are numbered as the model knows them: {describe_classes(names)}.")
        return True

    def prepare_data(self) -> None:
        """Looks whether the set is there."""
        counts = self.store.catalogue.counts
        kinds = describe_classes(self.class_names)
        told = ", ".join(f"{count:,} of {split}" for split, count in counts.items())
        rank_zero_info(f"Images of {self.root}: {told}; {kinds}.")

    def read(self, split: str) -> Split:
        """Opens a split; see `ImageDataModule.read`.

        Raises:
            ValueError: If the cache is too small for three windows.
        """
        chunks = self.store.chunks(self._name(split))
        if not chunks:
            return Split(torch.empty(0, *self.image_shape, dtype=torch.uint8), None)
        images = Chunked(self.store, chunks)
        needed = 3 * self.window * max(images.size(chunk) for chunk in range(len(chunks)))
        if split == "train" and self.store.remote and min(needed, images.nbytes) > self.store.cache_bytes:
            raise ValueError(
                f"cache_gb is {self.cache_gb:g}, but three windows of {self.window} chunks, of "
                f"which one is read and the next is fetched, take {needed / 2**30:.3g} GB; "
                "give a larger cache_gb or a smaller window."
            )
        return Split(images, self._labels(images))

    def reference_images(self, split: str) -> Array:
        """The images of a split, or of several one after the other; see `ImageDataModule.reference_images`."""
        parts = [self.split(name).images for name in split.split("+")]
        if len(parts) == 1:
            return parts[0]
        return Chunked(self.store, [chunk for part in parts if isinstance(part, Chunked) for chunk in part.chunks])

    def fingerprint(self, split: str) -> str:
        """The SHA-256 over shape, hashes and classes of all images, each of which is checked when it is read."""
        catalogue = self.store.catalogue
        names = [self._name(name) for name in split.split("+")]
        hashes = [catalogue.hashes[name] for name in names if name in catalogue.hashes]
        return sha256(json.dumps([catalogue.shape, hashes, self.class_names]).encode()).hexdigest()

    def readers(self, images: Array) -> int:
        """Threads that read ahead; see `ImageDataModule.readers`."""
        return super().readers(images) if self.num_workers is not None or isinstance(images, Tensor) else READERS

    def train_dataloader(self) -> WindowLoader:
        """Keyed random batches of the training split, window by window."""
        loader = super().train_dataloader()
        assert isinstance(loader, WindowLoader)
        loader.window = self.window
        return loader

    def _name(self, split: str) -> str:
        """The split of the set; without images to test with, those to validate with are taken."""
        return "val" if split == "test" and "test" not in self.store.catalogue.counts else split

    def _labels(self, images: Chunked) -> Tensor | None:
        """The classes of images in the current numbering."""
        written = self.store.catalogue.classes
        if not written or not self.use_labels:
            return None
        numbers = torch.tensor([self.class_names.index(name) for name in written])
        return numbers[torch.from_numpy(images.labels)]
