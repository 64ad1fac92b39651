"""Where a run lies, and facts about it in words: its configuration, size, evaluations, times."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule
from torch import nn

from diffusion_lit.modules.latent import LatentDiffusion
from diffusion_lit.modules.protocols import is_model
from diffusion_lit.modules.warm_start import sentence
from diffusion_lit.storage.hashing import file_hash
from diffusion_lit.storage.runs import versions

MAPPINGS = (("trainer",), ("model",), ("data",), ("model", "init_args"), ("data", "init_args"))
COUNTS = (
    *(("trainer", name) for name in ("max_steps", "max_epochs", "accumulate_grad_batches")),
    ("data", "init_args", "batch_size"),
)
HARDWARE = "hardware/text_summary"  # TensorBoard's tag of what `RunSummary` records


def find_run(folder: Path) -> Path:
    """The folder of one version of a run.

    Args:
        folder: It, or the folder of its versions.

    Returns:
        The folder that holds the run's files.

    Raises:
        ValueError: If there is none.
    """
    if not folder.exists():
        raise ValueError(f"There is no folder {folder}; `diffusion-lit fit` writes runs/NAME/version_N.")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give the run's folder, runs/NAME/version_N.")
    if is_run(folder):
        return folder
    for version in versions(folder):
        if is_run(version):
            return version
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and versions(path))
    if names:
        raise ValueError(f"{folder} holds the runs {', '.join(names)}; give one of them, such as {folder / names[0]}.")
    raise ValueError(
        f"{folder} holds no run: neither config.yaml nor TensorBoard's event files nor checkpoints; give "
        "runs/NAME/version_N."
    )


def is_run(folder: Path) -> bool:
    """Whether a folder holds files of `diffusion-lit fit`."""
    return (folder / "config.yaml").is_file() or any(
        any(folder.glob(pattern)) for pattern in ("events.out.tfevents.*", "checkpoints/*.ckpt")
    )


def read_config(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The configuration of a run, as far as it is one.

    Returns:
        What can be used of it, and a sentence on each thing that cannot.
    """
    try:
        content = yaml.safe_load(path.read_text())
        json.dumps(content, default=str, skipkeys=True)  # raises if a part contains itself
    except FileNotFoundError:
        return {}, [f"The run has no {path.name}."]
    except Exception:  # a tag of YAML may raise anything
        return {}, [f"{path.name} cannot be read."]
    if not isinstance(content, dict):
        return {}, [f"{path.name} holds no configuration."]
    problems = []
    for kind, wanted, ways in ((dict, "a mapping", MAPPINGS), (int, "a whole number", COUNTS)):
        for *above, key in ways:
            part = inside(content, *above)
            given = part.get(key) if isinstance(part, dict) else None
            if given is not None and not isinstance(given, kind):
                del part[key]
                name = ".".join([*above, key])
                problems.append(f"{path.name} is read without {name}, which is {given!r:.60} and must be {wanted}.")
    return content, problems


def inside(config: Any, *keys: str) -> Any:
    """A value of a nested configuration.

    Args:
        config: Nested dictionaries.
        keys: The way to the value.

    Returns:
        It, or None where the way breaks off.
    """
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config


def class_name(node: Any) -> str:
    """The class that a part of a configuration names, without its module; empty where it names none."""
    return str(inside(node, "class_path") or "").rpartition(".")[2]


def describe(value: Any) -> str:
    """A value of a configuration as an expression.

    Args:
        value: A plain value, or a class with its arguments as `class_path` and `init_args`.

    Returns:
        Such as `AdamW(lr=0.002, betas=[0.9, 0.999])`; arguments that are None are left out.
    """
    if isinstance(value, dict):
        name, values = class_name(value), value.get("init_args") or {} if "class_path" in value else value
        values = values if isinstance(values, dict) else {"init_args": values}
        given = ", ".join(f"{key}={describe(one)}" for key, one in values.items() if one is not None)
        return f"{name}({given})"
    return "[" + ", ".join(map(describe, value)) + "]" if isinstance(value, list) else str(value)


