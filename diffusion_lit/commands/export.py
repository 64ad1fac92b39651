"""`diffusion-lit export`: a model as two files without any pickle, and back.

    OUT/model.safetensors   the weights that sample, each tensor under its name in the module
    OUT/model.json          what builds the module and draws from it: classes and arguments, sampling, classes' names
    OUT/guide               the same of the worse model that guides it, where the run's sampling names one

`diffusion-lit sample` and `diffusion-lit evaluate` take the folder in a checkpoint's place.
"""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import lightning
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from diffusion_lit.diffusion.models import PixelModel
from diffusion_lit.modules.protocols import is_model
from diffusion_lit.storage.atomic import atomic
from diffusion_lit.storage.exports import FORMAT, GUIDE, KEPT, PARTS, RECORD, WEIGHTS, record_checksum, take_apart


def export(ckpt_path: str, out: str, weights: str = "average") -> None:
    """Writes a checkpoint's model as safetensors and JSON, which hold all that sampling needs and no pickle.

    Args:
        ckpt_path: Checkpoint file, such as runs/edm_digits/version_0/checkpoints/last.ckpt.
        out: Folder for model.safetensors and model.json.
        weights: `average` (EMA) or `raw`.

    Raises:
        ValueError: If the checkpoint cannot be used or holds no such weights.
    """
    from diffusion_lit.modules.guides import guide_beside
    from diffusion_lit.modules.load import load_module
    from diffusion_lit.storage.checkpoints import choose_weights, read_checkpoint

    checkpoint = read_checkpoint(ckpt_path)
    state, which = choose_weights(checkpoint, weights, ckpt_path)
    module = load_module(ckpt_path)
    record = {
        "weights": which,
        "module": f"{type(module).__module__}.{type(module).__name__}",
        **_described(module),
        "versions": {"torch": torch.__version__, "lightning": lightning.__version__},
        **{name: checkpoint[name] for name in KEPT if name in checkpoint},
    }
    further: dict[str, Tensor] = {}
    record |= {name: take_apart(checkpoint[name], name, further) for name in PARTS if name in checkpoint}
    folder, guide = Path(out), guide_beside(module)
    if guide is not None and guide.content is not None:
        held = {"weights": "of a guide", **{name: guide.content[name] for name in KEPT if name in guide.content}}
        _write(folder / GUIDE, held, guide.content["state_dict"], ckpt_path)
        record["guide"] = guide.identity()
    count = _write(folder, record, state, ckpt_path, further)
    print(f"{count:,} {which} weights of step {record.get('global_step')} are in {folder}/.")


def _write(
    folder: Path,
    record: dict[str, Any],
    state: dict[str, Tensor],
    source: str,
    further: dict[str, Tensor] | None = None,
) -> int:
    """Writes both files of a model.

    Args:
        folder: Where to.
        record: What is known of the model, plain values.
        state: Its weights.
        source: The checkpoint that it is from.
        further: Tensors that are no weights of the module, by name.

    Returns:
        The number of its weights.
    """
    tensors = {**state, **(further or {})}
    encoded = save_tensors({name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()})
    count = sum(value.numel() for value in state.values())
    sums = {"sha256": hashlib.sha256(encoded).hexdigest(), "crc32": f"{zlib.crc32(encoded):08x}"}
    described = _json({"format": FORMAT, "parameters": count, **record, **sums}, source).encode()
    with atomic(folder / WEIGHTS) as file:
        file.write(encoded)
    with atomic(folder / RECORD) as file:
        file.write(described)
    return count


def _described(module: lightning.LightningModule) -> dict[str, Any]:
    """Facts for a reader of the record that the module's arguments do not contain."""
    values: dict[str, Any] = {"image_shape": list(getattr(module, "image_shape", []))}
    if is_model(module):
        values["sampling"] = module.sampling.record()
    if isinstance(module, PixelModel):
        scaling = module.denoiser.scaling
        values["num_classes"] = module.num_classes
        values["class_names"] = list(module.class_names)
        values["scaling"] = {
            "class": type(scaling).__name__,
            "sampling_range": [float(value) for value in scaling.sampling_range],
            "variance_preserving": bool(scaling.variance_preserving),
        }
    return values


def _json(record: dict[str, Any], path: str) -> str:
    try:
        plain = json.loads(json.dumps(record))
    except TypeError as error:
        raise ValueError(
            f"The checkpoint {path} has arguments that are no plain values and cannot be exported: {error}."
        ) from error
    return json.dumps({**plain, "record_crc32": record_checksum(plain)}, indent=2)
