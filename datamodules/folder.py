"""Any pictures: a folder of any depth, with or without classes and splits, a zip of it, or a list of globs.

What the folders mean is read off their names. A single folder that holds all the rest means nothing and is passed
through. `train`, `val` and `test` beside each other are the splits. Folders below that are classes where every training
picture lies in one and there are two at least. Without splits on disk, pictures are dealt to "val" and "test" by the
hash of their names: always the same, and little changed when pictures are added.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from datamodules.base import ImageDataModule
from datamodules.cache import Cache, prepare
from datamodules.decode import ENDINGS, Transform
from datamodules.feed import Split
from datamodules.sources import Listing, Picture, Skip, list_pictures
from diffusion_lit.checks import check_count, check_number

POOLS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """What a listing means.

    Args:
        listing: Where the pictures lie.
        pools: The pictures of "train", "val" and "test" as they are on disk; all are "train" where there are no splits.
        classes: Names of the classes, sorted; empty where there are none.
        prefix: The part of the names that all share.
        split: Whether there are splits on disk.
    """

    listing: Listing
    pools: dict[str, list[Picture]]
    classes: list[str]
    prefix: str
    split: bool

    def class_of(self, name: str) -> str | None:
        """The class of a picture.

        Args:
            name: Its name in the listing.

        Returns:
            The name of its folder, or None where it is in none.
        """
        parts = name[len(self.prefix) :].split("/")[int(self.split) :]
        return parts[0] if len(parts) > 1 else None


def lay_out(listing: Listing, use_labels: bool = True) -> Layout:
    """Finds splits and classes in the names of a listing.

    Args:
        listing: The pictures.
        use_labels: Whether folders may be classes.

    Returns:
        The layout. Pictures beside the splits or classes, which have none, are added to what the listing skipped.
    """
    prefix = _common(listing.pictures)
    skipped = list(listing.skipped)
    pools: dict[str, list[Picture]] = {"train": [], "val": [], "test": []}
    heads = {picture.name[len(prefix) :].partition("/")[0] for picture in listing.pictures}
    found = {POOLS[head] for head in heads if head in POOLS}
    split = "train" in found and len(found) > 1
    for picture in sorted(listing.pictures, key=lambda picture: _rank(picture.name[len(prefix) :])):
        head, _, rest = picture.name[len(prefix) :].partition("/")
        if split and not (rest and head in POOLS):
            skipped.append(Skip(picture.name, "lies beside the folders of the splits"))
        else:
            pools[POOLS[head] if split else "train"].append(picture)
    layout = Layout(listing, pools, [], prefix, split)
    classes = {layout.class_of(picture.name) for picture in pools["train"]}
    names = sorted(name for name in classes if name is not None)
    if len(names) < 2 or None in classes or not use_labels:
        names = []
    for pool, pictures in pools.items() if names else ():
        strays = [picture for picture in pictures if layout.class_of(picture.name) not in names]
        skipped += [Skip(picture.name, "lies in the folder of no training class") for picture in strays]
        pools[pool] = [picture for picture in pictures if layout.class_of(picture.name) in names]
    listing = Listing(listing.root, listing.pictures, skipped, listing.label, listing.archive)
    return Layout(listing, pools, names, prefix, split)


class ImageFolder(ImageDataModule):
    """Pictures of any size and kind from a folder, a zip or a list of globs, cut to squares and resized.

    JPEG, PNG, WebP, BMP and TIFF, in grey, palette, alpha, CMYK or 16 bits, turned upright by their EXIF tag. Each
    picture is decoded once, into a cache; broken ones are named and left out.

    Args:
        root: A folder, a zip, a glob such as "dogs/*terrier*", or a list of globs.
        batch_size: Pictures per training step over all ranks.
        image_size: Pixels per side.
        channels: 3 for colour, 1 for grey.
        resize: "lanczos", the sharper, or "area", the mean over the pixels that fall into each.
        crop: Pixels per side of the centre square that is kept before resizing; by default as many as fit.
        upscale: Whether pictures smaller than image_size are enlarged rather than left out.
        background: Grey level 0..255 behind transparent pixels.
        val_fraction: Share of the training pictures held out for validation, where the disk has no val folder.
        test_fraction: Share held out as test split, where the disk has no test folder; with 0, it is the val split.
        strict: Whether a picture that cannot be used stops the run instead of being left out.
        cache_dir: Folder of the caches, `~/.cache/diffusion-lit` by default.
        cache_processes: Processes that decode; by default one per core.
        num_workers: Processes that read ahead from the cache while training, for one on a slow disk.
        use_labels: Whether folders are classes, which batches carry and the model is conditioned on.
        random_flip: Whether half of the training pictures are mirrored, drawn anew at each epoch.
        on_device: Whether the pictures live on the training device; by default they do on a GPU when they take less
            than a quarter of its free memory.
    """

    def __init__(
        self,
        root: str | list[str],
        batch_size: int = 64,
        image_size: int = 64,
        channels: int = 3,
        resize: Literal["lanczos", "area"] = "lanczos",
        crop: int | None = None,
        upscale: bool = False,
        background: int = 255,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        strict: bool = False,
        cache_dir: str | None = None,
        cache_processes: int | None = None,
        num_workers: int = 0,
        use_labels: bool = True,
        random_flip: bool = True,
        on_device: bool | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, use_labels, random_flip, on_device)
        check_number(least=0, below=0.5, val_fraction=val_fraction, test_fraction=test_fraction)
        check_count(cache_processes=cache_processes)
        self.root = root
        self.transform = Transform(image_size, channels, resize, crop, upscale, background)
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.strict = strict
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self.cache_processes = cache_processes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (channels, image_size, image_size)."""
        return self.transform.shape

    @functools.cached_property
    def layout(self) -> Layout:
        """What lies under the root; looked up once.

        Raises:
            ValueError: If there is no picture.
        """
        layout = lay_out(list_pictures(self.root), self.use_labels)
        if not any(layout.pools.values()):
            skipped = layout.listing.skipped
            more = f" ({skipped[0].name} {skipped[0].reason})" if skipped else ""
            raise ValueError(
                f"There is no picture in {layout.listing.label}{more}; files must end in one of {', '.join(ENDINGS)}."
            )
        return layout

    @property
    def class_names(self) -> list[str]:
        """The folders' names where they are classes."""
        return self.layout.classes

    @functools.cached_property
    def cache(self) -> Cache:
        """The decoded pictures, prepared if they are not yet."""
        layout = self.layout
        pools = {pool: pictures for pool, pictures in layout.pools.items() if pictures}
        cache = prepare(layout.listing, pools, self.transform, self.cache_dir, self.strict, self.cache_processes)
        kinds = f"{len(layout.classes)} classes" if layout.classes else "no classes"
        rank_zero_info(f"{len(cache.names)} pictures of {layout.listing.label}, {kinds}.")
        return cache

    def prepare_data(self) -> None:
        """Decodes the pictures into the cache where that was not done before."""
        _ = self.cache

    def rows(self, split: str) -> tuple[int, int]:
        """Where a split lies in the cache.

        Args:
            split: "train", "val" or "test".

        Returns:
            Its first row and the row after its last.

        Raises:
            ValueError: If there are too few pictures to hold some out.
        """
        pools = self.cache.pools
        if "train" not in pools or pools["train"][0] == pools["train"][1]:
            raise ValueError(f"{self.layout.listing.label} has no usable picture to train on.")
        start, end = pools["train"]
        val = 0 if "val" in pools else _share(self.val_fraction, end - start)
        test = 0 if "test" in pools else _share(self.test_fraction, end - start)
        if end - start - val - test < 1:
            raise ValueError(
                f"{self.layout.listing.label} has {end - start} pictures to train on, too few to hold {val + test} "
                "out; set val_fraction and test_fraction to 0, or use SingleImage to learn from one picture."
            )
        places = {"train": (start + val + test, end), "val": (start, start + val)}
        places["test"] = (start + val, start + val + test)
        if "val" in pools:
            places["val"] = pools["val"]
        if "test" in pools:
            places["test"] = pools["test"]
        elif test == 0:
            places["test"] = places["val"]
        return places[split]

    def read(self, split: str) -> Split:
        """Opens a split in the cache.

        Args:
            split: "train", "val" or "test".

        Returns:
            Memory-mapped pictures, and classes where folders are such.
        """
        start, end = self.rows(split)
        return Split(self.cache.images[start:end], self.labels(self.cache.names[start:end]))

    def labels(self, names: Sequence[str]) -> Tensor | None:
        """The classes of pictures.

        Args:
            names: Their names in the cache.

        Returns:
            An int64 tensor (N,), or None where there are no classes.
        """
        classes = {name: number for number, name in enumerate(self.layout.classes)}
        if not classes:
            return None
        return torch.tensor([classes[str(self.layout.class_of(name))] for name in names], dtype=torch.int64)

    def fingerprint(self, split: str) -> str:
        """What a split holds, as a SHA-256 over all prepared pixels, its rows and its labels.

        Args:
            split: As for `reference_images`.

        Returns:
            64 hexadecimal digits; any change of a picture, of the transform or of the order changes them.
        """
        digest = hashlib.sha256(self.cache.checksum.encode())
        for name in split.split("+"):
            labels = self.split(name).labels
            digest.update(repr((self.image_shape, self.rows(name))).encode())
            digest.update(b"" if labels is None else labels.numpy().tobytes())
        return digest.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "cache"}


