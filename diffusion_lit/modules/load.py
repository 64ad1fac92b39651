"""Builds the LightningModule and the data module that a checkpoint describes."""

import contextlib
import inspect
import io
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import instantiate_module

from diffusion_lit.diffusion.guidance import Guide
from diffusion_lit.diffusion.models import PixelModel
from diffusion_lit.modules.given import as_given
from diffusion_lit.modules.protocols import DataSet, Model
from diffusion_lit.runtime.hardware import channels_last_pays
from diffusion_lit.runtime.installation import refuse_hidden_datamodules
from diffusion_lit.storage.checkpoints import read_checkpoint
from diffusion_lit.storage.hashing import weights_hash
from diffusion_lit.storage.size import check_values, no_larger_than
from diffusion_lit.storage.trust import Untrusted, check, find_class, guarded, naming

HELD = ("hyper_parameters", "state_dict", "diffusion_lit")  # of a guide, in the checkpoint of what it guides
JSONARGPARSE_SAYS_TOO = (
    *("Given value", "Subtypes", "Does not validate", "Expected a <class 'NoneType'>", "Expected a <class 'list'>"),
)


def load_module(path: str | Path) -> LightningModule:
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
        module: LightningModule = _build(LightningModule, checkpoint, path)
        guide = held_guide(checkpoint, path)
    if guide is not None and isinstance(module, PixelModel):
        module.denoiser.guide = guide
    if hasattr(module, "net") and channels_last_pays("cpu"):
        module.net.to(memory_format=torch.channels_last)
    return module.eval()


def held_guide(checkpoint: dict[str, Any], path: str | Path) -> Guide | None:
    """Builds the worse model that a checkpoint holds to guide its own; see `modules.guides`.

    Args:
        checkpoint: The contents.
        path: The file.

    Returns:
        The guide, or None where there is none.

    Raises:
        ValueError: If it cannot be built or is not the one that its hash names.
    """
    held = checkpoint.get("guide")
    if held is None:
        return None
    if not isinstance(held, dict) or not all(isinstance(held.get(name), dict) for name in HELD):
        raise ValueError(f"The guide in the checkpoint {path} is not whole; take another checkpoint of the run.")
    content = {name: held[name] for name in HELD}
    _described(content, "hyper_parameters", "module", f"{path}, of the guide,")
    latents = {name: checkpoint[name] for name in ("latent_space",) if name in checkpoint}
    model = _build(LightningModule, {**content, **latents}, path)
    if not isinstance(model, PixelModel) or weights_hash(model.denoiser.state_dict()) != held.get("sha256"):
        raise ValueError(f"The guide in the checkpoint {path} is not the one that its hash names; the file is damaged.")
    return Guide(model.denoiser, str(held.get("file")), str(held["sha256"]), content)


def load_data(path: str | Path, **overrides: Any) -> DataSet:
    """Builds the LightningDataModule that a checkpoint was trained on.

    The checkpoint says where to read data but never where to write: caches go to their default folder, and nothing is
    downloaded into a `root` that is not given here.

    Args:
        path: The checkpoint file.
        overrides: Arguments of the data module to replace, such as `root`; None leaves one as it is.

    Returns:
        The data module, not yet prepared.

    Raises:
        ValueError: As `read_checkpoint`, if the file does not say which data it was trained on, if that takes no such
            argument, or if the data has other classes now.
    """
    refuse_hidden_datamodules()
    import datamodules

    overrides = {name: value for name, value in overrides.items() if value is not None}
    checkpoint = read_checkpoint(path)
    _described(checkpoint, LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY, "data", path)
    _refuse_unknown(checkpoint[LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY]["_class_path"], overrides, path)
    data: DataSet = _build(LightningDataModule, checkpoint, path, **overrides)
    if isinstance(data, datamodules.ImageDataModule):
        data.write_nowhere(but_root="root" in overrides)
        recorded = checkpoint.get("diffusion_lit", {})
        names = recorded.get("class_names", []) if recorded.get("conditional", True) else []
        data.continue_from(recorded.get("data") or {}, names)
    return data


