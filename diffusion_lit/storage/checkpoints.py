"""Checkpoints: files that describe themselves, read without executing anything they hold.

A checkpoint made by `lightning fit` records the classes and arguments of its module and data, the average weights as
`state_dict` and the raw ones as `current_model_state`. Reading goes through `storage.pickled` alone, and what is built
from a record through `storage.trust`.
"""

import re
from pathlib import Path
from typing import Any

from diffusion_lit.storage.exports import is_export, read_export
from diffusion_lit.storage.pickled import Damaged, HoldsCode, read_pickled


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint's contents to the CPU, refusing anything but tensors and plain values.

    Args:
        path: The file, or a folder of `lightning export`.

    Returns:
        Lightning's checkpoint dictionary.

    Raises:
        ValueError: If the file is missing, unreadable, truncated, not a checkpoint, or holds objects that only an
            unsafe load would make.
    """
    path = Path(path)
    if is_export(path):
        return read_export(path)
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder and none of `lightning export`; give a checkpoint file such as checkpoints/last.ckpt."
        )
    if not path.exists():
        raise ValueError(
            f"There is no checkpoint {path}; `lightning fit` writes runs/NAME/version_N/checkpoints/last.ckpt."
        )
    try:
        checkpoint = read_pickled(path)
    except PermissionError as error:
        raise ValueError(f"The checkpoint {path} cannot be read: no permission.") from error
    except HoldsCode as error:
        raise ValueError(
            f"The checkpoint {path} holds objects other than tensors and plain values and was not loaded, since "
            "that would run code from the file."
        ) from error
    except Damaged as error:
        raise ValueError(
            f"{path} is not a readable checkpoint: it is damaged, truncated or another kind of file."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} is a PyTorch file but not a checkpoint of `lightning fit`: it has no `state_dict`.")
    return checkpoint


def versions(run: Path) -> list[Path]:
    """The versions of a run.

    Args:
        run: The run's folder, `runs/NAME`.

    Returns:
        Its folders `version_N`, the newest first.
    """
    found = [folder for folder in run.glob("version_*") if re.fullmatch(r"version_\d+", folder.name)]
    return sorted(found, key=lambda folder: int(folder.name.split("_")[1]), reverse=True)


def find_last(run: Path) -> Path:
    """The last checkpoint of a run's newest version that has one.

    Args:
        run: The run's folder, `runs/NAME`.

    Returns:
        The path of its `last.ckpt`.

    Raises:
        ValueError: If no version holds a last checkpoint.
    """
    for folder in versions(run):
        last = folder / "checkpoints" / "last.ckpt"
        if last.is_file():
            return last
    raise ValueError(
        f"There is nothing to continue: no version under {run} holds checkpoints/last.ckpt. Start the run without "
        "--ckpt_path."
    )
