"""Checkpoints: files that describe themselves, read without executing anything they hold.

A checkpoint made by `lightning fit` records the classes and arguments of its module and data, the average weights as
`state_dict` and the raw ones as `current_model_state`. Reading goes through `torch.load(weights_only=True)` alone.
"""

import contextlib
import importlib
import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule, LightningModule

from diffusion_lit.export import is_export, read_export
from diffusion_lit.hardware import channels_last_pays


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
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise ValueError(f"The checkpoint {path} cannot be read: no permission.") from error
    except Exception as error:  # the unpickler fails in as many ways as there are files
        if "Weights only load failed" in str(error) and "Unsupported global" in str(error):
            raise ValueError(
                f"The checkpoint {path} holds objects other than tensors and plain values and was not loaded, since "
                "that would run code from the file."
            ) from error
        raise ValueError(
            f"{path} is not a readable checkpoint: it is damaged, truncated or another kind of file."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} is a PyTorch file but not a checkpoint of `lightning fit`: it has no `state_dict`.")
    return checkpoint


def load_module(path: str | Path) -> Any:
    """Builds the LightningModule that a checkpoint describes, with its average weights, in eval mode.

    Args:
        path: The checkpoint file.

    Returns:
        The module, on the CPU.

    Raises:
        ValueError: As `read_checkpoint`, or if the file does not say which module made it.
    """
    import diffusion_lit.modules  # noqa: F401 (makes the classes known)

    checkpoint = read_checkpoint(path)
    _described(checkpoint, "hyper_parameters", "module", path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: Any = _build(LightningModule, checkpoint, path)
    if hasattr(module, "net") and channels_last_pays("cpu"):
        module.net.to(memory_format=torch.channels_last)
    return module.eval()


def load_model(
    ckpt_path: str | None, pretrained: str | None = None, prompts: Sequence[str] = (), **options: Any
) -> Any:
    """The model that a command draws with: a checkpoint's, or one of another library.

    Args:
        ckpt_path: Checkpoint file, or a folder of `lightning export`.
        pretrained: Name or folder of a pretrained model; see `diffusion_lit.pretrained.load_pretrained`.
        prompts: What a pretrained text model is asked for; label i means prompt i.
        options: Further arguments of `load_pretrained`; empty ones mean nothing.

    Returns:
        A `DiffusionModule`, or what has its interface as far as sampling goes, in eval mode, on the CPU.

    Raises:
        ValueError: If not one of the two is given, prompts are given for a checkpoint, or it cannot be loaded or does
            not denoise.
    """
    if (ckpt_path is None) == (pretrained is None):
        raise ValueError("Give one model: --ckpt_path FILE for one trained here, or --pretrained NAME for another.")
    if pretrained is not None:
        from diffusion_lit.pretrained import load_pretrained

        return load_pretrained(pretrained, list(prompts), **options)
    assert ckpt_path is not None
    if prompts:
        raise ValueError(
            f"A prompt was given, but {ckpt_path} knows classes, not words; choose a class by --label, or a text model "
            "by --pretrained."
        )
    for name, value in options.items():
        if value:
            raise ValueError(f"--{name} is for a pretrained text model; leave it out with --ckpt_path {ckpt_path}.")
    module = load_module(ckpt_path)
    if not hasattr(module, "generate"):
        raise ValueError(
            f"{ckpt_path} holds a {type(module).__name__}, which draws no pictures; give a model that does."
        )
    return module


def load_data(path: str | Path, **overrides: Any) -> LightningDataModule:
    """Builds the LightningDataModule that a checkpoint was trained on.

    Args:
        path: The checkpoint file.
        overrides: Arguments of the data module to replace, such as `root`.

    Returns:
        The data module, not yet prepared.

    Raises:
        ValueError: As `read_checkpoint`, or if the file does not say which data it was trained on.
    """
    import datamodules  # noqa: F401 (makes the classes known)

    checkpoint = read_checkpoint(path)
    _described(checkpoint, LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY, "data", path)
    return cast(LightningDataModule, _build(LightningDataModule, checkpoint, path, **overrides))


def _build(base: Any, checkpoint: dict[str, Any], path: str | Path, **overrides: Any) -> Any:
    """Lightning's own `load_from_checkpoint`, fed with what was read already, its failures told in a sentence."""
    _import_own(str(checkpoint.get(base.CHECKPOINT_HYPER_PARAMS_KEY, {}).get("_class_path", "")))
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    buffer.seek(0)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            return base.load_from_checkpoint(buffer, map_location="cpu", weights_only=True, **overrides)
    except SystemExit as error:
        reason = (said.getvalue().strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"The checkpoint {path} names something that cannot be built: {reason}") from error
    except (RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"The checkpoint {path} does not fit the code that it names: {reason}") from error


def _import_own(class_path: str) -> None:
    """Imports the module of a class of one's own, which lies in the folder where the command is given.

    Lightning builds none but classes that are imported already, so that a checkpoint cannot make it run any module of
    the machine.
    """
    module, _, _ = class_path.rpartition(".")
    top = module.partition(".")[0]
    if top and (Path(f"{top}.py").is_file() or Path(top, "__init__.py").is_file()):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)


def _described(checkpoint: dict[str, Any], key: str, what: str, path: str | Path) -> None:
    if "_class_path" not in checkpoint.get(key, {}):
        raise ValueError(
            f"The checkpoint {path} does not say which {what} class it belongs to; only checkpoints made by `lightning "
            "fit` do. Build the objects in Python and load its `state_dict` into them."
        )


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
