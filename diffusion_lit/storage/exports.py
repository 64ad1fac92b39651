"""Exported models: weights as safetensors and a record as JSON, no pickle.

OUT/model.safetensors   the weights that sample, each tensor under its name in the module
OUT/model.json          what builds the module and draws from it: classes and arguments, sampling, names of classes

Tensors that a module keeps beside its weights, such as the autoencoder of a latent model, lie in model.safetensors too;
where one belongs, the record has {"tensor": NAME}.
"""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

FORMAT = "diffusion-lit 1"


WEIGHTS, RECORD = "model.safetensors", "model.json"
GUIDE = "guide"  # the folder of the model that guides it, where there is one: an export too


KEPT = ("hyper_parameters", "datamodule_hyper_parameters", "diffusion_lit", "global_step", "pytorch-lightning_version")
PARTS = ("latent_space", "autoencoder", "classifier", "teacher_sha256")  # what modules add to a checkpoint


def is_export(path: str | Path) -> bool:
    """Whether a path is a folder written by `diffusion-lit export`.

    Returns:
        Whether both files are there.
    """
    return (Path(path) / WEIGHTS).is_file() and (Path(path) / RECORD).is_file()


def record_checksum(record: dict[str, Any]) -> str:
    """The CRC-32 of a record's other values."""
    others = {name: value for name, value in record.items() if name != "record_crc32"}
    return f"{zlib.crc32(json.dumps(others, sort_keys=True).encode()):08x}"


def take_apart(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Moves the tensors out of nested dictionaries and lists.

    Args:
        value: Plain values and tensors.
        name: Of the value; a tensor inside gets a name of its keys, joined by slashes.
        tensors: Where the tensors go.

    Returns:
        The same with {"tensor": NAME} for each tensor.
    """
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {key: take_apart(inner, f"{name}/{key}", tensors) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [take_apart(inner, f"{name}/{index}", tensors) for index, inner in enumerate(value)]
    return value


def put_together(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Undoes `take_apart`.

    Args:
        value: What it returned.
        tensors: By name; those that are used are taken out.

    Raises:
        KeyError: If a tensor is missing.
    """
    if isinstance(value, dict):
        if value.keys() == {"tensor"}:
            return tensors.pop(value["tensor"])
        return {key: put_together(inner, tensors) for key, inner in value.items()}
    return [put_together(inner, tensors) for inner in value] if isinstance(value, list) else value


def read_export(path: str | Path) -> dict[str, Any]:
    """Reads an exported model in the form of a checkpoint's contents.

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
        raise ValueError(f"{folder / RECORD} is not a record of `diffusion-lit export`; export the checkpoint again.")
    if "record_crc32" in record and record["record_crc32"] != record_checksum(record):
        raise ValueError(
            f"{folder / RECORD} is damaged or was changed after it was written; export the checkpoint again."
        )
    written = record.get("crc32")  # a quarter of the time of the SHA-256, which older exports have alone
    found = hashlib.sha256(encoded).hexdigest() if written is None else f"{zlib.crc32(encoded):08x}"
    if found != (record.get("sha256") if written is None else written):
        raise ValueError(
            f"{folder / WEIGHTS} is not the file that {RECORD} beside it describes, or it is damaged; export the "
            "checkpoint again."
        )
    try:
        tensors = load_tensors(encoded)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is no safetensors file: {error}.") from error
    kept = {name: record[name] for name in KEPT if name in record}
    try:
        kept |= {name: put_together(record[name], tensors) for name in PARTS if name in record}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / WEIGHTS} lacks the tensor {error} of {RECORD}; export the checkpoint again."
        ) from error
    if isinstance(record.get("guide"), dict):
        if not is_export(folder / GUIDE):
            raise ValueError(f"{folder / GUIDE}, the model that guides this one, is missing; export it again.")
        kept["guide"] = {**read_export(folder / GUIDE), **record["guide"]}
    return {**kept, "state_dict": tensors, "weights": record["weights"]}