def prepared_data(path: str | Path, stage: str | None = None, **overrides: Any) -> DataSet:
    """Builds the data of a checkpoint as `load_data` does, and reads it.

    Args:
        path: The checkpoint file.
        stage: What is read, as in `LightningDataModule.setup`; all splits by default.
        overrides: As in `load_data`.

    Raises:
        ValueError: As `load_data`.
        OSError: If the data is missing.
    """
    data = load_data(path, **overrides)
    data.prepare_data()
    data.setup(stage)
    return data


def give_held_out(module: Model, path: str | Path | None, root: str | None = None) -> None:
    """Gives a model that is given an image the test images of the data that it was trained on.

    Args:
        module: The model, changed in place where it is given an image.
        path: Its checkpoint.
        root: Where the data lies now, if elsewhere.

    Raises:
        ValueError: If the data cannot be built.
        OSError: If the data is missing.
    """
    given = as_given(module)
    if given is None or path is None:
        return
    given.give(prepared_data(path, "test", root=root), "test")


def _refuse_unknown(class_path: str, overrides: dict[str, Any], path: str | Path) -> None:
    """Refuses arguments that a data set does not take, such as a folder for images that a library brings along."""
    if not overrides:
        return
    with naming(f"The checkpoint {path}"):
        kind = find_class(class_path)
    known = inspect.signature(kind).parameters
    if any(one.kind is one.VAR_KEYWORD for one in known.values()):
        return
    for name, value in overrides.items():
        if name not in known:
            option = "--data_root" if name == "root" else name
            raise ValueError(
                f"{kind.__name__}, the data of {path}, has no {name}, so that {option} {value} does nothing; leave it "
                "out."
            )


def _build(base: Any, checkpoint: dict[str, Any], path: str | Path, **overrides: Any) -> Any:
    """Builds the object that a checkpoint describes, from trusted classes, and loads its state."""
    described = {**checkpoint[base.CHECKPOINT_HYPER_PARAMS_KEY], **overrides}
    with naming(f"The checkpoint {path}"):
        check(described)
    try:
        check_values(described)
        record = deepcopy(described)
    except (ValueError, RecursionError) as error:
        reason = "they are nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"The checkpoint {path} holds arguments that cannot be read: {reason}.") from error
    record.pop("_instantiator", None)
    net = record.get("net")
    args = net.get("init_args") if isinstance(net, dict) else None
    if isinstance(args, dict) and args.get("attention_resolutions") in ([8], (8,)):
        del args["attention_resolutions"]  # the default of version 0.1.0, which meant: where there is such a map
    try:
        with guarded(), no_larger_than(checkpoint["state_dict"]), contextlib.redirect_stderr(io.StringIO()):
            built = instantiate_module(base, record)
    except (Exception, SystemExit) as error:  # arguments from a file may raise anything
        raise ValueError(f"The checkpoint {path} names something that cannot be built: {_reason(error)}") from error
    try:
        if isinstance(built, LightningModule):
            with no_larger_than(checkpoint["state_dict"]):
                built.configure_model()
                built.on_load_checkpoint(checkpoint)
            built.load_state_dict(checkpoint["state_dict"])
        elif type(built).__qualname__ in checkpoint:
            built.load_state_dict(checkpoint[type(built).__qualname__])
    except (RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"The checkpoint {path} does not fit the code that it names: {_reason(error)}") from error
    return built


def _reason(error: BaseException) -> str:
    """The message of an error in one line: the refused name, or else the innermost failure."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Untrusted):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    lines = [line.strip().removeprefix("- ") for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.endswith(":") and not line.startswith(JSONARGPARSE_SAYS_TOO)]
    return said[-1] if said else type(error).__name__


def _described(checkpoint: dict[str, Any], key: str, what: str, path: str | Path) -> None:
    if "_class_path" not in checkpoint.get(key, {}):
        raise ValueError(
            f"The checkpoint {path} does not say which {what} class it belongs to; only checkpoints made by `lightning "
            "fit` do. Build the objects in Python and load its `state_dict` into them."
        )
