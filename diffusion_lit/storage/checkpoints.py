"""Self-describing checkpoints, read without executing anything in them.

A checkpoint made by `diffusion-lit fit` records the classes and arguments of its module and data, the average weights
as `state_dict` and the raw ones as `current_model_state`. Reading goes through `storage.pickled` alone, and what is
built from a record through `storage.trust`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion_lit.storage.exports import is_export, read_export
from diffusion_lit.storage.once import Unchanged
from diffusion_lit.storage.pickled import Damaged, HoldsCode, read_pickled

TRAINING = {  # the state that training resumes from, and its types
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "callbacks": dict,
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
}
OPTIMIZER = ("optimizer_states",)
_CONTENTS: Unchanged[dict[str, Any]] = Unchanged(2)  # of a command: the model's, and its autoencoder's or guide's
_STATES: Unchanged[dict[str, Any]] = Unchanged(1)
FIELDS: dict[str, type] = {
    **TRAINING,
    "state_dict": dict,
    "current_model_state": dict,
    "hyper_parameters": dict,
    "datamodule_hyper_parameters": dict,
    "diffusion_lit": dict,
}
PARTS: dict[str, type] = {  # what those that are lists or dictionaries hold
    **dict.fromkeys(("optimizer_states", "lr_schedulers", "loops", "callbacks"), dict),
    **dict.fromkeys(("state_dict", "current_model_state"), Tensor),
}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint's contents to the CPU, refusing anything but tensors and plain values.

    An unchanged file is read once per process; do not modify its tensors.

    Args:
        path: The file, or a folder of `diffusion-lit export`.

    Returns:
        Lightning's checkpoint dictionary without the optimizer's state; see `read_training_state`.

    Raises:
        ValueError: If the file is missing, unreadable, truncated, not a checkpoint, or holds objects that only an
            unsafe load would make.
    """
    return dict(_CONTENTS.get(Path(path), lambda: _read(Path(path), OPTIMIZER)))


def read_training_state(path: str | Path, keep: bool = False) -> dict[str, Any]:
    """Reads a checkpoint as `read_checkpoint`, with the optimizer's state.

    Args:
        path: The file.
        keep: Whether the next call gets what this one has read. That call's contents belong to the caller alone, since
            an optimizer goes on in the very tensors that it is given.
    """
    content = dict(_STATES.get(Path(path), lambda: _read(Path(path))))
    if not keep:
        _STATES.clear()
    return content


def _read(path: Path, without: tuple[str, ...] = ()) -> dict[str, Any]:
    if is_export(path):
        return read_export(path)
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder and none of `diffusion-lit export`; give a checkpoint file: checkpoints/last.ckpt."
        )
    if not path.exists():
        raise ValueError(
            f"There is no checkpoint {path}; `diffusion-lit fit` writes runs/NAME/version_N/checkpoints/last.ckpt."
        )
    if not path.is_file():
        raise ValueError(f"{path} is no regular file (a pipe or a device), which a checkpoint is.")
    try:
        checkpoint = read_pickled(path, without=without)
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
        raise ValueError(
            f"{path} is a PyTorch file but not a checkpoint of `diffusion-lit fit`: it has no `state_dict`."
        )
    wrong = next(_unsound(checkpoint), None)
    if wrong is not None:
        raise ValueError(
            f"{path} is no sound checkpoint: {wrong}. Take another checkpoint of the run, such as previous.ckpt beside "
            "it."
        )
    return checkpoint


def _unsound(checkpoint: dict[str, Any]) -> Iterator[str]:
    """What is of another kind than a checkpoint has it."""
    for field, kind in FIELDS.items():
        if field in checkpoint and not isinstance(checkpoint[field], kind):
            yield f"its {field} is of type {type(checkpoint[field]).__name__} and must be {kind.__name__}"
    for field, kind in PARTS.items():
        found = checkpoint.get(field, {})
        for name, part in found.items() if isinstance(found, dict) else enumerate(found):
            if not isinstance(part, kind) and not str(name).endswith("_extra_state"):
                yield f"{name!r} of its {field} is of type {type(part).__name__} and must be {kind.__name__}"
    for state in checkpoint.get("optimizer_states", []):
        if not isinstance(state.get("state"), dict) or not isinstance(state.get("param_groups"), list):
            yield "its optimizer_states lack a state or groups of parameters"


def check_training_state(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Checks that training can go on from a checkpoint.

    Raises:
        ValueError: If it holds weights alone, as one saved with `save_weights_only` does.
    """
    missing = [field for field in TRAINING if field not in checkpoint]
    if missing:
        raise ValueError(
            f"{path} holds weights without the state of training ({', '.join(missing)} missing), as save_weights_only "
            "leaves it; training cannot go on from it. Take last.ckpt; sampling and evaluating need weights alone."
        )


def choose_weights(checkpoint: dict[str, Any], weights: str, path: str | Path) -> tuple[dict[str, Any], str]:
    """The average or the raw weights of a checkpoint or an export.

    Args:
        checkpoint: Its contents.
        weights: `average`, which is what a checkpoint without an average has to give, or `raw`.
        path: Its file.

    Returns:
        Tensors by name, and what they are: `average (EMA)` or `raw`.

    Raises:
        ValueError: If `weights` is neither, or there are none.
    """
    if weights not in ("average", "raw"):
        raise ValueError(f"weights is {weights!r}; choose average or raw.")
    exported = checkpoint.get("weights", "").startswith("average")
    if weights == "raw" and exported:
        raise ValueError(f"{path} is an export of average weights and holds no raw ones; take the checkpoint.")
    if weights == "raw":
        return checkpoint.get("current_model_state", checkpoint["state_dict"]), "raw"
    return checkpoint["state_dict"], "average (EMA)" if exported or "current_model_state" in checkpoint else "raw"
