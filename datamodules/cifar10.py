"""CIFAR-10: torchvision's download, the unpacked official pickles, or class folders of images."""

import functools
import hashlib
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchvision import datasets

from datamodules.base import NOT_THERE, ImageDataModule, held_out
from datamodules.files import download, may_not_read
from datamodules.folder import ImageFolder
from datamodules.layout import hash_at
from datamodules.loaders import Split
from datamodules.pickles import read_pickle
from diffusion_lit.checks import check_count
from diffusion_lit.storage.folders import scratch_of
from diffusion_lit.words import article, counted, first_line

SOURCE = datasets.CIFAR10
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
OFFICIAL = 50_000  # training images
FILES: dict[str, list[list[str]]] = {"train": SOURCE.train_list, "test": SOURCE.test_list}


class CIFAR10(ImageDataModule):
    """60,000 colour photographs of 32x32 pixels in ten classes (Krizhevsky 2009), 50,000 of them for training.

    The training images are split into "train" and a fixed random "val"; "test" is the official one. Figures in papers
    are usually taken against all 50,000 training images: `reference_images("train+val")`.

    Args:
        root: Folder `cifar-10-batches-py`, or the folder that holds or shall hold it or the official
            `cifar-10-python.tar.gz`; or a folder with `train/airplane/*.png` ... and `test/airplane/*.png` ...
        batch_size: Images per training step over all ranks.
        val_size: Training images held out for validation; a tenth where there are fewer than ten times as many.
        download: Whether missing files are downloaded, through torchvision and verified by checksum.
        cache_dir: Where images of class folders are kept decoded; `images` in the folder of all caches by default.
        split_by: How images of class folders are held out: by the hash of each file's "content", so that one that is
            added moves no other, `val_size` of 50,000, or by their "order", as before version 2 of the caches.
        use_labels: Whether batches carry the class, and the model is made conditional.
        random_flip: Whether half of the training images are mirrored, redrawn at each epoch.
        on_device: Whether the images live on the training device; by default they do on a GPU.
    """

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        val_size: int = 5000,
        download: bool = True,
        cache_dir: str | None = None,
        split_by: Literal["content", "order"] = "content",
        use_labels: bool = True,
        random_flip: bool = True,
        on_device: bool | None = None,
    ) -> None:
        super().__init__(batch_size, 0, use_labels, random_flip, on_device)
        check_count(0, val_size=val_size)
        self.root = Path(root).expanduser()
        self.val_size = val_size
        self.download = download
        self.cache_dir = cache_dir
        self.split_by: Literal["content", "order"] = split_by
        self._announced: set[str] = set()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (3, 32, 32)."""
        return (3, SIDE, SIDE)

    @property
    def class_names(self) -> list[str]:
        """The ten names, from "airplane" to "truck"."""
        return list(CLASSES) if self.use_labels else []

    def rule(self) -> dict[str, Any]:
        """How images of class folders are held out."""
        return {"split_by": self.split_by}

    def follow(self, rule: dict[str, Any]) -> None:
        """Takes the rule that a model was trained under; see `ImageDataModule.follow`."""
        split_by = rule.get("split_by", self.split_by) if rule else "order"
        if split_by != self.split_by:
            self.split_by = "order" if split_by == "order" else "content"
            self.__dict__.pop("_folder", None)
            self._forget()

    def prepare_data(self) -> None:
        """Downloads or unpacks what is missing, or decodes the images of class folders.

        Raises:
            FileNotFoundError: If files are missing and are not to be downloaded, or cannot be.
        """
        if self._batches() is not None:
            return
        if self._has_class_folders():
            _ = self._folder.cache
            return
        archive = self.root / SOURCE.filename
        if not self.writes_root:
            raise FileNotFoundError(self._missing(NOT_THERE))
        if not archive.is_file() and not self.download:
            raise FileNotFoundError(self._missing("download is off"))
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if not archive.is_file():
                download([SOURCE.url], SOURCE.filename, SOURCE.tgz_md5, self.root)
        except Exception as error:  # torchvision lets through whatever the network raises
            raise FileNotFoundError(self._missing(f"the download failed: {first_line(error)}")) from error
        _unpack(archive, self.root / SOURCE.base_folder)

    def read(self, split: str) -> Split:
        """Reads a split; see `ImageDataModule.read`.

        Returns:
            Images (N, 3, 32, 32) and classes.

        Raises:
            FileNotFoundError: If files are missing.
            ValueError: If a file is damaged or is not CIFAR-10.
        """
        part = "test" if split == "test" else "train"
        batches = self._batches()
        if batches is not None:
            self._announce(batches, part)
            pieces = [read_batch(batches / name) for name, _ in FILES[part]]
            images, labels = (torch.cat(piece) for piece in zip(*pieces, strict=True))
        elif self._has_class_folders():
            return self._read_class_folders(split)
        else:
            raise FileNotFoundError(self._missing("prepare_data has not downloaded them"))
        if part == "test":
            return Split(images, labels)
        rows = held_out(len(images), self.val_size)[split]
        return Split(images[rows], labels[rows])

    @functools.cached_property
    def _folder(self) -> ImageFolder:
        """The class folders as a folder of images."""
        folder = ImageFolder(str(self.root), self.batch_size, SIDE, split_by=self.split_by, cache_dir=self.cache_dir)
        if tuple(folder.class_names) != CLASSES:
            raise ValueError(
                f"{self.root} has the class folders {', '.join(folder.class_names) or '(none)'}, not CIFAR-10's "
                f"{', '.join(CLASSES)}; use ImageFolder for other data."
            )
        return folder

    def _has_class_folders(self) -> bool:
        return all((self.root / part / CLASSES[0]).is_dir() for part in ("train", "test"))

    def _read_class_folders(self, split: str) -> Split:
        cache = self._folder.cache
        start, end = cache.pools.get("test" if split == "test" else "train", (0, 0))
        rows = torch.arange(start, end)
        if split != "test" and cache.hashes:
            border = hash_at(min(self.val_size / OFFICIAL, 0.1))
            held = torch.tensor([digest < border for digest in cache.hashes[start:end]], dtype=torch.bool)
            rows = rows[held if split == "val" else ~held]
        elif split != "test":
            rows = rows[held_out(end - start, self.val_size)[split]]
        labels = self._folder.labels([cache.names[row] for row in rows.tolist()])
        assert labels is not None
        return Split(torch.from_numpy(cache.images[rows.numpy()]), labels)

    def _batches(self) -> Path | None:
        """The folder that holds all official pickles, or None."""
        for folder in (self.root, self.root / SOURCE.base_folder):
            if all((folder / name).is_file() for name, _ in FILES["train"] + FILES["test"]):
                return folder
        return None

    def _announce(self, folder: Path, part: str) -> None:
        """Warns once about files that are not the official ones; they are read anyway, by a safe reader."""
        if part in self._announced:
            return
        self._announced.add(part)
        other = [name for name, checksum in FILES[part] if _md5(folder / name) != checksum]
        if other:
            rank_zero_warn(
                f"{folder}: {', '.join(other)} {'differs' if len(other) == 1 else 'differ'} from the official files "
                "(by MD5); they are read all the same, as numpy arrays and plain containers and nothing else."
            )

    def _missing(self, why: str) -> str:
        return (
            f"CIFAR10 needs data_batch_1 to data_batch_5 and test_batch, which are neither in {self.root} nor "
            f"in {self.root / SOURCE.base_folder}, nor are there class folders such as "
            f"{self.root / 'train' / CLASSES[0]}, and {why}; put {SOURCE.url} into {self.root}, point root at an "
            "unpacked copy, or run once with internet access and download: true."
        )


def read_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Reads one of the official pickles.

    Args:
        path: The file.

    Returns:
        Images (N, 3, 32, 32), uint8, and classes (N,).

    Raises:
        ValueError: If it does not hold what a CIFAR-10 batch holds.
    """
    batch = read_pickle(path)
    if not isinstance(batch, dict):
        raise ValueError(f"{path} holds {article(batch)} instead of a CIFAR-10 batch; get the file anew.")
    data, labels = (batch.get(name, batch.get(name.encode())) for name in ("data", "labels"))
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * SIDE**2:
        raise ValueError(f"{path} has no uint8 array of 3,072 columns under 'data', so it is no CIFAR-10 batch.")
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < len(CLASSES) for label in labels):
        raise ValueError(f"{path} has no list of classes from 0 to 9 under 'labels', so it is no CIFAR-10 batch.")
    if len(labels) != len(data):
        raise ValueError(
            f"{path} holds {counted(len(data), 'image')} and {counted(len(labels), 'label')}; they do not belong "
            "together."
        )
    return torch.from_numpy(data.reshape(-1, 3, SIDE, SIDE).copy()), torch.tensor(labels, dtype=torch.int64)


def _md5(path: Path) -> str:
    try:
        return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    except PermissionError as error:
        raise may_not_read(path) from error


def _unpack(archive: Path, place: Path) -> None:
    """Unpacks the official archive; the folder appears whole or not at all."""
    wanted = [name for name, _ in FILES["train"] + FILES["test"]]
    scratch = scratch_of(place)
    scratch.mkdir()
    try:
        with tarfile.open(archive) as tar:
            for name in wanted:
                member = tar.extractfile(f"{place.name}/{name}")
                if member is None:
                    raise ValueError(f"{archive} holds no file {place.name}/{name}; get the archive anew.")
                with member, (scratch / name).open("wb") as file:
                    shutil.copyfileobj(member, file)
        os.replace(scratch, place)
    except (tarfile.TarError, EOFError, KeyError, OSError) as error:
        raise ValueError(f"{archive} cannot be unpacked ({first_line(error)}); remove it and get it anew.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
