"""Warm starts: initial weights from another run, as far as they fit.

The unit is a layer: a submodule with its own parameters, and their buffers. A layer of the same name and shapes is
taken whole, whatever class the rest of the module has; of the embedding of classes each row goes by its class's name.
Every other layer starts as it was drawn, and so do optimizer, schedule, average and step, which are not looked at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_lit.diffusion.rng import keyed_generator
from diffusion_lit.modules.latent_space import encoder_hash
from diffusion_lit.storage.checkpoints import choose_weights, read_checkpoint
from diffusion_lit.storage.exports import WEIGHTS, is_export
from diffusion_lit.storage.hashing import file_hash
from diffusion_lit.storage.verified import decode
from diffusion_lit.words import counted, few

SHOWN = 12  # layers that a summary names one by one, of each kind


@dataclass(frozen=True)
class Source:
    """The weights that a run starts from.

    Args:
        path: Their file, or the folder of an export.
        sha256: Hash of the file.
        state: Tensors by name.
        weights: Which they are: `average (EMA)`, `raw` or `snapshot of an average`.
        class_names: The classes' names in the order of their numbers; none where they are not known.
        record: The training's step and module, and what it started from itself, as far as the file says.
    """

    path: Path
    sha256: str
    state: dict[str, Tensor]
    weights: str
    class_names: list[str]
    record: dict[str, Any]

    @classmethod
    def read(cls, path: Path, weights: str = "average") -> "Source":
        """Reads a checkpoint, an export or a snapshot of an average, without executing or building anything in it.

        Args:
            path: A checkpoint, the folder of an export, or a safetensors file such as the run's averages/step_*.
            weights: `average` or `raw`.

        Returns:
            The weights.

        Raises:
            ValueError: If there is no such file, it is damaged or holds more than tensors and plain values, or it has
                no such weights.
        """
        if path.name == WEIGHTS and is_export(path.parent):
            path = path.parent
        if path.suffix == ".safetensors":
            return cls._snapshot(path, weights)
        checkpoint = read_checkpoint(path)
        state, which = choose_weights(checkpoint, weights, path)
        known = checkpoint.get("diffusion_lit", {})
        record = {
            "step": checkpoint.get("global_step"),
            "module": checkpoint.get("hyper_parameters", {}).get("_class_path"),
            "init_from": known.get("init_from"),
            "encoder_sha256": _encoder_of(checkpoint.get("latent_space")),
        }
        names = [str(name) for name in known.get("class_names") or []]
        return cls(path, file_hash(path), _tensors(state, path), which, names, _given(record))

    @classmethod
    def _snapshot(cls, path: Path, weights: str) -> "Source":
        if weights != "average":
            raise ValueError(
                f"{path} is a snapshot of an average and holds no {weights} weights; give a checkpoint, or leave "
                "--init_weights out."
            )
        try:
            state, metadata = decode(path)
        except OSError as error:
            raise ValueError(
                f"There is no snapshot {path}, or it cannot be read: {error.strerror or error}."
            ) from error
        names = metadata.get("class_names", "").split("\n") if metadata.get("class_names") else []
        return cls(path, file_hash(path), _tensors(state, path), "snapshot of an average", names, {})


@dataclass
class Start:
    """What a module has taken from a source.

    Args:
        source: The source.
        taken: Layers that were taken whole.
        rows: Layers of which some classes' rows were taken, and what of them.
        new: Layers that start as they were drawn, and why.
        left: Layers of the source that the module has not.
        values: Numbers taken, and numbers that the module's layers have.
    """

    source: Source
    taken: list[str] = field(default_factory=list)
    rows: dict[str, str] = field(default_factory=dict)
    new: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    values: tuple[int, int] = (0, 0)

    def record(self) -> dict[str, Any]:
        """What checkpoints and receipts keep, as plain values."""
        return {
            "file": str(self.source.path),
            "sha256": self.source.sha256,
            "weights": self.source.weights,
            **self.source.record,
            "values": list(self.values),
            "layers": {"taken": self.taken, "rows": self.rows, "new": self.new, "left": self.left},
        }

    def lines(self) -> list[str]:
        """The report to read: the source in one line, then the layers, equal ones grouped."""
        kinds = {**dict.fromkeys(self.taken, "taken"), **self.rows, **self.new}
        told = _together(kinds)
        width = max(len(name) for name in told)
        lines = [f"{sentence(self.record())}:"]
        lines += [f"  {name.ljust(width)}  {what}" for name, what in told.items()]
        if self.left:
            some = ", ".join(self.left[:SHOWN]) + (", ..." if len(self.left) > SHOWN else "")
            lines.append(f"  Not in this network, and left: {some}")
        return [*lines, "Optimizer, schedule, average and step begin anew."]


def _encoder_of(space: Any) -> str | None:
    """The hash of the encoder whose latents a checkpoint's model denoises, or None."""
    weights = space.get("state_dict") if isinstance(space, Mapping) else None
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        return None
    return encoder_hash(weights)


def sentence(record: dict[str, Any]) -> str:
    """A warm start in words, without a full stop.

    Args:
        record: As of `Start.record`.

    Returns:
        Such as `Started from runs/a/version_0/checkpoints/last.ckpt (EDM, step 900, average (EMA), 1a2b3c4d5e6f), 99.8%
        of its weights in 61 of 62 layers`.
    """
    module, step = record.get("module"), record.get("step")
    facts = [str(module).rpartition(".")[2]] if module else []
    facts += [f"step {step:,}"] if step is not None else []
    layers = record["layers"]
    some, every = len(layers["taken"]) + len(layers["rows"]), sum(len(layers[k]) for k in ("taken", "rows", "new"))
    taken, total = record["values"]
    share = "all" if taken == total else f"{taken / total:.1%}"
    return (
        f"Started from {record['file']} ({', '.join([*facts, record['weights'], record['sha256'][:12]])}), {share} of "
        f"the weights, in {some} of {every} layers"
    )


