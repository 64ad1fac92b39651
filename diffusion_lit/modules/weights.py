"""Weights from outside: fetched once, checked by hash, and read without running what is in the file."""

import urllib.request
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion_lit.modules.data_classifier import MissingWeights
from diffusion_lit.storage.folders import scratch_of
from diffusion_lit.storage.hashing import file_hash
from diffusion_lit.storage.pickled import HoldsCode, read_pickled
from diffusion_lit.storage.verified import decode

TIMEOUT = 15.0


def hub_folder() -> Path:
    """Where PyTorch keeps downloaded weights, shared with torch-fidelity and torchvision.

    Returns:
        The folder, which need not exist.
    """
    return Path(torch.hub.get_dir()) / "checkpoints"


def fetch(url: str, name: str, sha256_prefix: str, what: str, option: str) -> Path:
    """A file from PyTorch's cache, downloaded if it is not there.

    Args:
        url: Where it is published.
        name: Its name in the cache.
        sha256_prefix: How its SHA-256 begins.
        what: What the weights are, for messages.
        option: How the user names a local file instead, for messages.

    Returns:
        Its path.

    Raises:
        MissingWeights: If it is not in the cache and cannot be downloaded.
        ValueError: If its hash is another.
    """
    path = hub_folder() / name
    if not path.exists():
        try:
            _download(url, path)
        except OSError as error:
            raise MissingWeights(
                f"The weights of {what} are not at {path} and could not be downloaded ({error}). On a machine with "
                f"internet, download {url} and put it there, or name the file with {option}."
            ) from error
    if not file_hash(path).startswith(sha256_prefix):
        raise ValueError(f"{path} is not the file published at {url}: its hash differs. Delete it and try again.")
    return path


def _download(url: str, path: Path) -> None:
    """Downloads to a file beside the goal, and moves it there when whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = scratch_of(path)
    with urllib.request.urlopen(url, timeout=TIMEOUT) as source, part.open("wb") as target:
        total = int(source.headers.get("Content-Length", 0)) or None
        with tqdm(total=total, unit="B", unit_scale=True, desc=f"downloading {path.name}") as bar:
            while block := source.read(1 << 20):
                target.write(block)
                bar.update(len(block))
    part.replace(path)


def read_state(path: Path, what: str) -> dict[str, Tensor]:
    """Reads a state dict that holds tensors and nothing else.

    Args:
        path: A .safetensors file, or one written by `torch.save`.
        what: What the weights are, for messages.

    Returns:
        Names and tensors, on the CPU.

    Raises:
        MissingWeights: If there is no such file.
        ValueError: If it is damaged, or holds objects that only an unsafe load would make.
    """
    if not path.is_file():
        raise MissingWeights(f"There is no file {path} with the weights of {what}.")
    try:
        state = decode(path)[0] if path.suffix == ".safetensors" else read_pickled(path, verified=False)
    except (OSError, ValueError) as error:
        unsafe = isinstance(error, HoldsCode)
        reason = "it holds objects that only running code would make" if unsafe else "it is damaged or of another kind"
        raise ValueError(f"{path} was not read as weights of {what}: {reason}. Give a plain state dict.") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is not a plain state dict of {what}: it holds more than names and tensors.")
    return state
