"""Messages of `fit` when a run is resumed: settings that differ from the checkpoint's, and state that does not fit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from diffusion_lit.callbacks.resume import ABSENT, differences, flat


@dataclass(frozen=True)
class Resumed:
    """The training that a checkpoint is of, as its records say.

    Args:
        path: The checkpoint.
        step: Its training step.
        seed: The seed, or None where it does not say.
        precision: The trainer's.
        settings: By part of the configuration.
        shapes: Of the weights by their names.
    """

    path: Path
    step: int
    seed: int | None
    precision: str
    settings: dict[str, Any]
    shapes: dict[str, Any]

    @staticmethod
    def of(checkpoint: dict[str, Any], path: Path) -> "Resumed":
        """Reads the records of a checkpoint."""
        settings = checkpoint.get("callbacks", {}).get("Resume", {}).get("settings")
        more = checkpoint.get("diffusion_lit", {})
        return Resumed(
            path,
            int(checkpoint.get("global_step", 0)),
            more.get("seed"),
            more.get("precision", "32-true"),
            {
                **(settings if isinstance(settings, dict) else {}),
                "model": checkpoint.get("hyper_parameters", {}),
                "data": checkpoint.get("datamodule_hyper_parameters", {}),
            },
            {name: value.shape for name, value in checkpoint["state_dict"].items()},
        )


def line(key: str, old: Any, new: Any, counts: str = "this run's") -> str:
    """A difference in words.

    Args:
        key: The setting, as an option names it.
        old: Its value in the checkpoint.
        new: Its value in this run.
        counts: Whose value holds.
    """
    values = [value if value is ABSENT else repr(value).removesuffix(".0") for value in (old, new)]
    return f"{key}: {values[0]} in the checkpoint, {values[1]} in this run; {counts} counts."


def differing_lines(resumed: Resumed, now: dict[str, Any], precision: str, same_weights: bool = False) -> list[str]:
    """A line for each setting that differs.

    Args:
        resumed: The training that is resumed.
        now: Settings of this run, by part of the configuration.
        precision: The trainer's.
        same_weights: Whether both networks have weights of the same names and shapes: the levels with attention are
            then the same, by whatever number the configuration calls them, and arguments that the checkpoint does not
            know, since they came later, add nothing.

    Returns:
        Lines, sorted by the setting.

    Raises:
        ValueError: If the checkpoint is of another model, network or optimizer, which its state does not fit.
    """
    path, before = resumed.path, resumed.settings
    for part, key in (("model", "_class_path"), ("optimizer", "optimizer.class_path")):
        old, new = (str(flat(values["model"]).get(key, "")) for values in (before, now))
        if old and new and not _same_class(old, new):
            trains = "trains" if part == "model" else "trains with"
            raise ValueError(
                f"The checkpoint {path} was made by {_short(old)}, but this run {trains} {_short(new)}, which cannot "
                f"go on from its state; use the {part} that it was trained with."
            )
    lines = []
    for part in now.keys() & before.keys():
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
    if resumed.precision != precision:
        lines.append(line("trainer.precision", resumed.precision, precision))
    return sorted(lines)


def _short(class_path: str) -> str:
    return class_path.rpartition(".")[2]


def _same_class(one: str, other: str) -> bool:
    """Whether two full names mean one class, as `torch.optim.Adam` and `torch.optim.adam.Adam` do; imports nothing."""
    return (one.partition(".")[0], _short(one)) == (other.partition(".")[0], _short(other))


@rank_zero_only
def say(*lines: str) -> None:
    """Prints lines, on rank 0."""
    if lines:
        print("\n".join(lines))
