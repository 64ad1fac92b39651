"""What studies show: rows of images with names, and tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from diffusion_lit.report.images import grid_image


def image_rows(rows: Mapping[str, Tensor], columns: Sequence[str] | None = None, width: float = 10) -> Figure:
    """Rows of images with a name before each.

    Args:
        rows: Images (N, C, H, W) by the row's name, uint8 or float in [-1, 1]; as many in each row.
        columns: Titles of the N columns.
        width: Width of the figure in inches.

    Returns:
        The figure.
    """
    count = len(next(iter(rows.values())))
    figure: Figure
    figure, panels = plt.subplots(
        len(rows), 1, figsize=(width, 0.25 + len(rows) * 0.8 * width / count), layout="constrained", squeeze=False
    )
    for axes, (name, images) in zip(panels[:, 0], rows.items(), strict=True):
        row = grid_image(images / 127.5 - 1 if images.dtype == torch.uint8 else images, count)
        axes.imshow(row, cmap="gray", interpolation="nearest")
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        axes.set_yticks([])
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
    if columns is not None:
        top = panels[0, 0]
        top.xaxis.tick_top()
        top.set_xticks([(index + 0.5) * row.width / count for index in range(count)], columns)
        top.tick_params(length=0)
    return figure


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table in Markdown, numbers to the right.

    Args:
        rows: Values by column; all of the same columns.

    Returns:
        Its lines.
    """
    header = list(rows[0])
    numbers = [all(isinstance(row[column], int | float | None) for row in rows) for column in header]
    lines = [header, ["---:" if number else "---" for number in numbers]]
    lines += [[shown(row[column]) for column in header] for row in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def shown(value: Any) -> str:
    """A value as it stands in a table: a float with four digits, None as nothing."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
