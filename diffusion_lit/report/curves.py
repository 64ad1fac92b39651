"""Curves of what a run logged, one figure for each quantity, so that they fit on a narrow screen too."""

import re
from dataclasses import dataclass, field

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from diffusion_lit.report.events import History

SPLITS = ("train", "val", "test")
TITLES = {
    "loss": "Loss",
    "accuracy": "Accuracy",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "kl": "KL divergence",
    "kl_bits_per_dim": "KL divergence in bits per dimension",
    "active_channels": "Active channels of the latents",
    "bits_per_dim": "Bits per dimension",
    "images_per_second": "Training speed",
    "lr": "Learning rate",
    "loss_by_sigma": "Validation loss at fixed noise levels",
}
UNITS = {"psnr": "dB", "images_per_second": "images/s", "kl": "nats", "kl_bits_per_dim": "bits per dimension"}
LAST = ("lr", "images_per_second")  # shown last
UNSEEN = ("epoch", "hp_metric")


@dataclass
class Panel:
    """One quantity.

    Args:
        name: Its name, without the split.
        tags: The tags that belong to it, in order, with the label of each.
        floor: The tag of the value of real images against real ones, or None.
    """

    name: str
    tags: dict[str, str] = field(default_factory=dict)
    floor: str | None = None


def panels(history: History) -> list[Panel]:
    """Groups what was logged into quantities: the splits of one together, the noise levels, a distance and its floor.

    Returns:
        The loss first, learning rate and speed last.
    """
    found: dict[str, Panel] = {}
    floors = [tag for tag in history.scalars if tag.endswith("_floor")]
    for tag in history.scalars:
        if tag in UNSEEN or tag in floors:
            continue
        prefix, _, rest = tag.partition("/")
        if prefix in SPLITS:
            name, label = rest, prefix
        elif prefix == "loss_by_sigma":
            name, label = prefix, f"sigma {rest}"
        elif re.fullmatch(r"lr-.+", tag):
            name, label = "lr", tag[3:]
        else:
            name, label = tag, tag
        found.setdefault(name, Panel(name)).tags[tag] = label
        stem = re.sub(r"^r(?=f[id]d?_)", "", name).rpartition("_")[0]  # of fd_classifier_1k and rfd_classifier_360
        near = [floor for floor in floors if stem and floor.startswith(f"{stem}_")]
        found[name].floor = next((floor for floor in near if floor == f"{name}_floor"), near[0] if near else None)
    order = ("loss", "loss_by_sigma")
    return sorted(
        found.values(),
        key=lambda panel: (panel.name in LAST, order.index(panel.name) if panel.name in order else 2, panel.name),
    )


def scales(panel: Panel, history: History) -> list[str]:
    """The scales in which a quantity is drawn.

    Returns:
        Of a loss "linear", and "log" where its values are positive; of a metric "log" where its values are positive and
        span a factor of ten; else "linear".
    """
    tags = [*panel.tags, *([] if panel.floor is None else [panel.floor])]
    values = np.concatenate([history.scalars[tag][1] for tag in tags])
    values = values[np.isfinite(values)]
    if panel.name in LAST or not len(values) or values.min() <= 0:
        return ["linear"]
    if "loss" in panel.name:
        return ["linear", "log"]
    return ["log"] if values.max() > 10 * values.min() else ["linear"]


def draw(panel: Panel, history: History, scale: str = "linear") -> Figure:
    """Draws one quantity against the training step.

    Args:
        panel: The quantity.
        history: What was logged.
        scale: Scale of its axis, "linear" or "log".
    """
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.subplots()
    tags = sorted(panel.tags, key=_order)
    for index, tag in enumerate(tags):
        steps, values = history.scalars[tag]
        color = f"C{index}" if panel.name != "loss_by_sigma" else _shade(index, len(tags))
        if len(values) > 60:  # the values of single steps are noise: the running mean is drawn in front of them
            axes.plot(steps, values, linewidth=0.6, alpha=0.3, color=color)
            axes.plot(*_running_mean(steps, values), linewidth=1.6, label=panel.tags[tag], color=color)
        else:
            axes.plot(steps, values, marker="o", markersize=3.5, label=panel.tags[tag], color=color)
    if panel.floor is not None:
        axes.axhline(history.scalars[panel.floor][1][-1], linestyle="--", color="grey", label="real against real")
    axes.set(xlabel="training step", ylabel=UNITS.get(panel.name, panel.name), yscale=scale)
    axes.grid(alpha=0.3, which="both" if scale == "log" else "major")
    if len(tags) > 1 or panel.floor is not None:
        axes.legend(fontsize="small", ncols=2 if len(tags) > 4 else 1)
    return figure


def title(name: str) -> str:
    """A quantity in words.

    Args:
        name: Its name in the log.
    """
    if name.startswith(("fid_", "fd_", "rfid_", "rfd_")):
        of = "reconstructions" if name.startswith("r") else "samples"
        return f"Fréchet distance of {of}"
    return TITLES.get(name, name.replace("_", " ").capitalize())


def _order(tag: str) -> tuple[int, float, str]:
    """Training before validation before test; noise levels by size."""
    prefix, _, rest = tag.partition("/")
    level = float(rest) if re.fullmatch(r"[\d.e+-]+", rest) else 0.0
    return (SPLITS.index(prefix) if prefix in SPLITS else 0, level, tag)


def _shade(index: int, count: int) -> str:
    """A colour of a row from blue (little noise) to orange (much)."""
    share = index / max(1, count - 1)
    low, high = np.array([0.13, 0.35, 0.65]), np.array([0.95, 0.55, 0.15])
    return to_hex(low + share * (high - low))


def _running_mean(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean over a window of a thirtieth of the run; what is not finite is left out."""
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    window = min(len(values), max(3, len(values) // 30))
    if not window:
        return steps, values
    kernel = np.full(window, 1 / window)
    return np.convolve(steps, kernel, "valid"), np.convolve(values, kernel, "valid")
