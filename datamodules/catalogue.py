"""What a set in chunks holds: `catalogue.json`, and the hash and class of each image in `items.dat`."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffusion_lit.words import first_line

FORMAT = 1
ITEM = np.dtype([("hash", "<u8"), ("label", "<i4")])  # of items.dat
WRITE = "make the set anew with python -m datamodules.write_chunks"


class BadChunkError(ValueError):
    """A set that is not as it was written."""


def hash_of(pixels: bytes) -> int:
    """The hash of an image as items.dat has it: the first 8 bytes of its SHA-256."""
    return int.from_bytes(hashlib.sha256(pixels).digest()[:8], "little")


@dataclass
class Catalogue:
    """What a set holds.

    Args:
        shape: Shape (C, H, W) of all images.
        classes: Names of the classes by their numbers; empty where there are none.
        counts: Images of each split.
        hashes: Of each split, the SHA-256 of its items.dat.
    """

    shape: tuple[int, int, int]
    classes: list[str]
    counts: dict[str, int]
    hashes: dict[str, str]

    def record(self) -> dict[str, Any]:
        """The catalogue as plain values."""
        return {"format": FORMAT, **self.__dict__}

    @classmethod
    def parse(cls, text: bytes, where: str) -> "Catalogue":
        """Reads a catalogue.

        Args:
            text: The file.
            where: What messages call it.

        Raises:
            BadChunkError: If it is none.
        """
        try:
            found = json.loads(text)
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']!r}")
            channels, height, width = (int(side) for side in found["shape"])
            if channels not in (1, 3) or not 1 <= height == width <= 4096:
                raise ValueError(f"shape {found['shape']!r}")
            counts = {str(split): int(count) for split, count in found["counts"].items()}
            hashes = {split: str(found["hashes"][split]) for split in counts}
            if set(counts) - {"train", "val", "test"} or min(counts.values()) < 1:
                raise ValueError(f"counts {found['counts']!r}")
            return cls((channels, height, width), [str(name) for name in found["classes"]], counts, hashes)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise BadChunkError(f"{where} is no catalogue of this version ({first_line(error)}); {WRITE}.") from error
