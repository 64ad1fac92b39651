"""MNIST and FashionMNIST, from torchvision's download or from a folder of the four idx files."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision import datasets

from datamodules.base import NOT_THERE, ImageDataModule, held_out
from datamodules.files import download
from datamodules.idx import find_idx, read_idx
from datamodules.loaders import Split
from diffusion_lit.checks import check_count
from diffusion_lit.words import counted, first_line

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
NAMES = [name for part in FILES.values() for name in part]
SIDE = 28


class MNIST(ImageDataModule):
    """70,000 grey handwritten digits (LeCun, Cortes & Burges), 60,000 of them for training.

    The training images are split into "train" and a fixed random "val"; "test" is the official one.

    Args:
        root: Folder of the four idx files, gzipped or not; or where they are downloaded: `root/MNIST/raw`.
        batch_size: Images per training step over all ranks.
        image_size: 28 as published, or 32 with a black border of 2 pixels, which halves evenly more often.
        val_size: Training images held out for validation; a tenth where there are fewer than ten times as many.
        download: Whether missing files are downloaded, through torchvision and verified by checksum.
        use_labels: Whether batches carry the class, and the model is made conditional.
        random_flip: Whether half of the training images are mirrored.
        on_device: Whether the images live on the training device; by default they do on a GPU.
    """

    source: type[datasets.MNIST] = datasets.MNIST
    names: tuple[str, ...] = tuple(str(digit) for digit in range(10))

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        image_size: int = 32,
        val_size: int = 5000,
        download: bool = True,
        use_labels: bool = True,
        random_flip: bool = False,
        on_device: bool | None = None,
    ) -> None:
        super().__init__(batch_size, 0, use_labels, random_flip, on_device)
        if image_size not in (SIDE, 32):
            raise ValueError(f"image_size is {image_size}; {type(self).__name__} has 28 pixels, or 32 with a border.")
        check_count(0, val_size=val_size)
        self.root = Path(root).expanduser()
        self.image_size = image_size
        self.val_size = val_size
        self.download = download

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (1, image_size, image_size)."""
        return (1, self.image_size, self.image_size)

    @property
    def class_names(self) -> list[str]:
        """Name of each class."""
        return list(self.names) if self.use_labels else []

    @property
    def folders(self) -> list[Path]:
        """Where the files are looked for, the folder of the download last."""
        return [self.root, self.root / "raw", self.root / type(self).__name__ / "raw"]

    def prepare_data(self) -> None:
        """Downloads the files where they are missing.

        Raises:
            FileNotFoundError: If files are missing and are not to be downloaded, or cannot be.
        """
        if self._folder() is not None:
            return
        if not (self.download and self.writes_root):
            raise FileNotFoundError(self._missing("download is off" if self.writes_root else NOT_THERE))
        folder = self.folders[-1]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, checksum in self.source.resources:
                if find_idx(folder, name.removesuffix(".gz")) is None:
                    download([mirror + name for mirror in self.source.mirrors], name, checksum, folder)
        except Exception as error:  # torchvision lets through whatever the network raises
            raise FileNotFoundError(self._missing(f"the download failed: {first_line(error)}")) from error

    def read(self, split: str) -> Split:
        """Reads a split; see `ImageDataModule.read`.

        Returns:
            Images (N, 1, image_size, image_size) and classes.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is damaged or the files do not belong together.
        """
        folder = self._folder()
        if folder is None:
            raise FileNotFoundError(self._missing("prepare_data has not downloaded them"))
        images, labels = self._read_part(folder, *FILES["test" if split == "test" else "train"])
        border = (self.image_size - SIDE) // 2
        images = pad(images[:, None], (border,) * 4)
        if split == "test":
            return Split(images, labels)
        rows = held_out(len(images), self.val_size)[split]
        return Split(images[rows], labels[rows])

    def _read_part(self, folder: Path, images_name: str, labels_name: str) -> tuple[Tensor, Tensor]:
        images_path, labels_path = find_idx(folder, images_name), find_idx(folder, labels_name)
        assert images_path is not None and labels_path is not None
        images, labels = read_idx(images_path, 3), read_idx(labels_path, 1).to(torch.int64)
        if images.shape[1:] != (SIDE, SIDE):
            raise ValueError(f"{images_path} holds images of {tuple(images.shape[1:])} pixels instead of 28x28.")
        if len(images) != len(labels):
            raise ValueError(
                f"{images_path} holds {counted(len(images), 'image')} and {labels_path} holds "
                f"{counted(len(labels), 'label')}; they do not belong together."
            )
        if len(labels) and int(labels.max()) >= len(self.names):
            raise ValueError(
                f"{labels_path} holds the label {int(labels.max())}; they go from 0 to {len(self.names) - 1}."
            )
        return images, labels

    def _folder(self) -> Path | None:
        """The folder that holds all four files, or None."""
        for folder in self.folders:
            if all(find_idx(folder, name) is not None for name in NAMES):
                return folder
        return None

    def _missing(self, why: str) -> str:
        fewest = min(([name for name in NAMES if find_idx(folder, name) is None] for folder in self.folders), key=len)
        return (
            f"{type(self).__name__} needs {', '.join(fewest)} (or with .gz), which are in none of "
            f"{', '.join(str(folder) for folder in self.folders)}, and {why}; point root at a folder of the "
            "four idx files, or run once with internet access and download: true."
        )


class FashionMNIST(MNIST):
    """70,000 grey images of clothes in ten classes (Xiao, Rasul & Vollgraf, arXiv 1708.07747), 60,000 for training.

    The files have MNIST's names and layout; see `MNIST` for the arguments.
    """

    source = datasets.FashionMNIST
    names = tuple(datasets.FashionMNIST.classes)
