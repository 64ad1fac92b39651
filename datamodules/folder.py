"""Any images: a folder of any depth, with or without classes and splits, a zip of it, or a list of globs.

The names of folders decide what they mean. A single top-level folder is skipped. `train`, `val` and `test` beside each
other are the splits. Folders below them are classes if there are at least two; a few training images beside them, at
most as many as a class has on average, are left out with a warning. Classes are numbered in the order of their names,
numbers in them as numbers: 0, 1, 2, 10.

Without splits on disk, the hash h of its contents, as a number in [0, 1), assigns each image: to "val" if h <
val_fraction, to "test" if h >= 1 - test_fraction. Adding, removing or renaming an image moves no other, and copies of
one image are in the same split. If a requested split would be empty, it gets the image with the lowest hash ("val") or
the highest ("test").
"""

import functools
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from datamodules.base import ImageDataModule
from datamodules.cache import Cache, prepare
from datamodules.decode import ENDINGS, Crops, Transform
from datamodules.layout import Layout, describe_classes, held_out_of, lay_out
from datamodules.loaders import Split
from datamodules.sources import list_images
from diffusion_lit.checks import check_count, check_number
from diffusion_lit.words import counted


class ImageFolder(ImageDataModule):
    """Images of any size and kind from a folder, a zip or a list of globs, cut to squares and resized.

    JPEG, PNG, WebP, BMP, TIFF and GIF (first frame), in grey, palette, alpha, CMYK or 16 bits, rotated by their EXIF
    tag. Each image is decoded once, into a cache; broken ones are reported and skipped.

    Args:
        root: A folder, a zip, a glob such as "dogs/*terrier*", or a list of globs.
        batch_size: Images per training step over all ranks.
        image_size: Pixels per side.
        channels: 3 for colour, 1 for grey.
        resize: "lanczos", the sharper, or "area", the mean over the pixels that fall into each.
        crop: Pixels per side of the centre square that is kept before resizing; by default as many as fit.
        upscale: Whether images smaller than image_size are enlarged rather than left out.
        background: Grey level 0..255 behind transparent pixels.
        bits: How many bits of images with 16 bits per channel are used, such as 12 for values 0..4095; by default the
            fewest of 8, 10, 12, 14 and 16 that hold the values of 64 images.
        val_fraction: Share of the training images held out for validation, where the disk has no val folder.
        test_fraction: Share held out as test split, where the disk has no test folder; with 0, it is the val split.
        split_by: How images are dealt to the splits: by the hash of each file's "content", or by their "order", the
            first of an order that changes with every file, as before version 2 of the caches.
        strict: Whether an image that cannot be used stops the run instead of being left out.
        cache_dir: Folder of the caches; `images` in the folder of all caches by default.
        cache_processes: Processes that decode; by default one per core.
        num_workers: Threads that read ahead from the cache; by default 4 where it lies on a network file system, 0
            elsewhere.
        use_labels: Whether folders are classes, which batches carry and the model is conditioned on.
        random_flip: Whether half of the training images are mirrored, redrawn at each epoch.
        on_device: Whether the images live on the training device; by default they do on a GPU when they take less
            than a quarter of its free memory.
        crops: Number of further squares that are cut out of each training image, at random places and sizes, for small
            sets of large photographs; 0 for the centre alone. Held-out images are the centres.
        smallest_crop: The smallest share of an image's shorter side that such a square has. Batches carry log2 of that
            share as "crop_size", which a network with augment_dim 1 is told; samples are then drawn as of whole images.
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
        bits: int | None = None,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        split_by: Literal["content", "order"] = "content",
        strict: bool = False,
        cache_dir: str | None = None,
        cache_processes: int | None = None,
        num_workers: int | None = None,
        use_labels: bool = True,
        random_flip: bool = True,
        on_device: bool | None = None,
        crops: int = 0,
        smallest_crop: float = 0.5,
    ) -> None:
        super().__init__(batch_size, num_workers, use_labels, random_flip, on_device)
        check_number(least=0, below=0.5, val_fraction=val_fraction, test_fraction=test_fraction)
        check_count(cache_processes=cache_processes)
        self.root = root
        if split_by not in ("content", "order"):
            raise ValueError(f"split_by is {split_by!r}; choose 'content' or 'order'.")
        check_count(0, crops=crops)
        check_number(above=0, most=1, smallest_crop=smallest_crop)
        if crops and split_by != "content":
            raise ValueError(f"crops is {crops} and split_by {split_by!r}; random crops take split_by 'content'.")
        how = (image_size, channels, resize, crop, upscale, background, bits)
        self.transform = Crops(*how, crops, smallest_crop) if crops else Transform(*how)
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.split_by = split_by
        self.strict = strict
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self.cache_processes = cache_processes
        self._numbered: list[str] = []

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (channels, image_size, image_size)."""
        return self.transform.shape

    @functools.cached_property
    def layout(self) -> Layout:
        """What lies under the root; looked up once.

        Raises:
            ValueError: If there is no image.
        """
        layout = lay_out(list_images(self.root), self.use_labels)
        if not any(layout.pools.values()):
            skipped = layout.listing.skipped
            more = f" ({skipped[0].name} {skipped[0].reason})" if skipped else ""
            raise ValueError(
                f"There is no image in {layout.listing.label}{more}; files must end in one of {', '.join(ENDINGS)}."
            )
        return layout

    @property
    def class_names(self) -> list[str]:
        """The folders' names where they are classes, in the order of their numbers."""
        return self._numbered or self.layout.classes

    def number_classes(self, names: list[str]) -> bool:
        """Renumbers the classes; see `ImageDataModule.number_classes`."""
        self._numbered = names
        rank_zero_info(f"The classes are numbered as the model knows them: {describe_classes(names)}.")
        return True

    @functools.cached_property
    def cache(self) -> Cache:
        """The decoded images, prepared if they are not yet."""
        layout = self.layout
        pools = {pool: images for pool, images in layout.pools.items() if images}
        options = (self.transform, self.cache_dir, self.strict, self.cache_processes, self.split_by == "content")
        cache = prepare(layout.listing, pools, *options)
        counts = Counter(layout.class_of(name) for name in cache.names)
        kinds = describe_classes(self.class_names, counts)
        note = f" ({layout.note})" if layout.note else ""
        rank_zero_info(f"{counted(len(cache.names), 'image')} of {layout.listing.label}, {kinds}{note}.")
        return cache

    def rule(self) -> dict[str, Any]:
        """How images are dealt to the splits, and the bits that are used of 16."""
        return {"split_by": self.split_by, "bits": self.transform.bits}

    def follow(self, rule: dict[str, Any]) -> None:
        """Takes the rule that a model was trained under; see `ImageDataModule.follow`."""
        rule = rule or {"split_by": "order", "bits": 16}  # as it was before it was recorded
        if "split_by" not in rule or self.rule() == {name: rule[name] for name in self.rule()}:
            return
        rank_zero_info(f"split_by and bits are as the model was trained with: {rule['split_by']}, {rule['bits']}.")
        self.split_by = rule["split_by"]
        self.transform = replace(self.transform, bits=rule["bits"])
        self.__dict__.pop("cache", None)
        self._forget()

    def prepare_data(self) -> None:
        """Decodes the images into the cache where that was not done before."""
        _ = self.cache

    def rows(self, split: str) -> tuple[int, int]:
        """Where a split lies in the cache.

        Args:
            split: "train", "val" or "test".

        Returns:
            Its first row and the row after its last.

        Raises:
            ValueError: If there are too few images to hold some out.
        """
        pools = self.cache.pools
        if "train" not in pools or pools["train"][0] == pools["train"][1]:
            raise ValueError(f"{self.layout.listing.label} has no usable image to train on.")
        start, end = pools["train"]
        val = 0 if "val" in pools else self._held_out(self.val_fraction, start, end, lowest=True)
        test = 0 if "test" in pools else self._held_out(self.test_fraction, start, end, lowest=False)
        if end - start - val - test < 1:
            raise ValueError(
                f"{self.layout.listing.label} has {counted(end - start, 'image')} to train on, too few to hold "
                f"{val + test} out; set val_fraction and test_fraction to 0, or use SingleImage to learn from one "
                "image."
            )
        if self.split_by == "content":  # val | train | test, by rising hash
            places = {"val": (start, start + val), "train": (start + val, end - test), "test": (end - test, end)}
        else:  # val | test | train
            places = {"val": (start, start + val), "train": (start + val + test, end)}
            places["test"] = (start + val, start + val + test)
        if "val" in pools:
            places["val"] = pools["val"]
        if "test" in pools:
            places["test"] = pools["test"]
        elif test == 0:
            places["test"] = places["val"]
        return places[split]

    def _held_out(self, fraction: float, start: int, end: int, lowest: bool) -> int:
        """Number of images of the training pool that are held out at one end."""
        if not fraction:
            return 0
        if self.split_by != "content":
            return max(1, round(fraction * (end - start)))
        return held_out_of(self.cache.hashes[start:end], fraction, lowest)

    def read(self, split: str) -> Split:
        """Opens a split in the cache; see `ImageDataModule.read`.

        Returns:
            Memory-mapped images, and classes where folders are such.
        """
        start, end = self.rows(split)
        images, labels = self.cache.images[start:end], self.labels(self.cache.names[start:end])
        if not isinstance(self.transform, Crops):
            return Split(images, labels)
        if split != "train":
            return Split(np.ascontiguousarray(images[:, 0]), labels)
        squares = images.shape[1]
        whole = images.reshape(-1, *self.image_shape)
        return Split(whole, None if labels is None else labels.repeat_interleave(squares))

    @functools.cached_property
    def crop_sizes(self) -> Tensor:
        """log2 of the share of its image's shorter side that each training square has, float32 (N, 1)."""
        transform = self.transform
        assert isinstance(transform, Crops)
        start, end = self.rows("train")
        keys = self.cache.hashes[start:end]
        shares = [transform.share(key, number) for key in keys for number in range(1 + transform.crops)]
        return torch.tensor(shares, dtype=torch.float32).log2()[:, None]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Adds the sizes of random crops to a training batch."""
        if isinstance(self.transform, Crops) and self.trainer is not None and self.trainer.training:
            rows = batch["index"]
            self.crop_sizes = self.crop_sizes.to(rows.device)  # once
            batch["crop_size"] = self.crop_sizes[rows]
        return batch

    def labels(self, names: Sequence[str]) -> Tensor | None:
        """The classes of images.

        Args:
            names: Their names in the cache.

        Returns:
            An int64 tensor (N,), or None where there are no classes.
        """
        classes = {name: number for number, name in enumerate(self.class_names)}
        if not classes:
            return None
        return torch.tensor([classes[str(self.layout.class_of(name))] for name in names], dtype=torch.int64)

    def fingerprint(self, split: str) -> str:
        """The SHA-256 over all prepared pixels, the split's rows and its labels; see `ImageDataModule.fingerprint`."""
        digest = hashlib.sha256(self.cache.checksum.encode())
        for name in split.split("+"):
            labels = self.split(name).labels
            digest.update(repr((self.image_shape, self.rows(name))).encode())
            digest.update(b"" if labels is None else labels.numpy().tobytes())
        return digest.hexdigest()

    def _identity_of(self, split: str) -> str:
        """The files of this split alone, so that images in another split change nothing."""
        start, end = self.rows(split)
        if not self.cache.hashes:
            return self.fingerprint(split)
        classes = [self.layout.class_of(name) for name in self.cache.names[start:end]] if self.class_names else []
        files = sorted(zip(self.cache.hashes[start:end], classes or self.cache.hashes[start:end], strict=True))
        return hashlib.sha256(repr((self.transform, files)).encode("utf-8", "surrogateescape")).hexdigest()


class Landscapes(ImageFolder):
    """Landscape photographs, such as Kaggle's landscape-images: `ImageFolder` without classes at 64x64 pixels.

    Args:
        root: A folder, a zip, a glob, or a list of globs; see `ImageFolder`.
        options: Further arguments of `ImageFolder`.
    """

    def __init__(self, root: str | list[str] = "data/landscapes", **options: Any) -> None:
        super().__init__(root, use_labels=False, **options)
