"""Small data sets in the layouts that their publishers use, for tests that need files."""

import csv
import gzip
import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

CIFAR_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IDX_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
ATTRIBUTES = ("Male", "Smiling", "Young")


def write_idx(path: Path, array: np.ndarray) -> None:
    """Writes an idx file, gzipped where its name says so."""
    data = (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_mnist(folder: Path, train: int = 120, test: int = 40, zipped: bool = True) -> dict[str, np.ndarray]:
    """Writes the four files of MNIST or FashionMNIST with random images; returns what they hold."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    held = {}
    for name, count in zip(IDX_NAMES, (train, train, test, test), strict=True):
        shape = (count, 28, 28) if "images" in name else (count,)
        held[name] = generator.integers(0, 256 if "images" in name else 10, shape, dtype=np.uint8)
        write_idx(folder / (name + (".gz" if zipped else "")), held[name])
    return held


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, as the official CIFAR-10 files have them."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, text: bytes) -> None:
        """Writes one string."""
        self.write(b"U" + bytes([len(text)]) + text if len(text) < 256 else b"T" + struct.pack("<i", len(text)) + text)
        self.memoize(text)

    dispatch[bytes] = save_string


def python2_pickle(held: object) -> bytes:
    """A pickle as Python 2 and an old numpy wrote it."""
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(held)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def write_cifar10(root: Path, per_batch: int = 20) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Writes `cifar-10-batches-py` as Python 2 pickled it; returns what it holds."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(1)
    held = {}
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        data = generator.integers(0, 256, (per_batch, 3072), dtype=np.uint8)
        labels = generator.integers(0, 10, per_batch).tolist()
        held[name] = (data, labels)
        batch = {b"batch_label": b"a batch", b"labels": labels, b"data": data, b"filenames": [b"x.png"] * per_batch}
        (folder / name).write_bytes(python2_pickle(batch))
    meta = {
        b"num_cases_per_batch": per_batch,
        b"label_names": [name.encode() for name in CIFAR_NAMES],
        b"num_vis": 3072,
    }
    (folder / "batches.meta").write_bytes(python2_pickle(meta))
    return held


def make_image(size: tuple[int, int], seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A smooth random image of (width, height) pixels."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)


def write_class_folders(
    root: Path, names=CIFAR_NAMES, per_class: int = 3, size=(32, 32), parts=("train", "test")
) -> None:
    """Writes class folders of PNG images below each part; no parts for class folders alone."""
    for place, part in enumerate(parts or ("",)):
        for number, name in enumerate(names):
            folder = root / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(per_class):
                make_image(size, seed=1000 * place + 100 * number + index).save(folder / f"{index:04d}.png")


def write_celeba(root: Path, count: int = 12, zipped: bool = False, lists: str = "txt") -> list[tuple[int, list[int]]]:
    """Writes CelebA's images, partition and attributes; returns each image's split and attributes (0 or 1)."""
    folder = root / "img_align_celeba"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(min(2, index * 4 // count), [index >> bit & 1 for bit in range(3)]) for index in range(count)]
    names = [f"{index + 1:06d}.jpg" for index in range(count)]
    for index, name in enumerate(names):
        make_image((178, 218), seed=index).save(folder / name, quality=95)
    signs = [
        [name, *("1" if value else "-1" for value in values)] for name, (_, values) in zip(names, rows, strict=True)
    ]
    splits = [[name, str(split)] for name, (split, _) in zip(names, rows, strict=True)]
    if lists == "txt":
        (root / "list_eval_partition.txt").write_text("".join(f"{' '.join(row)}\n" for row in splits))
        header = f"{count}\n{' '.join(ATTRIBUTES)} \n"
        (root / "list_attr_celeba.txt").write_text(header + "".join("  ".join(row) + "\n" for row in signs))
    else:
        for name, header, lines in (
            ("list_eval_partition.csv", ["image_id", "partition"], splits),
            ("list_attr_celeba.csv", ["image_id", *ATTRIBUTES], signs),
        ):
            with (root / name).open("w", newline="") as file:
                csv.writer(file).writerows([header, *lines])
    if zipped:
        zip_folder(folder, root / "img_align_celeba.zip")
    return rows


def zip_folder(folder: Path, path: Path) -> None:
    """Packs a folder into a zip, its own name first, and removes its files."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, f"{folder.name}/{file.relative_to(folder)}")
                file.unlink()
    for below in sorted(folder.rglob("*"), reverse=True):
        below.rmdir()
    folder.rmdir()
