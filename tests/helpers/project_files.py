"""The repository, and small data in official layouts."""

import gzip
from pathlib import Path

import numpy as np

ROOT = str(Path(__file__).resolve().parents[2])


def write_idx(folder, train=200, test=40, size=28, classes=10, compress=True, seed=0):
    """Writes the four idx files of MNIST's layout with random images whose brightness tells their class."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    opener, ending = (gzip.open, ".gz") if compress else (open, "")
    for part, count in (("train", train), ("t10k", test)):
        labels = (np.arange(count) % classes).astype(np.uint8)
        images = rng.integers(0, 20, (count, size, size)) + 20 * labels[:, None, None]
        header = np.array([2051, count, size, size], dtype=">i4").tobytes()
        with opener(folder / f"{part}-images-idx3-ubyte{ending}", "wb") as file:
            file.write(header + images.astype(np.uint8).tobytes())
        with opener(folder / f"{part}-labels-idx1-ubyte{ending}", "wb") as file:
            file.write(np.array([2049, count], dtype=">i4").tobytes() + labels.tobytes())
    return folder
