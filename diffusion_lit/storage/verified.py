"""Safetensors files with a checksum.

A file carries the CRC-32 of its tensors' names, types, shapes and bytes as `crc32` in its metadata. Files without it,
of other programs or older versions, are read unchecked.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

KEY = "crc32"


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """The CRC-32 of tensors on the CPU: names, types, shapes and bytes."""
    total = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode(), total)
        values: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        total = zlib.crc32(values, total)
    return f"{total:08x}"


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Tensors as the bytes of a file.

    Args:
        tensors: Tensors by name, on any device.
        metadata: Texts that go with them.

    Returns:
        The bytes, the same for the same contents.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return _ordered(save(whole, metadata={**(metadata or {}), KEY: checksum(whole)}))


def _ordered(encoded: bytes) -> bytes:
    """The bytes of a file with its metadata sorted, which safetensors writes in an order of chance."""
    end = 8 + int.from_bytes(encoded[:8], "little")
    header = json.loads(encoded[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + encoded[end:]


def decode(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a file.

    Returns:
        The tensors by name, on the CPU, and the texts that go with them.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If it is no such file, or is not as it was written.
    """
    try:
        with safe_open(str(path), framework="pt") as file:  # type: ignore[no-untyped-call]
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    except OSError:
        raise
    except Exception as error:  # the reader fails in more ways than by its own error
        raise ValueError(f"{path} is damaged or no safetensors file: {error}.") from error
    written = metadata.pop(KEY, None)
    if written is not None and written != checksum(tensors):
        raise ValueError(f"{path} is damaged: its contents are not those that were written.")
    return tensors, metadata
