"""Trained autoencoders, from a checkpoint, a run or another library."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from diffusion_lit.modules.protocols import Encodes
from diffusion_lit.nets.autoencoder import part
from diffusion_lit.storage.checkpoints import read_checkpoint
from diffusion_lit.storage.runs import find_checkpoint
from diffusion_lit.storage.size import no_larger_than
from diffusion_lit.storage.trust import check, find_class, naming

HUB = "hub:"
LOADERS: dict[str, Callable[[str], nn.Module]] = {}  # of other libraries' autoencoders, which register themselves


def describe(net: Any) -> dict[str, Any]:
    """The description that rebuilds an autoencoder, as plain values.

    Args:
        net: The autoencoder, whose `config` holds its arguments.

    Returns:
        `class_path` and `init_args`.
    """
    return part(net)


def build(record: dict[str, Any]) -> Any:
    """Builds an autoencoder from its description, with random weights.

    Args:
        record: From `describe`.

    Returns:
        The autoencoder.

    Raises:
        ValueError: If the class is not one that a file may name, or is no autoencoder.
    """
    with naming("The file"):
        check(record)
        kind = find_class(record["class_path"])
    if not (issubclass(kind, nn.Module) and issubclass(kind, Encodes)):
        raise ValueError(f"{record['class_path']} is no autoencoder.")
    try:
        return kind(**{name: _built(value) for name, value in record["init_args"].items()})
    except (TypeError, RuntimeError, KeyError, AttributeError) as error:
        raise ValueError(f"The file's autoencoder {record['class_path']} cannot be built: {error}.") from error


def _built(value: Any) -> Any:
    """An argument of an autoencoder, built where it describes a part of it."""
    if not (isinstance(value, dict) and set(value) == {"class_path", "init_args"}):
        return value
    kind = find_class(value["class_path"])
    if not issubclass(kind, nn.Module):
        raise ValueError(f"{value['class_path']} is no part of an autoencoder.")
    return kind(**value["init_args"])


def load_autoencoder(source: str) -> Any:
    """Reads a trained autoencoder.

    Args:
        source: A checkpoint of `VAE`; the folder of its runs, `runs/NAME`, whose newest checkpoint is taken; or, with
            the extra `pretrained`, a folder of diffusers' AutoencoderKL or AutoencoderTiny or its name
            `hub:OWNER/NAME`.

    Returns:
        The autoencoder with its weights (the average ones of a checkpoint).

    Raises:
        ValueError: If there is none, or the file is damaged or of another kind of model.
    """
    path = Path(source).expanduser()
    if source.startswith(HUB) or (path / "config.json").is_file():
        if "diffusers" not in LOADERS:
            raise ValueError(f"{source} is an autoencoder of diffusers: import diffusion_lit.pretrained first.")
        return LOADERS["diffusers"](source.removeprefix(HUB))
    checkpoint = vae_checkpoint(source)
    try:
        with no_larger_than(checkpoint["state_dict"]):
            net = build(checkpoint["autoencoder"])
    except ValueError as error:
        raise ValueError(f"{source} names something that cannot be built: {error}") from error
    try:
        net.load_state_dict(part_of(checkpoint["state_dict"], "net"))
    except RuntimeError as error:
        raise ValueError(f"The weights in {source} do not fit the autoencoder that it describes.") from error
    return net


def vae_checkpoint(source: str) -> dict[str, Any]:
    """Reads a checkpoint of a VAE.

    Args:
        source: The file, or the folder of its runs, whose newest checkpoint is taken.

    Returns:
        Its contents.

    Raises:
        ValueError: If there is none, or the file is damaged or of another kind of model.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise ValueError(
            f"There is no autoencoder {source}; train one with diffusion-lit fit --config configs/vae_NAME.yaml, which "
            f"leaves it in runs/vae_NAME, or give a checkpoint, a folder of diffusers' or {HUB}OWNER/NAME."
        )
    path = find_checkpoint(path)
    checkpoint = read_checkpoint(path)
    if "autoencoder" not in checkpoint:
        kind = str(checkpoint.get("hyper_parameters", {}).get("_class_path", "another model")).rpartition(".")[2]
        raise ValueError(
            f"{path} is a checkpoint of {kind}, not of a VAE; give one that configs/vae_NAME.yaml trained."
        )
    return checkpoint


def part_of(state: dict[str, Any], name: str) -> dict[str, Any]:
    """The weights of a part of a module, by their names in the part.

    Args:
        state: Weights of the module.
        name: Name of the part.

    Returns:
        Its weights.
    """
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
