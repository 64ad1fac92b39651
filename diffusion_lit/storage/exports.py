"""Exported models: weights as safetensors and a record as JSON, no pickle.

OUT/model.safetensors   the weights that sample, each tensor under its name in the module
OUT/model.json          what builds the module and draws from it: classes and arguments, sampling, names of classes
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

FORMAT = "diffusion-lit 1"


WEIGHTS, RECORD = "model.safetensors", "model.json"


KEPT = ("hyper_parameters", "datamodule_hyper_parameters", "diffusion_lit", "global_step", "pytorch-lightning_version")


def is_export(path: str | Path) -> bool:
    """Whether a path is a folder written by `lightning export`.

    Args:
        path: Any path.

    Returns:
        Whether both files are there.
    """
    return (Path(path) / WEIGHTS).is_file() and (Path(path) / RECORD).is_file()


def read_export(path: str | Path) -> dict[str, Any]:
    """Reads an exported model in the form of a checkpoint's contents.

    Args:
        path: The folder.

    Returns:
        A dictionary with `state_dict`, `hyper_parameters` and what else a checkpoint keeps beside the training's state;
        `weights` says which weights they are.

    Raises:
        ValueError: If a file is damaged, of another kind, or does not belong to the other.
    """
    folder = Path(path)
    encoded = (folder / WEIGHTS).read_bytes()
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / RECORD} is damaged: {error}. Export the checkpoint again.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{folder / RECORD} is not a record of `lightning export`; export the checkpoint again.")
    if hashlib.sha256(encoded).hexdigest() != record.get("sha256"):
        raise ValueError(
            f"{folder / WEIGHTS} is not the file that {RECORD} beside it describes, or it is damaged; export the "
            "checkpoint again."
        )
    try:
        tensors = load_tensors(encoded)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is no safetensors file: {error}.") from error
    kept = {name: record[name] for name in KEPT if name in record}
    return {**kept, "state_dict": tensors, "weights": record["weights"]}
