"""Hashes: of a record of plain values, of a file, of weights."""

import json
import zlib
from collections.abc import Mapping
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_lit.storage.once import Unchanged

_HASHES: Unchanged[str] = Unchanged(64)


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """A hash of weights that does not depend on how they were stored.

    Returns:
        Hexadecimal SHA-256 over names, types, shapes and bytes.
    """
    digest = sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def key_of(record: dict[str, Any]) -> str:
    """The hash of a record.

    Returns:
        Hexadecimal SHA-256 of its canonical JSON.
    """
    return sha256(canonical(record).encode()).hexdigest()


def canonical(record: dict[str, Any]) -> str:
    """The JSON of a record, the same for equal records.

    Returns:
        JSON with sorted keys.
    """
    return json.dumps(record, sort_keys=True)


def file_hash(path: Path) -> str:
    """The hash of a file's bytes, computed once per process while the file is unchanged.

    Args:
        path: The file, or a folder of `diffusion-lit export`, whose weights count.

    Returns:
        Hexadecimal SHA-256.
    """
    path = path / "model.safetensors" if path.is_dir() else path
    return _HASHES.get(path, lambda: _hash(path))


def file_record(path: Path) -> dict[str, Any]:
    """What a record says of a file or an export: its `file` and its `sha256`."""
    return {"file": str(path), "sha256": file_hash(path)}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, sha256).hexdigest()


def file_crc32(path: Path) -> int:
    """The CRC-32 of a file's bytes, which tells damage at more than 1 GB/s.

    Returns:
        A number below 2^32.
    """
    total = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            total = zlib.crc32(block, total)
    return total
