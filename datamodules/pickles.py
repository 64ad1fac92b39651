"""Reads untrusted pickles: numpy arrays and plain containers only.

A pickle is a program that calls functions by name. This reader replaces the few that numpy needs to rebuild an array by
checked functions of its own, and refuses every other name before anything is called.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

MAX_BYTES = 2**28  # nine times an official CIFAR-10 batch
NUMBERS = "biuf"  # kinds of dtype that are admitted


def read_pickle(path: Path) -> Any:
    """Reads a pickle of plain containers and numpy arrays of numbers.

    Args:
        path: The file; strings of Python 2 are read as bytes.

    Returns:
        What it holds; arrays where they are the values of a dictionary.

    Raises:
        ValueError: If it holds anything else, or is damaged.
        OSError: If it cannot be read.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path} has {size} bytes, more than the {MAX_BYTES} that are read; it is not the file meant.")
    with path.open("rb") as file:
        try:
            held = Unpickler(file, encoding="bytes").load()
            if isinstance(held, dict):
                held = {key: value.array() if isinstance(value, ArrayState) else value for key, value in held.items()}
        except ForbiddenError as error:
            raise ValueError(
                f"{path} asks for {error} while it is read; only numpy arrays and plain containers are admitted, so do "
                "not trust this file and get it anew."
            ) from error
        except Exception as error:  # a damaged pickle may raise anything
            reason = str(error).strip() or type(error).__name__
            raise ValueError(f"{path} is no pickle, or a damaged one ({reason}); get the file anew.") from error
    return held


class ForbiddenError(Exception):
    """A pickle asks for something that is not admitted."""


class DtypeState:
    """Stands for `numpy.dtype` while a pickle is read: a code such as "u1", then its byte order."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.dtype = np.dtype(_text(code))
        if self.dtype.kind not in NUMBERS:
            raise ForbiddenError(f"an array of {self.dtype}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = _text(state[1])
        if order == ">":
            self.dtype = self.dtype.newbyteorder(">")


class ArrayState:
    """Stands for a numpy array while a pickle is read: shape, dtype, whether columns come first, and bytes."""

    def __init__(self, *_: Any) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """The array, after a check of what it is made of."""
        _, shape, dtype, columns_first, raw = self.state
        if not isinstance(dtype, DtypeState) or not isinstance(raw, bytes):
            raise ForbiddenError("an array that is not made of numbers")
        return np.frombuffer(raw, dtype.dtype).reshape(shape, order="F" if columns_first else "C")


def _from_buffer(buffer: Any, dtype: DtypeState, shape: tuple[int, ...], order: str) -> ArrayState:
    """An array as newer pickles hold it."""
    array = ArrayState()
    array.state = (1, shape, dtype, order == "F", bytes(buffer))
    return array


def _encode(text: str, encoding: str) -> bytes:
    """Bytes as Python 3 writes them into an old protocol."""
    if encoding != "latin1":
        raise ForbiddenError(f"the encoding {encoding!r}")
    return text.encode("latin1")


ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): ArrayState,
    ("numpy", "dtype"): DtypeState,
    ("numpy.core.multiarray", "_reconstruct"): ArrayState,
    ("numpy._core.multiarray", "_reconstruct"): ArrayState,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _encode,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
}


class Unpickler(pickle.Unpickler):
    """An unpickler that knows how numpy arrays are rebuilt and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name in a pickle; a `ForbiddenError` if the name is not admitted."""
        if (module, name) not in ADMITTED:
            raise ForbiddenError(f"{module}.{name}")
        return ADMITTED[module, name]


def _text(code: Any) -> str:
    return code.decode("latin1") if isinstance(code, bytes) else str(code)
