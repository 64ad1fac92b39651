"""Tensors on disk with the record of all that determines them; a file is reused only if its stored key matches.

The format is safetensors, which cannot hold code.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from safetensors import safe_open
from torch import Tensor

from diffusion_lit.storage.atomic import atomic
from diffusion_lit.storage.cache import cache_folder
from diffusion_lit.storage.hashing import canonical, key_of
from diffusion_lit.storage.verified import decode, encode

_IN_MEMORY: dict[str, dict[str, Tensor]] = {}  # what could not be written, by its record


def write_tensors(path: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Writes tensors with their record, whole or not at all.

    Args:
        path: The .safetensors file; its folder is made if need be.
        tensors: Tensors by name.
        record: What determines them.

    Raises:
        OSError: If the file cannot be written.
    """
    try:
        with atomic(path) as file:
            file.write(encode(tensors, {"record": canonical(record)}))
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}.") from error


def read_tensors(path: Path, record: dict[str, Any]) -> dict[str, Tensor] | None:
    """Reads tensors that were written under the same record.

    Args:
        path: The .safetensors file.
        record: What must have determined them.

    Returns:
        The tensors by name, or None where the file is missing, damaged or belongs to another record.
    """
    try:
        tensors, texts = decode(path)
    except (OSError, ValueError):  # missing, truncated or foreign
        return None
    return tensors if texts.get("record") == canonical(record) else None


def kept_tensors(kind: str, record: dict[str, Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors from the cache, or computed and stored: in the cache, or in memory if that is not writable.

    Args:
        kind: Their folder in the cache, in which the file is called after the hash of the record.
        record: What determines them.
        make: Makes them.
    """
    path = cache_folder() / kind / f"{key_of(record)[:32]}.safetensors"
    found = read_tensors(path, record) or _IN_MEMORY.get(canonical(record))
    if found is None:
        found = make()
        try:
            write_tensors(path, found, record)
        except OSError as error:
            _IN_MEMORY[canonical(record)] = found
            rank_zero_warn(f"The cache cannot be used, so that the work goes on from memory: {error}")
    return found


def read_record(path: Path) -> dict[str, Any]:
    """The record that a file was written under.

    Raises:
        ValueError: If it is another kind of file.
    """
    try:
        with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
            record: dict[str, Any] = json.loads(file.metadata()["record"])
    except Exception as error:
        raise ValueError(f"{path} is not a file of statistics that this project wrote.") from error
    return record