class Landscapes(ImageFolder):
    """Landscape photographs, such as Kaggle's landscape-pictures: `ImageFolder` without classes at 64x64 pixels.

    Args:
        root: A folder, a zip, a glob, or a list of globs; see `ImageFolder`.
        batch_size: Pictures per training step over all ranks.
        image_size: Pixels per side.
        val_fraction: Share of the training pictures held out for validation, where the disk has no val folder.
        test_fraction: Share held out as test split, where the disk has no test folder; with 0, it is the val split.
        strict: Whether a picture that cannot be used stops the run instead of being left out.
        cache_dir: Folder of the caches, `~/.cache/diffusion-lit` by default.
        cache_processes: Processes that decode; by default one per core.
        num_workers: Processes that read ahead from the cache while training.
        random_flip: Whether half of the training pictures are mirrored.
        on_device: Whether the pictures live on the training device.
    """

    def __init__(
        self,
        root: str | list[str] = "data/landscapes",
        batch_size: int = 64,
        image_size: int = 64,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        strict: bool = False,
        cache_dir: str | None = None,
        cache_processes: int | None = None,
        num_workers: int = 0,
        random_flip: bool = True,
        on_device: bool | None = None,
    ) -> None:
        super().__init__(
            root,
            batch_size,
            image_size,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            strict=strict,
            cache_dir=cache_dir,
            cache_processes=cache_processes,
            num_workers=num_workers,
            use_labels=False,
            random_flip=random_flip,
            on_device=on_device,
        )


def _share(fraction: float, count: int) -> int:
    """Number of pictures that a share of them is, 1 at the least unless the share is 0."""
    return max(1, round(fraction * count)) if fraction else 0


def _rank(name: str) -> str:
    """Puts names in an order that is random and always the same."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()


def _common(pictures: Sequence[Picture]) -> str:
    """The folders that all names begin with."""
    if not pictures:
        return ""
    first, last = pictures[0].name.split("/")[:-1], pictures[-1].name.split("/")[:-1]  # sorted: all others lie between
    shared = 0
    while shared < min(len(first), len(last)) and first[shared] == last[shared]:
        shared += 1
    return "".join(part + "/" for part in first[:shared])
