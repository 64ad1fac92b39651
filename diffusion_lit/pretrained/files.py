"""Where a pretrained model's files are: a folder in the layout of diffusers' `save_pretrained`, or one on the hub.

JSON, the vocabularies of tokenizers and weights in safetensors are read. Pickles are never downloaded and never opened.
"""

import importlib
import json
import re
from pathlib import Path
from typing import Any

from diffusion_lit.words import article, first_line

ROOT_FILES = ("model_index.json", "config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors")
PART_FILES = (
    *("*.json", "*.txt", "*.model", "model.safetensors", "model-*.safetensors"),
    *("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*.safetensors"),
)
VARIANTS = ["*.fp16*", "*non_ema*"]
CODE = ("auto_map", "custom_pipelines", "trust_remote_code", "quantization_config", "pre_quantization_config")
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
        ValueError: If there is no such folder or name, or it is not available.
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
        ValueError: If the weights are pickles, or missing, damaged or others than the configuration says, or the folder
            asks for code from elsewhere.
    """
    safetensors = library("safetensors")
    refuse_code(folder)
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
        raise ValueError(f"{folder} cannot be loaded as {article(kind)}: {first_line(error)}") from error
    missing = sorted(str(key) for key in report["missing_keys"])
    if missing:
        raise ValueError(f"The weights in {folder} lack {missing[0]} and {len(missing) - 1} more; get them anew.")
    return net.float().eval().requires_grad_(False)


def refuse_code(folder: Path) -> None:
    """Refuses a part of a model that asks its library for code, or for weights in other than safetensors.

    Args:
        folder: The part's folder.

    Raises:
        ValueError: If a file there asks for that.
    """
    for path in sorted(folder.glob("*config.json")):
        config = read_json(path)
        for key in CODE:
            if config.get(key):
                raise ValueError(f"{path} sets {key}, by which code runs that is no part of the library; not read.")
        attention = config.get("attn_implementation") or config.get("_attn_implementation")
        if "/" in str(attention):
            raise ValueError(f"{path} takes its attention from {attention}, code on the hub; not read.")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} is an adapter, which names another model to load; give a whole model.")
    for path in sorted(folder.glob("*.index.json")):
        shards = read_json(path).get("weight_map")
        for shard in shards.values() if isinstance(shards, dict) else ["no shards"]:
            if not re.fullmatch(r"[\w.-]+\.safetensors", str(shard)):
                raise ValueError(f"{path} names {shard}, which is no file of safetensors beside it; not read.")


def refuse_foreign_parts(model: Path, parts: tuple[str, ...]) -> None:
    """Refuses a model whose index names classes of other libraries for parts that are read.

    Args:
        model: The model's folder.
        parts: The parts that are read.

    Raises:
        ValueError: If one is neither of diffusers nor of transformers.
    """
    index = read_json(model / "model_index.json") if (model / "model_index.json").is_file() else {}
    if not isinstance(index.get("_class_name", ""), str):
        raise ValueError(f"{model} has a pipeline of its own code, {index['_class_name']}, which is not run; not read.")
    for part in parts:
        named = index.get(part) or [None, None]
        known = isinstance(named, list) and len(named) == 2 and named[0] in (None, "diffusers", "transformers")
        if not known or (named[0] and not str(named[1]).isidentifier()):
            raise ValueError(f"{model} has {named} as its {part}, which is no class of diffusers or transformers.")
