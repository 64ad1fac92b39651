"""Messages of `fit` when a run is resumed: settings that differ from the checkpoint's, and state that does not fit."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from diffusion_lit.callbacks.resume import ABSENT, differences, flat

PRECISIONS = ("None", "32-true", "32", "bf16-mixed", "bf16", "16-mixed", "16")


def line(key: str, old: Any, new: Any, counts: str = "this run's") -> str:
    """A difference in words.

    Args:
        key: The setting, as an option names it.
        old: Its value in the checkpoint.
        new: Its value in this run.
        counts: Whose value holds.

    Returns:
        A line.
    """
    values = [value if value is ABSENT else repr(value).removesuffix(".0") for value in (old, new)]
    return f"{key}: {values[0]} in the checkpoint, {values[1]} in this run; {counts} counts."


def differing_lines(path: str, before: dict[str, Any], now: dict[str, Any], same_weights: bool = False) -> list[str]:
    """A line for each setting that differs.

    Args:
        path: The checkpoint.
        before: Its settings by their part of the configuration; "precision" is the trainer's.
        now: Those of this run.
        same_weights: Whether both networks have weights of the same names and shapes: the levels with attention are
            then the same, by whatever number the configuration calls them, and arguments that the checkpoint does not
            know, since they came later, add nothing.

    Returns:
        Lines, sorted by the setting.

    Raises:
        ValueError: If the checkpoint is of another model, network or optimizer, which its state does not fit.
    """
    for part, key in (("model", "_class_path"), ("optimizer", "optimizer.class_path")):
        old, new = (str(flat(values["model"]).get(key, "")) for values in (before, now))
        if old and new and not _same_class(old, new):
            trains = "trains" if part == "model" else "trains with"
            raise ValueError(
                f"The checkpoint {path} was made by {_short(old)}, but this run {trains} {_short(new)}, which cannot "
                f"go on from its state; use the {part} that it was trained with."
            )
    lines = []
    for part in now.keys() & before.keys() - {"precision"}:
        for key, old, new in differences(before[part], now[part]):
            later = old is ABSENT or key == "net.attention_resolutions"  # an argument that came after the checkpoint
            if part == "model" and key.startswith("net.") and later and same_weights:
                continue
            if part == "model" and key.startswith("net."):
                raise ValueError(
                    f"The checkpoint {path} was trained with model.{key} = {old!r}, but this run says {new!r}; its "
                    "weights do not fit. Use the configuration that it was trained with."
                )
            lines.append(line(f"{part}.{key}".replace("._class_path", ".class_path"), old, new))
    if before["precision"] != now["precision"]:
        lines.append(line("trainer.precision", before["precision"], now["precision"]))
    return sorted(lines)


def _short(class_path: str) -> str:
    return class_path.rpartition(".")[2]


def _same_class(one: str, other: str) -> bool:
    """Whether two full names mean one class, as `torch.optim.Adam` and `torch.optim.adam.Adam` do; imports nothing."""
    return (one.partition(".")[0], _short(one)) == (other.partition(".")[0], _short(other))


def names_seed(typed: Sequence[str], configs: Iterable[Any]) -> bool:
    """Whether the user gave a seed.

    Args:
        typed: The command line.
        configs: Configuration files that were given.

    Returns:
        Whether it stands in one of them.
    """
    if any(arg.partition("=")[0] == "--seed_everything" for arg in typed):
        return True
    texts = [Path(str(file)).read_text() for file in configs if Path(str(file)).is_file()]
    return any(re.search(r"^seed_everything\s*:", text, re.MULTILINE) for text in texts)


def refuse_precision(config: dict[str, Any]) -> None:
    """Refuses a precision in which the weights themselves, and so their average, are not in float32.

    Args:
        config: The trainer's configuration, its plugins a list.

    Raises:
        ValueError: If it is one.
    """
    asked = [config.get("precision"), *(getattr(plugin, "precision", None) for plugin in config["plugins"])]
    for precision in asked:
        if str(precision) not in PRECISIONS:
            raise ValueError(
                f"trainer.precision is {precision!r}, but weights and their average are kept in float32 here, since "
                "small steps are lost in 16 bits and figures need no 64; choose bf16-mixed, 16-mixed or 32-true."
            )


def say(*lines: str) -> None:
    """Prints lines, on rank 0.

    Args:
        lines: The lines.
    """
    if getattr(rank_zero_only, "rank", None) in (None, 0) and lines:
        print("\n".join(lines))