@torch.no_grad()
def start_from(module: nn.Module, source: Source, class_names: Sequence[str] = ()) -> Start:
    """Puts the weights of a source into a module, as far as they fit.

    Args:
        module: The module, its weights as they were drawn.
        source: The weights.
        class_names: Names of the module's classes in the order of their numbers.

    Returns:
        What was taken.

    Raises:
        ValueError: If no layer fits, or a value that was to be taken is not finite; the module is as it was then.
    """
    start = Start(source)
    mine, theirs = _layers(module.state_dict()), _layers(source.state)
    trained = {name.rpartition(".")[0] for name, _ in module.named_parameters()}
    embeddings = {name for name, layer in module.named_modules() if isinstance(layer, nn.Embedding)}
    copies: list[tuple[Tensor, Tensor]] = []
    total = 0
    for name in (name for name in mine if name in trained):
        here, there = mine[name], theirs.get(name, {})
        total += sum(value.numel() for value in here.values())
        pairs = [(value, there[key]) for key, value in here.items() if key in there and _fits(value, there[key])]
        by_name = _rows(name, here, there, source, class_names) if name in embeddings else None
        if by_name is not None:
            row_pairs, start.rows[name] = by_name
            copies += row_pairs
        elif len(pairs) == len(here):
            copies += pairs
            start.taken.append(name)
        else:
            start.new[name] = _reason(here, there)
    start.left = [name for name in theirs if name not in mine]
    if not copies:
        raise ValueError(
            f"Nothing in {source.path} fits this run's {type(module).__name__}: there the layers are "
            f"{few(list(theirs), 3)}, here {few(list(start.new), 3)}. Start from a checkpoint of such a network, or "
            "leave --init_from out."
        )
    for name in (*start.taken, *start.rows):
        if not all(bool(torch.isfinite(value).all()) for value in theirs[name].values()):
            raise ValueError(f"The weights of {source.path} are not finite in {name}; take an earlier checkpoint.")
    for value, other in copies:
        value.copy_(other)
    start.values = (sum(value.numel() for value, _ in copies), total)
    return start


def _rows(
    name: str, here: dict[str, Tensor], there: dict[str, Tensor], source: Source, class_names: Sequence[str]
) -> tuple[list[tuple[Tensor, Tensor]], str] | None:
    """The rows of the classes' embedding by the classes' names; None where it is none, or all names are the same.

    The last row is the null class. A class that the source does not know starts from a random row of the others' size,
    which is not the one that was drawn for it: under the same seed another class of the source began there.
    """
    key = f"{name}.weight" if name else "weight"
    mine, theirs, names = here[key], there.get(key), source.class_names
    if theirs is None or not names or list(class_names) == names:
        return None
    alike = mine.ndim == theirs.ndim == 2 and mine.shape[1] == theirs.shape[1]
    if not alike or (len(mine), len(theirs)) != (len(class_names) + 1, len(names) + 1) or not _plain(theirs):
        return None
    known = [one for one in class_names if one in names]
    if not known and mine.shape == theirs.shape:
        return None
    rows = [
        theirs[names.index(one)]
        if one in names
        else torch.randn(theirs.shape[1], generator=keyed_generator("new class", one)) * theirs.std()
        for one in class_names
    ]
    value = torch.stack([*rows, theirs[-1]])
    told = f"rows of {len(known)} of {len(class_names)} classes taken by their names"
    new = [one for one in class_names if one not in names]
    if new:
        told += f"; {few(new, 3)} {'is' if len(new) == 1 else 'are'} new"
    return [(mine, value)], told


def _layers(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each layer, by their full names."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        layers.setdefault(name.rpartition(".")[0], {})[name] = value
    return layers


def _fits(mine: Tensor, theirs: Tensor) -> bool:
    return mine.shape == theirs.shape and mine.is_floating_point() == theirs.is_floating_point() and _plain(theirs)


def _plain(value: Tensor) -> bool:
    """Whether a tensor of a file is an ordinary dense one."""
    return value.layout is torch.strided and not (value.is_quantized or value.is_meta or value.is_complex())


def _reason(here: dict[str, Tensor], there: dict[str, Tensor]) -> str:
    """Why a layer starts as it was drawn."""
    for key, value in here.items():
        if key in there and there[key].shape != value.shape:
            return f"new: {_shape(value)} here, {_shape(there[key])} there"
    return "new: not there" if not there else "new: of another kind there"


def _shape(value: Tensor) -> str:
    return " x ".join(str(side) for side in value.shape) or "a number"


def _together(kinds: dict[str, str]) -> dict[str, str]:
    """Layers and what became of them, with one entry for the largest parts that were taken whole."""
    told: dict[str, str] = {}
    for name, what in kinds.items():
        parts = name.split(".")
        for depth in range(1, len(parts)):
            part = ".".join(parts[:depth])
            inside = [kind for one, kind in kinds.items() if one == part or one.startswith(f"{part}.")]
            if what == "taken" and all(kind == "taken" for kind in inside):
                told[part] = f"taken, {counted(len(inside), 'layer')}"
                break
        else:
            told[name] = what
    return told


def _tensors(state: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """A state dict, whose values are tensors by names."""
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path} is no sound checkpoint: its weights hold {name!r}, which is no tensor by a name.")
    return dict(state)


def _given(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if value is not None}
