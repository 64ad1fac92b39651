"""A folder that holds one array and its index, which notices damage: the form of the caches of images and latents.

`index.json` is written last and holds its own hash and the array's CRC-32, so that a folder which a killed process or a
failing disk left is recognised. Reading compares both, at more than 1 GB/s.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diffusion_lit.storage.atomic import atomic
from diffusion_lit.storage.hashing import file_crc32, key_of

PRIVATE: Literal["c"] = "c"  # of memory maps: a write stays in this process; of arrays that take none torch warns


def write_index(array: Path, index: dict[str, Any]) -> None:
    """Writes the index of an array that is complete.

    Args:
        array: The file of the array.
        index: Plain values: what its shape is known by, and the array's `crc32` if it was taken on the way.
    """
    index = index if "crc32" in index else {**index, "crc32": file_crc32(array)}
    with atomic(array.with_name("index.json")) as file:
        file.write(json.dumps({**index, "index_sha256": key_of(index)}).encode())


def open_array(
    array: Path, dtype: Any, shape_of: Callable[[dict[str, Any]], tuple[int, ...] | None]
) -> tuple[dict[str, Any], np.ndarray] | None:
    """The index and the array of a folder.

    Args:
        array: The file of the array.
        dtype: Of its values.
        shape_of: Its shape by the index; None for an index of another array.

    Returns:
        Both, the array memory-mapped, its file left as it is; None if there is no intact one.

    Raises:
        OSError: If it is there and may not be read.
    """
    try:
        index: dict[str, Any] = json.loads(array.with_name("index.json").read_text())
        sound = index.pop("index_sha256") == key_of(index)
        shape = shape_of(index) if sound else None
        if shape is None or array.stat().st_size != np.dtype(dtype).itemsize * int(np.prod(shape)):
            return None
        if file_crc32(array) != index["crc32"]:
            return None
        return index, np.memmap(array, dtype, PRIVATE, shape=shape)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):  # none, or damaged
        return None
