"""The network's input: a grid of augmented training images, and the EDM settings that the data suggests.

    python -m experiments.look_at_data --config configs/edm_cifar10.yaml
    python -m experiments.look_at_data --config configs/edm_folder.yaml --data.init_args.root=my_images

EDM (Karras 2022, arXiv 2206.00364) scales the network's input and target with sigma_data, the standard deviation of the
data, and draws training noise from ln(sigma) ~ N(P_mean, P_std²). Its values (0.5, -1.2, 1.2) are for photographs of 32
to 64 pixels. For other data:

    sigma_data = standard deviation of all values about the mean of their channel, in [-1, 1]
    P_mean     = -1.2 + ln(sigma_data / 0.5) + ln(max(1, size / 64))
    P_std      = 1.2

The first shift is exact: data scaled by a factor, and noise with it, is the same problem. The second keeps the blur of
large shapes alike when there are more pixels to average over (Hoogeboom 2023, arXiv 2301.11093, section 3.1; Chen 2023,
arXiv 2301.10972), and is a start, not a law: the loss by noise level that training logs shows where the network learns.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor

from datamodules import ImageDataModule
from datamodules.loaders import Array, normalise
from diffusion_lit.commands.configs import find_config
from diffusion_lit.report.images import grid_image
from diffusion_lit.runtime.stopping import end

ROWS = 4096  # images that are in memory at once


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each channel, and of all values about their channel's mean, in [-1, 1]."""

    mean: list[float]
    std: list[float]
    sigma_data: float
    count: int


class Suggestion(NamedTuple):
    """EDM's settings for a data set."""

    sigma_data: float
    P_mean: float
    P_std: float


def statistics(images: Array) -> Statistics:
    """Measures a set of images.

    Args:
        images: uint8 (N, C, H, W).

    Returns:
        Its statistics, accumulated in float64.
    """
    total, squares, count = torch.zeros(()), torch.zeros(()), 0
    for start in range(0, len(images), ROWS):
        part = images[start : start + ROWS]
        values = normalise(part if isinstance(part, Tensor) else torch.tensor(part)).double()
        total = total + values.sum((0, 2, 3))
        squares = squares + values.square().sum((0, 2, 3))
        count += values[:, 0].numel()
    mean = total / count
    variance = squares / count - mean.square()
    return Statistics(
        mean.tolist(), variance.clamp(min=0).sqrt().tolist(), math.sqrt(max(0.0, float(variance.mean()))), len(images)
    )


def suggest(sigma_data: float, size: int) -> Suggestion:
    """EDM's settings for data of a given spread and size.

    Args:
        sigma_data: Standard deviation of the data, above 0.
        size: Pixels per side.

    Raises:
        ValueError: If all images are alike.
    """
    if sigma_data <= 0:
        raise ValueError("All values of the data are alike, so there is nothing to learn; look at the images.")
    return Suggestion(sigma_data, -1.2 + math.log(sigma_data / 0.5) + math.log(max(1.0, size / 64)), 1.2)


def fed(data: ImageDataModule, count: int) -> tuple[Tensor, list[str]]:
    """The first images of an epoch as training sees them.

    Args:
        data: The data module, prepared.
        count: How many are wanted; fewer where an epoch has fewer.

    Returns:
        Images (count, C, H, W) in [-1, 1], and the name of each one's class where there are classes.
    """
    images: list[Tensor] = []
    names: list[str] = []
    for batch in data.train_dataloader():
        images.append(batch["image"].cpu())
        names += [data.class_names[label] for label in batch.get("label", torch.tensor([])).tolist()]
        if sum(map(len, images)) >= count:
            break
    return torch.cat(images)[:count], names[:count]


def look_at_data(
    data: ImageDataModule, rows: int = 8, columns: int = 12, out: str = "runs/studies/look_at_data"
) -> None:
    """Draws what the network is fed, and prints statistics of the data with the EDM settings that they suggest.

    Args:
        data: The data module.
        rows: Rows of the grid.
        columns: Columns of the grid.
        out: Folder for grid.png.
    """
    data.prepare_data()
    data.setup("fit")
    images, names = fed(data, rows * columns)
    path = Path(out) / "grid.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    grid_image(images, columns).save(path)
    print(describe(data))
    if names:
        print("first row: ", ", ".join(names[:columns]))
    print("grid:      ", path)


def describe(data: ImageDataModule) -> str:
    """The statistics of a data module's training split, and what they suggest, as text."""
    held = data.reference_images("train")
    found = statistics(held)
    advice = suggest(found.sigma_data, data.image_shape[-1])
    counts = {split: len(data.split(split).images) for split in ("train", "val")}
    rms = math.sqrt(found.sigma_data**2 + sum(mean**2 for mean in found.mean) / len(found.mean))
    lines = [
        f"data:       {type(data).__name__}, {counts['train']} training and {counts['val']} validation images of "
        + "x".join(map(str, data.image_shape)),
        f"classes:    {data.num_classes or 'none'}"
        + (f" ({', '.join(data.class_names[:12])})" * bool(data.num_classes)),
        "mean:       " + ", ".join(f"{value:+.4f}" for value in found.mean) + "  per channel, values in [-1, 1]",
        "std:        "
        + ", ".join(f"{value:.4f}" for value in found.std)
        + f"  per channel (root mean square {rms:.4f})",
        "suggested for EDM, in place of 0.5, -1.2 and 1.2:",
        f"  sigma_data: {advice.sigma_data:.3f}",
        f"  P_mean:     {advice.P_mean:.2f}",
        f"  P_std:      {advice.P_std:.2f}",
    ]
    return "\n".join(lines)


def read_data_section(path: str) -> dict[str, Any]:
    """The `data:` section of an experiment's YAML.

    Raises:
        ValueError: If there is no such file or section.
    """
    try:
        config = yaml.safe_load(find_config(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(config, dict) or not isinstance(config.get("data"), dict):
        raise ValueError(f"{path} has no section `data:` with a class_path; give the config of an experiment.")
    return dict(config["data"])


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: The command line; the process's own by default.
    """
    rest = list(sys.argv[1:] if args is None else args)
    parser = ArgumentParser(prog="python -m experiments.look_at_data", allow_abbrev=False, description=__doc__)
    parser.add_argument("--config", type=str, help="An experiment's YAML, of which the section `data:` is read.")
    parser.add_function_arguments(look_at_data, fail_untyped=True)
    for position, argument in enumerate(rest):
        name, _, value = argument.partition("=")
        if name == "--config" and (value or position + 1 < len(rest)):
            try:
                parser.set_defaults({"data": read_data_section(value or rest[position + 1])})
            except ValueError as error:
                parser.error(str(error))
    options = parser.parse_args(rest)
    options.pop("config")
    try:
        look_at_data(**parser.instantiate(options).as_dict())
    except Exception as error:
        end(error, "look_at_data")


if __name__ == "__main__":
    main()
