"""CelebA: 202,599 photographs of faces, from the official folder or zip and its lists.

The aligned images have 178x218 pixels. FID papers cut the centre 140x140 (the face) or 178x178 (with hair and some
background) and resize it to 64 or 128; figures of the two do not compare. Attributes may serve as labels: one gives two
classes, k of them 2^k joint ones, with class = sum of 2^i over the attributes i that are present.
"""

import csv
import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from datamodules.base import ImageDataModule
from datamodules.cache import Cache, prepare
from datamodules.decode import Transform
from datamodules.files import may_not_read
from datamodules.layout import describe_classes
from datamodules.loaders import Split
from datamodules.sources import Listing, Skip, list_images
from diffusion_lit.checks import check_count
from diffusion_lit.words import counted

IMAGES = "img_align_celeba"
PARTITION = "list_eval_partition"
ATTRIBUTES = "list_attr_celeba"
POOLS = ("train", "val", "test")  # as the partition numbers them
WHERE = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
MOST_ATTRIBUTES = 10


class CelebA(ImageDataModule):
    """Faces with the official split and, by choice, attributes as labels (Liu et al. 2015, arXiv 1411.7766).

    Args:
        root: Folder that holds `img_align_celeba` or `img_align_celeba.zip`, `list_eval_partition.txt` and, for labels,
            `list_attr_celeba.txt` (or the same lists as .csv, as Kaggle has them).
        batch_size: Images per training step over all ranks.
        image_size: Pixels per side: 32, 64 or 128.
        crop: Pixels per side of the centre square that is kept: 140 or 178.
        attributes: Attributes that make the classes, such as [Smiling, Male]; none for an unconditional model.
        strict: Whether an image that cannot be used stops the run instead of being left out.
        cache_dir: Folder of the caches; `images` in the folder of all caches by default.
        cache_processes: Processes that decode; by default one per core.
        num_workers: Threads that read ahead from the cache; by default 4 where it lies on a network file system, 0
            elsewhere.
        use_labels: Whether batches carry the classes that `attributes` makes.
        random_flip: Whether half of the training images are mirrored, redrawn at each epoch.
        on_device: Whether the images live on the training device; by default they do on a GPU when they take less
            than a quarter of its free memory.
    """

    def __init__(
        self,
        root: str = "data/celeba",
        batch_size: int = 128,
        image_size: int = 64,
        crop: int = 140,
        attributes: list[str] | None = None,
        strict: bool = False,
        cache_dir: str | None = None,
        cache_processes: int | None = None,
        num_workers: int | None = None,
        use_labels: bool = True,
        random_flip: bool = True,
        on_device: bool | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, use_labels, random_flip, on_device)
        if image_size not in (32, 64, 128):
            raise ValueError(f"image_size is {image_size}; CelebA is prepared at 32, 64 or 128 pixels.")
        if crop not in (140, 178):
            raise ValueError(f"crop is {crop}; CelebA papers cut the centre 140 or 178 pixels.")
        self.attributes = list(attributes or [])
        if len(self.attributes) > MOST_ATTRIBUTES or len(set(self.attributes)) < len(self.attributes):
            raise ValueError(f"attributes is {self.attributes}; give up to {MOST_ATTRIBUTES} names, each once.")
        self.root = Path(root).expanduser()
        self.transform = Transform(image_size, crop=crop)
        self.strict = strict
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        check_count(cache_processes=cache_processes)
        self.cache_processes = cache_processes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (3, image_size, image_size)."""
        return self.transform.shape

    @property
    def class_names(self) -> list[str]:
        """The joint classes of the attributes, such as "Smiling, not Male"; empty without attributes."""
        if not self.attributes or not self.use_labels:
            return []
        names = [""]
        for attribute in self.attributes:  # the first attribute is the lowest bit
            names = [f"{name}, {sign}{attribute}" for sign in ("not ", "") for name in names]
        return [name.removeprefix(", ") for name in names]

    @functools.cached_property
    def cache(self) -> Cache:
        """The decoded images in the order of the partition, prepared if they are not yet."""
        listing = self._listing()
        found = {image.name.rpartition("/")[2]: image for image in listing.images}
        pools: dict[str, list[Any]] = {pool: [] for pool in POOLS}
        missing = []
        for name, pool in self._partition():
            if name in found:
                pools[pool].append(found[name])
            else:
                missing.append(Skip(name, f"is in the partition but not in {listing.label}"))
        if not any(pools.values()):
            raise ValueError(f"{listing.label} has none of the images of {self._list(PARTITION)}.")
        listing = replace(listing, images=[], skipped=listing.skipped + missing)
        cache = prepare(listing, pools, self.transform, self.cache_dir, self.strict, self.cache_processes)
        kinds = describe_classes(self.class_names)
        rank_zero_info(f"{counted(len(cache.names), 'image')} of {listing.label}, {kinds}.")
        return cache

    def prepare_data(self) -> None:
        """Decodes the images into the cache where that was not done before."""
        if self.class_names:
            self._list(ATTRIBUTES)  # to miss it now rather than after the decoding
        _ = self.cache

    def read(self, split: str) -> Split:
        """Opens a split in the cache; see `ImageDataModule.read`.

        Returns:
            Memory-mapped images, and classes where there are attributes.
        """
        start, end = self.cache.pools[split]
        labels = self._labels()[start:end] if self.class_names else None
        return Split(self.cache.images[start:end], labels)

    def fingerprint(self, split: str) -> str:
        """The SHA-256 over all prepared pixels, the split's rows and its labels; see `ImageFolder`."""
        digest = hashlib.sha256(self.cache.checksum.encode())
        for name in split.split("+"):
            labels = self.split(name).labels
            digest.update(repr((self.image_shape, self.cache.pools[name])).encode())
            digest.update(b"" if labels is None else labels.numpy().tobytes())
        return digest.hexdigest()

    def _listing(self) -> Listing:
        """The folder or zip of the images."""
        for name in (IMAGES, f"{IMAGES}.zip"):
            if (self.root / name).exists():
                return list_images(str(self.root / name))
        raise FileNotFoundError(
            f"CelebA needs the folder {IMAGES} or the file {IMAGES}.zip, and neither is in {self.root}; get them "
            f"and the two lists from {WHERE} (Align&Cropped Images) and point root at their folder."
        )

    def _list(self, name: str) -> Path:
        """The file of a list, as .txt or .csv."""
        for ending in (".txt", ".csv"):
            if (self.root / (name + ending)).is_file():
                return self.root / (name + ending)
        why = "says which image is in which split" if name == PARTITION else "holds the attributes"
        raise FileNotFoundError(
            f"CelebA needs {name}.txt (or .csv), which {why} and is not in {self.root}; get it from {WHERE}."
        )

    def _partition(self) -> Iterator[tuple[str, str]]:
        """Each image's name and pool."""
        path = self._list(PARTITION)
        for number, row in enumerate(_rows(path)):
            if number == 0 and row[0] == "image_id":  # the header of the .csv
                continue
            if len(row) != 2 or row[1] not in ("0", "1", "2"):
                raise ValueError(
                    f"{path} says {' '.join(row)[:80]!r} in line {number + 1}; an image's name and 0, 1 or 2 are "
                    "expected."
                )
            yield row[0], POOLS[int(row[1])]

    def _labels(self) -> Tensor:
        """The class of each image of the cache."""
        path = self._list(ATTRIBUTES)
        rows = _rows(path)
        header = next(rows, [])
        if len(header) == 1 and header[0].isdigit():  # the .txt begins with the number of images
            header = next(rows, [])
        known = [name for name in header if name != "image_id"]
        absent = [name for name in self.attributes if name not in known]
        if absent:
            raise ValueError(f"{path} has no attribute {', '.join(absent)}; it has {', '.join(known)[:1000]}.")
        columns = [known.index(name) + 1 for name in self.attributes]
        classes: dict[str, int] = {}
        for row in rows:
            if len(row) != len(known) + 1 or any(row[column] not in ("1", "-1", "0") for column in columns):
                raise ValueError(
                    f"{path} says {' '.join(row)[:80]!r}; an image's name and {len(known)} values 1 or -1 are expected."
                )
            classes[row[0]] = sum(2**bit for bit, column in enumerate(columns) if row[column] == "1")
        names = [os.path.basename(name) for name in self.cache.names]
        unlabelled = [name for name in names if name not in classes]
        if unlabelled:
            raise ValueError(
                f"{path} has no line for {unlabelled[0]} and {counted(len(unlabelled) - 1, 'other image')}."
            )
        return torch.tensor([classes[name] for name in names], dtype=torch.int64)


def _rows(path: Path) -> Iterator[list[str]]:
    """The rows of a list, separated by blanks (.txt) or commas (.csv); empty lines are skipped."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.reader(file) if path.suffix == ".csv" else (line.split() for line in file):
                if row:
                    yield row
    except PermissionError as error:
        raise may_not_read(path) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no text ({error}); get the file anew.") from error
