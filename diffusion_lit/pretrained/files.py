"""Where a pretrained model's files are: a folder in the layout of diffusers' `save_pretrained`, or one on the hub.

JSON, the vocabularies of tokenizers and weights in safetensors are read. Pickles are never downloaded and never opened.
"""

import importlib
import json
import re
from pathlib import Path
from typing import Any

ROOT_FILES = ("model_index.json", "config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors")
PART_FILES = (
    *("*.json", "*.txt", "*.model", "model.safetensors", "model-*.safetensors"),
    *("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*.safetensors"),
)
VARIANTS = ["*.fp16*", "*non_ema*"]
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack")
WAY_OUT = "or give a folder that holds it, as `save_pretrained` writes it"


def library(name: str) -> Any:
    """One of the libraries of the extra `pretrained`.

    Args:
        name: Its name, such as `diffusers`.

    Returns:
        The module.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"Pretrained models need {name}; install the extra: pip install 'diffusion-lit[pretrained]'."
        ) from error


def find_model(source: str, parts: tuple[str, ...]) -> Path:
    """The folder of a model, downloaded where it is a name.

    Args:
        source: A folder, or a name OWNER/NAME on the Hugging Face hub.
        parts: The subfolders that will be needed.

    Returns:
        The folder.

    Raises:
        ValueError: If there is no such folder or name, or it is not to be had.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise ValueError(f"There is no folder {source}, and a name on the hub is OWNER/NAME; give one or the other.")
    return _download(source, parts)


def _download(name: str, parts: tuple[str, ...]) -> Path:
    hub, errors = library("huggingface_hub"), library("huggingface_hub.errors")
    wanted = [*ROOT_FILES, *(f"{part}/{kind}" for part in parts for kind in PART_FILES)]
    try:
        return Path(hub.snapshot_download(name, allow_patterns=wanted, ignore_patterns=VARIANTS))
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{name} is gated: accept its licence on its page on the Hugging Face hub, log in with `hf auth login` and "
            f"try again, {WAY_OUT}."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"There is no model {name} on the Hugging Face hub, or it is private: check the name, log in with `hf auth "
            f"login` if it is yours, {WAY_OUT}."
        ) from error
    except (OSError, errors.HfHubHTTPError) as error:
        raise ValueError(
            f"{name} was not downloaded before and the Hugging Face hub cannot be reached: try again with internet "
            f"(and without HF_HUB_OFFLINE), {WAY_OUT}."
        ) from error


def part_of(model: Path, part: str, config: str = "config.json") -> Path:
    """The folder of a part of a model: the subfolder of its name, or the model's own where it lies there.

    Args:
        model: The model's folder.
        part: Name of the part, such as `unet`.
        config: Name of its configuration file.

    Returns:
        The folder.

    Raises:
        ValueError: If neither holds the configuration.
    """
    for folder in (model / part, model):
        if (folder / config).is_file():
            return folder
    raise ValueError(f"{model} holds neither {part}/{config} nor {config}; give a whole model, with its {part}.")


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file.

    Args:
        path: The file.

    Returns:
        What it says.

    Raises:
        ValueError: If it is missing or damaged.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"There is no {path}.") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON; get it anew.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no configuration; get it anew.")
    return content


def load_part(kind: Any, folder: Path, **options: Any) -> Any:
    """A network with its weights, from safetensors alone, in float32 and eval mode, none of its weights missing.

    Args:
        kind: A class of diffusers or transformers.
        folder: Its folder.
        options: Further arguments of `from_pretrained`.

    Returns:
        The network.

    Raises:
        ValueError: If the weights are pickles, or missing, damaged or others than the configuration says.
    """
    safetensors = library("safetensors")
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        found = f", only {pickles[0]}, a pickle, which could run code and is not read" if pickles else ""
        raise ValueError(
            f"{folder} holds no weights in safetensors{found}; get the model in safetensors, or convert it where you "
            "trust it: from_pretrained, then save_pretrained."
        )
    try:
        net, report = kind.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, safetensors.SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder} cannot be loaded as a {kind.__name__}: {reason}") from error
    missing = sorted(str(key) for key in report["missing_keys"])
    if missing:
        raise ValueError(f"The weights in {folder} lack {missing[0]} and {len(missing) - 1} more; get them anew.")
    return net.float().eval().requires_grad_(False)
