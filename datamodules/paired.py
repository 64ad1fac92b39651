"""Pairs of images from two folders: what a model shall make, and what it is given to make it from.

Two images are a pair if their names are the same up to the ending, below the part that all names of a folder share:

    photos/train/0001.jpg    sketches/train/0001.png
"""

import functools
import hashlib
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
import torch

from datamodules.folder import ImageFolder
from datamodules.loaders import Array, Split
from diffusion_lit.checks import check_count


class PairedFolder(ImageFolder):
    """Images of a folder, each with the image of another folder that a model is given beside it.

    Batches have the latter as "given"; a model takes it by `condition: diffusion_lit.diffusion.PairedImage`. Both are
    cut, resized and mirrored alike, and given images may be smaller: they are enlarged. Splits are those of the first
    folder; an image without a partner is refused. The pairs are held in memory.

    Args:
        root: The images that a model shall make: a folder, a zip, a glob, or a list of globs; see `ImageFolder`.
        given: The images that it is given, in the same forms.
        given_channels: 3 for colour, 1 for grey.
        batch_size: Images per training step over all ranks.
        image_size: Pixels per side of both.
        channels: Channels of the images to make: 3 for colour, 1 for grey.
        resize: "lanczos", the sharper, or "area", the mean over the pixels that fall into each.
        val_fraction: Share of the training images held out for validation, where the disk has no val folder.
        test_fraction: Share held out as test split, where the disk has no test folder; with 0, it is the val split.
        strict: Whether an image that cannot be used stops the run instead of being left out.
        cache_dir: Folder of the caches; `images` in the folder of all caches by default.
        cache_processes: Processes that decode; by default one per core.
        random_flip: Whether half of the training pairs are mirrored, redrawn at each epoch.
        on_device: Whether the images live on the training device; by default they do on a GPU when they take less
            than a quarter of its free memory.
    """

    def __init__(
        self,
        root: str | list[str],
        given: str | list[str],
        given_channels: int = 3,
        batch_size: int = 64,
        image_size: int = 64,
        channels: int = 3,
        resize: Literal["lanczos", "area"] = "lanczos",
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        strict: bool = False,
        cache_dir: str | None = None,
        cache_processes: int | None = None,
        random_flip: bool = True,
        on_device: bool | None = None,
    ) -> None:
        super().__init__(
            root,
            batch_size,
            image_size,
            channels,
            resize,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            strict=strict,
            cache_dir=cache_dir,
            cache_processes=cache_processes,
            use_labels=False,
            random_flip=random_flip,
            on_device=on_device,
        )
        check_count(given_channels=given_channels)
        self.given, self.given_channels, self.resize = given, given_channels, resize

    @functools.cached_property
    def partners(self) -> ImageFolder:
        """The folder of the given images."""
        return ImageFolder(
            self.given,
            image_size=self.transform.shape[1],
            channels=self.given_channels,
            resize=self.resize,
            upscale=True,
            strict=self.strict,
            cache_dir=None if self.cache_dir is None else str(self.cache_dir),
            cache_processes=self.cache_processes,
            use_labels=False,
        )

    def prepare_data(self) -> None:
        """Decodes the images of both folders where that was not done before."""
        super().prepare_data()
        self.partners.prepare_data()

    def read(self, split: str) -> Split:
        """A split with its pairs, the given image's channels behind the image's own.

        Raises:
            ValueError: If an image has no partner, or names differ only in their endings.
        """
        start, end = self.rows(split)
        there = self.partners.cache
        places = {_key(name, self.partners.layout.prefix): row for row, name in enumerate(there.names)}
        if len(places) < len(there.names):
            raise ValueError(
                f"{self.partners.layout.listing.label} has images of one name and several endings; name each once."
            )
        names = [_key(name, self.layout.prefix) for name in self.cache.names[start:end]]
        unfit = {_key(skip.name, self.partners.layout.prefix): f"{skip.name} {skip.reason}" for skip in there.skipped}
        for name in names:
            if name not in places:
                why = f" that can be used ({unfit[name]})" if name in unfit else ""
                raise ValueError(
                    f"The image {name} has no partner in {self.partners.layout.listing.label}{why}; give it one of the "
                    "same name, whatever its ending, or take it out."
                )
        rows = np.array([places[name] for name in names], dtype=np.int64)
        pairs = np.concatenate([np.asarray(self.cache.images[start:end]), np.asarray(there.images[rows])], axis=1)
        return Split(torch.from_numpy(pairs), None, self.given_channels)

    def reference_pairs(self, split: str) -> Array:
        """The given images of a split, uint8 (N, C', H, W); see `reference_images`."""
        return self.split(split).images[:, -self.given_channels :]

    def fingerprint(self, split: str) -> str:
        """The SHA-256 over both folders; see `ImageFolder.fingerprint`."""
        return hashlib.sha256((super().fingerprint(split) + self.partners.cache.checksum).encode()).hexdigest()


def _key(name: str, prefix: str) -> str:
    """The name that an image and its partner share."""
    return str(PurePosixPath(name[len(prefix) :]).with_suffix(""))
