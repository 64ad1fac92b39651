"""Throughput of the data modules, compared with torchvision's usual per-sample DataLoader on the same data and size.

    python -m experiments.benchmarks.data_throughput

The usual way decodes, transforms and collates each image in Python: `Dataset.__getitem__` with RandomHorizontalFlip,
ToTensor and Normalize, and a DataLoader around it. Here whole batches are cut from one uint8 array, mirrored and
normalised. It matters where a GPU waits for its images. It does not where a CPU trains: the last column says how much
of the time of a training step each loader would take.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms

from datamodules import ImageDataModule, ImageFolder
from datamodules.loaders import Split
from experiments.harness.command import command
from experiments.harness.networks import step_cost
from experiments.harness.show import markdown

BATCH = 128
SLICES = 8
TARGETS = {"colour": 15, "grey": 30, "folder": 15}


class Row(NamedTuple):
    """One line of the table."""

    data: str
    loader: str
    rate: float
    times: float


class InMemory(ImageDataModule):
    """A data module of images in memory.

    Args:
        images: uint8 (N, C, H, W).
        batch_size: Images per step.
        random_flip: Whether half of them are mirrored.
    """

    def __init__(self, images: Tensor, batch_size: int, random_flip: bool) -> None:
        super().__init__(batch_size, random_flip=random_flip)
        self.images = images

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of the images."""
        return (self.images.shape[1], self.images.shape[2], self.images.shape[3])

    @property
    def class_names(self) -> list[str]:
        """Ten classes, as CIFAR-10 and MNIST have."""
        return [str(number) for number in range(10)]

    def read(self, split: str) -> Split:
        """All images, for any split."""
        return Split(self.images, torch.arange(len(self.images)) % 10)


class PerSample(Dataset[tuple[Tensor, int]]):
    """The work of torchvision's CIFAR10 and MNIST for each image: array to PIL, then the transform.

    Args:
        images: uint8 (N, C, H, W).
        transform: torchvision's transform.
    """

    def __init__(self, images: Tensor, transform: Callable[[Image.Image], Tensor]) -> None:
        self.arrays = images.permute(0, 2, 3, 1).squeeze(-1).contiguous().numpy()
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.arrays[index])), index % 10

    def __len__(self) -> int:
        return len(self.arrays)


def usual_transform(channels: int, random_flip: bool, size: int | None = None) -> Callable[[Image.Image], Tensor]:
    """The usual steps of torchvision for training images in [-1, 1]."""
    steps: list[Any] = [transforms.Resize(size), transforms.CenterCrop(size)] if size else []
    steps += [transforms.RandomHorizontalFlip()] if random_flip else []
    steps += [transforms.ToTensor(), transforms.Normalize((0.5,) * channels, (0.5,) * channels)]
    return transforms.Compose(steps)


def rates(loaders: dict[str, Iterable[Any]], seconds: float) -> dict[str, float]:
    """Images per second of loaders: the best of several slices of time, taken in turn.

    Args:
        loaders: Each gives dictionaries with "image", or tuples that begin with the images.
        seconds: Time to measure each for, in all.

    Returns:
        Images per second of each; starting a loader is not counted.
    """
    best = dict.fromkeys(loaders, 0.0)
    for _ in range(SLICES):
        for name, loader in loaders.items():
            batches = iter(loader)
            next(batches)  # starts workers, warms up
            start, count = time.perf_counter(), 0
            while (spent := time.perf_counter() - start) < seconds / SLICES or count == 0:
                batch = next(batches, None)
                if batch is None:
                    batches = iter(loader)
                    continue
                count += len(batch["image"] if isinstance(batch, dict) else batch[0])
            best[name] = max(best[name], count / spent)
            del batches
    return best


def compare(name: str, ours: ImageDataModule, theirs: Dataset[Any], seconds: float) -> list[Row]:
    """Measures one kind of data.

    Returns:
        Three rows; the usual loader with 0 workers is the measure.
    """
    ours.prepare_data()
    ours.setup("fit")
    loaders: dict[str, Iterable[Any]] = {
        f"per sample, {workers} workers": DataLoader(theirs, BATCH, shuffle=True, num_workers=workers, drop_last=True)
        for workers in (0, 2)
    }
    found = rates({**loaders, "whole batches": ours.train_dataloader()}, seconds)
    slowest = found["per sample, 0 workers"]
    return [Row(name, loader, value, value / slowest) for loader, value in found.items()]


def write_images(folder: Path, count: int) -> None:
    """Writes JPEG photographs of 256x192 pixels, cut at random from one that comes with scikit-learn."""
    from sklearn.datasets import load_sample_image

    photograph = Image.fromarray(load_sample_image("china.jpg"))
    generator = np.random.default_rng(0)
    for number in range(count):
        left, top = generator.integers(0, (640 - 256, 427 - 192))
        place = folder / str(number % 10)
        place.mkdir(parents=True, exist_ok=True)
        photograph.crop((left, top, left + 256, top + 192)).save(place / f"{number:05d}.jpg", quality=90)


def train_rate(seconds: float) -> float:
    """Images per second at which this machine's CPU trains a small U-Net on 3x32x32 images."""
    from diffusion_lit.nets import UNet

    return 16_000 / step_cost(UNet(model_channels=32), 16, seconds)["ms per step"]


def table(rows: Sequence[Row], trained: float) -> str:
    """The table in Markdown.

    Args:
        rows: What was measured.
        trained: Images per second that a CPU trains on.
    """
    told = [
        {
            "data": row.data,
            "loader": row.loader,
            "images/s": f"{row.rate:,.0f}",
            "times": f"{row.times:.1f}",
            "share of a CPU training step": f"{100 * trained / row.rate:.2g}%",
        }
        for row in rows
    ]
    return markdown(told)


def data_throughput(seconds: float = 6.0, images: int = 20_000, files: int = 2000) -> dict[str, float]:
    """Measures the data modules beside torchvision's per-sample DataLoader.

    Args:
        seconds: Time to measure each loader for.
        images: Images in memory.
        files: JPEG files in the folder.

    Returns:
        How many times faster than the per-sample loader with 0 workers each kind of data is fed.
    """
    torch.set_num_threads(1)  # as a DataLoader's workers have
    generator = torch.Generator().manual_seed(0)
    colour = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    grey = torch.randint(0, 256, (images, 1, 32, 32), dtype=torch.uint8, generator=generator)
    rows = compare(
        "in memory, colour, 3x32x32, mirrored",
        InMemory(colour, BATCH, random_flip=True),
        PerSample(colour, usual_transform(3, random_flip=True)),
        seconds,
    )
    rows += compare(
        "in memory, grey, 1x32x32",
        InMemory(grey, BATCH, random_flip=False),
        PerSample(grey, usual_transform(1, random_flip=False)),
        seconds,
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "images"
        write_images(folder, files)
        rows += compare(
            "folder of JPEGs, 3x64x64, mirrored, cached",
            ImageFolder(str(folder), BATCH, 64, cache_dir=str(Path(scratch) / "cache")),
            datasets.ImageFolder(str(folder), usual_transform(3, random_flip=True, size=64)),
            seconds,
        )
    print(table(rows, train_rate(seconds / 2)))
    print(
        f"Python {sys.version.split()[0]}, torch {torch.__version__}, one thread per process on {os.cpu_count()} CPU "
        f"cores, batches of {BATCH}."
    )
    print("It matters where a GPU would wait for images; where a CPU trains, the last column is all there is to gain.")
    ours = [row.times for row in rows if row.loader == "whole batches"]
    return dict(zip(TARGETS, ours, strict=True))


if __name__ == "__main__":
    command(data_throughput)
