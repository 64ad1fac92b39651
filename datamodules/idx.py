"""The idx format of MNIST: a magic number, the sizes of the dimensions, then bytes.

    0x00 0x00 TYPE RANK | RANK big-endian uint32 sizes | values

TYPE is 8 for uint8, the only one that image sets use. Files may be gzipped. The sizes in the header are checked against
the file before anything is allocated.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datamodules.files import may_not_read

MAX_BYTES = 2**31  # an idx file of images is far smaller; a gzipped one could claim anything


def find_idx(folder: Path, name: str) -> Path | None:
    """Finds an idx file, gzipped or not, under its usual names.

    Args:
        folder: Where to look.
        name: Name as published, for example "train-images-idx3-ubyte".

    Returns:
        The file, or None.
    """
    stem, _, kind = name.partition("-idx")
    for spelled in (name, f"{stem}.idx{kind}"):  # some unpackers write train-images.idx3-ubyte
        for ending in ("", ".gz"):
            path = folder / (spelled + ending)
            if path.is_file():
                return path
    return None


def read_idx(path: Path, rank: int) -> Tensor:
    """Reads an idx file of uint8 values.

    Args:
        path: The file; gzipped where its name ends in ".gz".
        rank: Number of dimensions that are expected, 3 for images and 1 for labels.

    Returns:
        A uint8 tensor.

    Raises:
        ValueError: If the file is no such idx file, or is cut off or overlong.
        PermissionError: If it may not be read.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * rank)
            if len(header) < 4 + 4 * rank:
                raise ValueError(f"{path} has {len(header)} bytes, too few for an idx header; get the file anew.")
            if header[:4] != bytes([0, 0, 8, rank]):
                raise ValueError(
                    f"{path} is no idx file of uint8 values in {rank} dimensions: it starts with "
                    f"{header[:4].hex(' ')} instead of {bytes([0, 0, 8, rank]).hex(' ')}; get the file anew."
                )
            sizes = struct.unpack(f">{rank}I", header[4:])
            count = math.prod(sizes)
            if count > MAX_BYTES:
                raise ValueError(f"{path} claims to hold {'x'.join(map(str, sizes))} values, which is no image set.")
            values = file.read(count + 1)
    except PermissionError as error:
        raise may_not_read(path) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is cut off or no gzip file ({error}); get the file anew.") from error
    if len(values) != count:
        held = "more" if len(values) > count else f"only {len(values)}"
        raise ValueError(
            f"{path} claims {count} values ({'x'.join(map(str, sizes))}) and holds {held}; get the file anew."
        )
    return torch.from_numpy(np.frombuffer(values, np.uint8).copy()).reshape(sizes)
