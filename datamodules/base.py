"""Base of the data modules: batches, keyed order, sharding, and the properties that a model needs.

A batch is `{"image": float32 (B, C, H, W) in [-1, 1], "index": int64 (B,), "label": int64 (B,)}` on the training
device, the last only where there are classes. Images stay uint8 until their batch is made: x = u / 127.5 - 1.
"""

import hashlib
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from datamodules.loaders import Array, EvalLoader, Key, Split, TrainLoader
from diffusion_lit.checks import check_count, check_number
from diffusion_lit.diffusion.rng import keyed_generator, run_seed, send
from diffusion_lit.runtime.mounts import network_mount
from diffusion_lit.words import counted, few

SPLITS = ("train", "val", "test")
NOT_THERE = (
    "a checkpoint named that folder, so that nothing is downloaded or unpacked into it unless --data_root names it"
)
READERS = 4  # threads that read ahead from a slow disk
CHUNK = 8192  # images that are copied to a device at once
DEVICE_SHARE = 0.25  # of the device's free memory that a data set may take by default


class ImageDataModule(LightningDataModule, ABC):
    """Base class of the data modules: a subclass defines how to read a split, and the shape and classes of its images.

    Args:
        batch_size: Images per training step over all ranks.
        num_workers: Threads that read ahead from an array on disk; by default 4 where it lies on a network file system,
            0 elsewhere. Sets in memory need none.
        use_labels: Whether batches carry the class, and the model is made conditional.
        random_flip: Whether half of the training images are mirrored, redrawn at each epoch.
        on_device: Whether the images live on the training device; by default they do on a GPU when they take less
            than a quarter of its free memory.
    """

    train_loader: type[TrainLoader] = TrainLoader
    cache_dir: Any = None  # folder of the caches, of those that keep one
    random_flip: bool = False

    def __init__(
        self,
        batch_size: int,
        num_workers: int | None = None,
        use_labels: bool = True,
        random_flip: bool = False,
        on_device: bool | None = None,
    ) -> None:
        super().__init__()
        check_count(batch_size=batch_size)
        check_number(least=0, most=128, whole=True, num_workers=num_workers)
        self.save_hyperparameters(logger=False)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.use_labels = use_labels
        self.random_flip = random_flip
        self.on_device = on_device
        self.writes_root = True
        self._told = False
        self._splits: dict[str, Split] = {}
        self._moved: dict[str, Tensor] = {}
        self._identities: dict[str, dict[str, Any]] = {}

    def write_nowhere(self, but_root: bool) -> None:
        """Resets the folders to write to, which came from a file: caches go to their default folder.

        Args:
            but_root: Whether the user named `root`, so that data may be downloaded there.
        """
        self.writes_root = but_root
        self.cache_dir = None

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of the images."""

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """Name of each class; empty where there are no labels."""

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 where there are no labels."""
        return len(self.class_names)

    @abstractmethod
    def read(self, split: str) -> Split:
        """Reads a split from memory or disk; called once per split, after `prepare_data`.

        Args:
            split: "train", "val" or "test".

        Returns:
            Its images and classes.
        """

    def setup(self, stage: str | None = None) -> None:
        """Reads the splits that a stage of the trainer needs; all without one."""
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}
        for split in needed.get(stage or "", SPLITS):
            self.split(split)

    def split(self, name: str) -> Split:
        """A split, read at the first call.

        Args:
            name: "train", "val" or "test".

        Returns:
            Its images and classes, the latter None where labels are not used.

        Raises:
            ValueError: If there is no such split, or it holds no image.
        """
        if name not in SPLITS:
            raise ValueError(f"There is no split {name!r}; choose one of {', '.join(SPLITS)}.")
        if name not in self._splits:
            read = self.read(name)
            self._splits[name] = read if self.use_labels else read._replace(labels=None)
        return self._splits[name]

    def reference_images(self, split: str) -> Array:
        """The images of a split as evaluation compares with: un-augmented.

        Args:
            split: "train", "val", "test", or several joined by "+", such as "train+val".

        Returns:
            A uint8 tensor or memory-mapped array (N, C, H, W).
        """
        parts = [self.split(name).own for name in split.split("+")]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([_in_memory(part) for part in parts])

    def reference_labels(self, split: str) -> Tensor | None:
        """The classes of a split.

        Args:
            split: As for `reference_images`.

        Returns:
            An int64 tensor (N,), or None where there are no labels.
        """
        parts = [labels for name in split.split("+") if (labels := self.split(name).labels) is not None]
        return torch.cat(parts) if parts else None

    def fingerprint(self, split: str) -> str:
        """What a split holds, as a SHA-256 over its shape, pixels and labels.

        Args:
            split: As for `reference_images`.

        Returns:
            64 hexadecimal digits; any change of an image, of the transform or of the order changes them.
        """
        digest = hashlib.sha256()
        for name in split.split("+"):
            images, labels = self.split(name).images, self.split(name).labels
            digest.update(repr(tuple(images.shape)).encode())
            for start in range(0, len(images), 4096):
                digest.update(np.ascontiguousarray(np.asarray(images[start : start + 4096])).tobytes())
            if labels is not None:
                digest.update(labels.numpy().tobytes())
        return digest.hexdigest()

    def number_classes(self, names: list[str]) -> bool:
        """Renumbers the classes, where a data set can.

        Args:
            names: The names of its own classes, in the order of their numbers from now on.

        Returns:
            Whether it could; here it cannot.
        """
        return False

    def match_classes(self, names: list[str]) -> None:
        """Numbers the classes as a model that was trained before knows them.

        Args:
            names: The names of the model's classes in the order of their numbers; none where it knows none.

        Raises:
            ValueError: If the classes have other names than the model's.
        """
        mine = self.class_names
        if not names or not mine or names == mine:
            return
        if sorted(names) == sorted(mine) and self.number_classes(list(names)):
            self._forget()
            return
        gone, new = ([name for name in one if name not in other] for one, other in ((names, mine), (mine, names)))
        differ = f"without {few(gone)}, and with {few(new)} instead" if gone or new else f"as {few(mine)}"
        raise ValueError(
            f"The model was trained on the classes {few(names)}, and the data has them {differ}; give it the data of "
            "its classes, rename them as they were, or train anew."
        )

    def identity(self) -> dict[str, Any]:
        """The checkpoint's record of the data: class, and count and fingerprint of the training and validation images.

        Holds only the splits that were read so far.
        """
        for name in ("train", "val"):
            if name in self._splits and name not in self._identities:
                self._identities[name] = {"count": len(self._splits[name].images), "sha256": self._identity_of(name)}
        return {"class": type(self).__name__, **self.rule(), **self._identities}

    def _identity_of(self, split: str) -> str:
        return self.fingerprint(split)

    def rule(self) -> dict[str, Any]:
        """The rule that, beside the arguments, assigns images to splits, as plain values."""
        return {}

    def follow(self, rule: dict[str, Any]) -> None:
        """Takes the rule that a model was trained under.

        Args:
            rule: The `identity` in its checkpoint, empty in checkpoints older than it.
        """

    def continue_from(self, recorded: dict[str, Any], class_names: list[str]) -> None:
        """Takes the rule and classes of the data that a model was trained on, and warns where the data differ.

        Args:
            recorded: The `identity` in its checkpoint, empty in checkpoints older than it.
            class_names: The names of its classes in the order of their numbers; none where it knows none.

        Raises:
            ValueError: If the classes have other names than the model's.
        """
        were_read = list(self._splits)
        self.follow(recorded)
        self.match_classes(class_names)
        for name in were_read:
            self.split(name)
        self.compare_identity(recorded)

    def _forget(self) -> None:
        """Forgets what was read: it is to be read in another way."""
        self._splits.clear()
        self._moved.clear()
        self._identities.clear()

    def compare_identity(self, recorded: dict[str, Any]) -> None:
        """Says where the data is not what a checkpoint was trained on.

        Args:
            recorded: The `identity` in the checkpoint.
        """
        mine = self.identity()
        for name, what in (("train", "trained"), ("val", "validated")):
            then, now = recorded.get(name), mine.get(name)
            if then and now and then != now:
                rank_zero_warn(
                    f"The data is not what the checkpoint was {what} on: {then['count']:,} images of "
                    f"{recorded.get('class')} with the fingerprint {then['sha256'][:12]} then, {now['count']:,} of "
                    f"{mine['class']} with {now['sha256'][:12]} now. The run goes on with those of now; an image that "
                    "was held out may be among those that are trained on, if it is not the same data set with more "
                    "images."
                )

    def train_dataloader(self) -> TrainLoader:
        """Keyed random batches of the training split.

        Raises:
            ValueError: If the batch does not divide over the ranks, or is larger than the split.
        """
        arguments = self._loader_arguments("train")
        count = len(arguments["split"].images)
        if count < self.batch_size:
            world, _ = self._ranks()
            most = count // world * world  # a batch divides over the ranks
            way = f"choose at most {most}" if most else f"start {counted(count, 'rank')} at most"
            raise ValueError(
                f"batch_size is {self.batch_size}, but the training split has {counted(count, 'image')}, so that no "
                f"whole batch fits; {way}."
            )
        self._tell_missing_classes(arguments["split"].labels)
        loader = self.train_loader(augment=self._augment, **arguments)
        loader.trainer = self.trainer
        return loader

    def _tell_missing_classes(self, labels: Tensor | None) -> None:
        """Warns of classes that have no training image, all of which may be held out of a small set."""
        if labels is None:
            return
        counts = torch.bincount(labels, minlength=self.num_classes)
        missing = [name for name, count in zip(self.class_names, counts.tolist(), strict=False) if count == 0]
        if missing:
            rank_zero_warn(
                f"{counted(len(missing), 'class', 'has', 'have')} no training image: {few(missing)}. Samples of such a "
                "class will be noise; add images, hold fewer out, or set use_labels to false."
            )

    def val_dataloader(self) -> EvalLoader | list[EvalLoader]:
        """The validation split in order; in training an empty list where nothing is held out."""
        return self._eval_loader("val")

    def test_dataloader(self) -> EvalLoader | list[EvalLoader]:
        """The test split in order."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> EvalLoader | list[EvalLoader]:
        """The test split in order."""
        return self._eval_loader("test")

    def augment(self, images: Tensor, generator: torch.Generator, rows: slice) -> Tensor:
        """Augments a training batch: mirrors half of the images where `random_flip` is on.

        Draws are made for the global batch of `batch_size` images, of which each rank takes its rows.

        Args:
            images: This rank's images, uint8 (B, C, H, W).
            generator: Keyed by (seed, epoch, batch).
            rows: This rank's rows of the global batch.

        Returns:
            Augmented images, uint8 (B, C, H, W).
        """
        if not self.random_flip:
            return images
        mirrored = send(self._draw_mirrored(generator, rows), images.device)
        both = torch.cat([images, images.flip(-1)])  # and choose by row: four times as fast as `where` on bytes
        return both.index_select(0, torch.arange(len(images), device=images.device) + len(images) * mirrored)

    def mirrored(self, epoch: int, batch: int) -> Tensor | None:
        """Which images of a training batch are mirrored, for a model that caches both copies encoded.

        Args:
            epoch: Number of the epoch.
            batch: Number of the batch in it.

        Returns:
            Bool (B,) for this rank's images, or None where none ever is.

        Raises:
            ValueError: If training images are changed by more than mirroring.
        """
        if type(self).augment is not ImageDataModule.augment:
            raise ValueError(
                f"{type(self).__name__} changes training images by more than mirroring, so that they cannot be "
                "encoded once and for all; set cache_latents to false."
            )
        if not self.random_flip:
            return None
        world, rank = self._ranks()
        return self._draw_mirrored(keyed_generator("augment", run_seed(), epoch, batch), slice(rank, None, world))

    def _draw_mirrored(self, generator: torch.Generator, rows: slice) -> Tensor:
        return (torch.rand(self.batch_size, generator=generator) < 0.5)[rows]

    def _augment(self, images: Tensor, key: Key) -> Tensor:
        world, rank = self._ranks()
        generator = keyed_generator("augment", run_seed(), key.epoch, key.batch)
        return self.augment(images, generator, slice(rank, None, world))

    def _eval_loader(self, name: str) -> EvalLoader | list[EvalLoader]:
        count, (world, _) = len(self.split(name).images), self._ranks()
        if count == 0:
            asked = None if self.trainer is None else self.trainer.state.fn
            if asked in ("validate", "test", "predict"):
                raise ValueError(
                    f"The {name} split has no image, so that there is nothing to {asked.value}; hold images out, or "
                    "give data that has some."
                )
            return []
        if count < world:
            raise ValueError(
                f"The {name} split has {counted(count, 'image')} for {world} ranks; use at most "
                f"{counted(count, 'rank')}, or hold out more images, or none."
            )
        return EvalLoader(**self._loader_arguments(name))

    def _loader_arguments(self, name: str) -> dict[str, Any]:
        """The arguments of a loader over a split."""
        world, rank = self._ranks()
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        split = self.split(name)
        if device.type != "cpu" and self._lives_on(device, split.images):
            if name not in self._moved:
                self._moved[name] = _to_device(split.images, device)
            split = split._replace(images=self._moved[name])
        return {
            "split": split,
            "batch_size": self.batch_size,
            "world": world,
            "rank": rank,
            "num_workers": self.readers(split.images),
            "device": device,
        }

    def readers(self, images: Array) -> int:
        """How many threads read ahead from an array.

        Args:
            images: The array.

        Returns:
            `num_workers` where it is given, 0 for a tensor; otherwise by the kind of disk that the array lies on.
        """
        if isinstance(images, Tensor):
            return 0
        if self.num_workers is not None:
            return self.num_workers
        mount = network_mount(images.filename) if isinstance(images, np.memmap) and images.filename else None
        if mount and not self._told:
            rank_zero_info(
                f"The images lie on a network file system ({mount}): {READERS} threads read ahead on each rank; "
                "num_workers says another number."
            )
            self._told = True
        return READERS if mount else 0

    def _ranks(self) -> tuple[int, int]:
        """Number of ranks, and this one."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _lives_on(self, device: torch.device, images: Array) -> bool:
        """Whether an array is to live on the training device."""
        if self.on_device is not None:
            return self.on_device
        if device.type != "cuda":
            return False
        free, _ = torch.cuda.mem_get_info(device)
        return images.nbytes <= DEVICE_SHARE * free

    def teardown(self, stage: str | None = None) -> None:
        """Frees the training device."""
        self._moved.clear()

    def __getstate__(self) -> dict[str, Any]:
        computed = [name for name in self.__dict__ if isinstance(getattr(type(self), name, None), cached_property)]
        # a process that this is sent to reads them itself
        read: dict[str, Any] = {"_splits": {}, "_moved": {}, "_identities": {}}
        return {name: value for name, value in self.__dict__.items() if name not in computed} | read


def held_out(count: int, val_size: int) -> dict[str, Tensor]:
    """Splits training images into those to train on and a fixed random part to validate on.

    Args:
        count: Number of official training images.
        val_size: Images to hold out; a tenth where there are fewer than ten times as many.

    Returns:
        Rows of "train" and of "val", each rising; the same for every run.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    size = min(val_size, count // 10)
    return {"val": order[:size].sort().values, "train": order[size:].sort().values}


def _in_memory(images: Array) -> Tensor:
    return images if isinstance(images, Tensor) else torch.from_numpy(np.array(images))


def _to_device(images: Array, device: torch.device) -> Tensor:
    """Copies an array to a device in chunks, so that one on disk need not fit in memory."""
    moved = torch.empty(tuple(images.shape), dtype=torch.uint8, device=device)
    for start in range(0, len(images), CHUNK):
        moved[start : start + CHUNK] = _in_memory(images[start : start + CHUNK])
    return moved