def settings(config: dict[str, Any], module: LightningModule | None) -> list[list[str]]:
    """The settings that tell runs apart.

    Args:
        config: The run's configuration.
        module: The module of its last checkpoint, or None.

    Returns:
        Name and value of each.
    """
    rows = []
    for part in ("model", "data"):
        rows.append([part, class_name(config.get(part))])
        values = inside(config, part, "init_args") or {}
        rows += [[f"{part}.{key}", describe(value)] for key, value in values.items() if value is not None]
    if is_model(module) and inside(config, "model", "init_args", "sampling") is None:
        chosen = {key: value for key, value in module.sampling.record().items() if value not in (None, {})}
        rows.append(["model.sampling, by default", describe(chosen)])
    trainer = config.get("trainer") or {}
    names = ("max_steps", "max_epochs", "precision", "accelerator", "strategy", "devices", "num_nodes")
    for key in (*names, "accumulate_grad_batches", "gradient_clip_val"):
        if trainer.get(key) is not None:
            rows.append([f"trainer.{key}", describe(trainer[key])])
    rows += [[key, describe(config[key])] for key in ("ema", "seed_everything", "compile") if key in config]
    return rows


def parameters(module: LightningModule) -> list[str]:
    """How large a model is.

    Returns:
        The number of parameters of its network; of all of it, where more is trained; of an autoencoder that it uses.
    """
    own, whole = count_parameters(getattr(module, "net", module)), count_parameters(module)
    told = [f"{magnitude(own)} in the network ({own:,})"]
    told += [f"{magnitude(whole)} in all ({whole:,})"] if whole > own else []
    if not isinstance(module, LatentDiffusion):
        return told
    return [*told, f"{magnitude(count_parameters(module.space.net))} in the autoencoder, which is frozen"]


def begun_from(record: Any) -> str | None:
    """A sentence on the initial weights of a run.

    Args:
        record: The `init_from` of a checkpoint or a receipt; None where the run drew them.

    Returns:
        A sentence without a full stop; None where there is nothing to say, or no sound record.
    """
    try:
        return sentence(record) if record else None
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def count_parameters(module: nn.Module) -> int:
    """The number of a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def receipts(run: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The reports of `diffusion-lit evaluate` on checkpoints of a run, in and beside it and in the current folder.

    Returns:
        File and content of each report that lies in the run's folder or was made of one of its checkpoints.
    """
    hashes: set[str] = set()
    home = run.resolve()
    places = [*run.rglob("*.json"), *run.parent.glob("*.json"), *Path().glob("*.json")]
    found = []
    for path in sorted({place.resolve() for place in places}):
        try:
            content = json.loads(path.read_text())
            file, digest = Path(content["checkpoint"]["file"]), content["checkpoint"]["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # another kind of file
        hashes = hashes or {file_hash(one) for one in (run / "checkpoints").glob("*.ckpt")}
        if home in path.parents or home in file.resolve().parents or digest in hashes:
            found.append((path, content))
    return found


def step_of(path: Path) -> int:
    """The training step that an image is called by.

    Args:
        path: A file such as step_0000450.png.

    Returns:
        Its number, 0 where the name has none.
    """
    number = re.search(r"(\d+)$", path.stem)
    return int(number[1]) if number else 0


def duration(seconds: float) -> str:
    """A time in words.

    Returns:
        Such as "42 s", "2 min 33 s" or "3 h 5 min".
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(whole / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def magnitude(number: int) -> str:
    """A large number in words.

    Returns:
        Such as "755 thousand" or "35.7 million".
    """
    for size, word in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:,}"


def moment(time: float) -> str:
    """A moment in words.

    Args:
        time: Seconds since 1970.

    Returns:
        Date and time to the minute, UTC.
    """
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M UTC")
