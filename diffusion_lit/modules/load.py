"""A checkpoint as the objects that it describes: its LightningModule and its data module."""

import contextlib
import importlib
import io
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule, LightningModule

from diffusion_lit.runtime.hardware import channels_last_pays
from diffusion_lit.runtime.installation import refuse_hidden_datamodules
from diffusion_lit.storage.checkpoints import read_checkpoint


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
    refuse_hidden_datamodules()
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
