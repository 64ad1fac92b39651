"""What studies show: rows of images with names, lines of measurements, and tables."""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter
from PIL import Image
from torch import Tensor

from diffusion_lit.diffusion.images import from_uint8
from diffusion_lit.report.images import titled_grid
from diffusion_lit.storage.atomic import atomic

DPI = 130  # of figures


def image_rows(rows: Mapping[str, Tensor], columns: Sequence[str] = ()) -> Image.Image:
    """Rows of images with a name before each.

    Args:
        rows: Images (N, C, H, W) by the row's name, uint8 or float in [-1, 1].
        columns: Titles of the columns.
    """
    scaled = (from_uint8(images) if images.dtype == torch.uint8 else images for images in rows.values())
    return titled_grid([list(images) for images in scaled], list(rows), columns)


def lines(
    rows: Sequence[Mapping[str, Any]],
    x: str,
    panels: Mapping[str, Sequence[str]],
    evaluator: Any,
    by: str = "",
    xlabel: str = "",
    log: bool = False,
) -> Figure:
    """Measurements against one of their columns; a Fréchet distance beside that of real images.

    Args:
        rows: Values by column.
        x: The column to the right; words stand in their order.
        panels: Columns of each panel, by what stands at its left.
        evaluator: The `Evaluator` that measured.
        by: A column that tells the lines apart; none for one line a column.
        xlabel: What stands below; the column's name by default.
        log: Whether that axis is logarithmic.
    """
    figure: Figure
    figure, grid = plt.subplots(
        1, len(panels), figsize=(0.5 + 4.3 * len(panels), 4), layout="constrained", squeeze=False
    )
    ticks = list(dict.fromkeys(row[x] for row in rows))
    for axes, (label, columns) in zip(grid[0], panels.items(), strict=True):
        groups = dict.fromkeys(row[by] if by else "" for row in rows)
        for group, marker in zip(groups, cycle("osD^vP*X<>h"), strict=False):
            own = [row for row in rows if not by or row[by] == group]
            for column in columns:
                named = group or (column if len(columns) > 1 else "samples")
                axes.plot([row[x] for row in own], [row[column] for row in own], marker=marker, label=named)
        axes.set(xlabel=xlabel or x, ylabel=label)
        if label == evaluator.metric:
            axes.set_yscale("log")
            for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                formatted(ScalarFormatter())
            evaluator.draw_floor(axes)
            low, high = axes.get_ylim()
            if high > 10 * low:  # where there is no room for a number at each tick
                axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        elif {"precision", "recall"}.issuperset(columns):
            axes.set_ylim(0, 1.02)
        if log:
            axes.set_xscale("log")
            axes.set_xticks(ticks, [shown(tick) for tick in ticks])
            axes.xaxis.set_minor_locator(NullLocator())
        if isinstance(ticks[0], str):
            axes.set_xticks(range(len(ticks)), ticks, rotation=35, ha="right")
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def keep_figure(path: Path, figure: Figure) -> None:
    """Writes a figure as an image, and closes it."""
    figure.savefig(path, dpi=DPI, bbox_inches="tight")
    plt.close(figure)


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table in Markdown, numbers to the right.

    Args:
        rows: Values by column, numbers or texts that may begin with one; a column that a row lacks is left empty.
    """
    header = list(rows[0])
    cells = [[shown(row.get(column)) for column in header] for row in rows]
    numbers = [all(re.match(r"[-+]?\d|nan|inf|$", cell) for cell in column) for column in zip(*cells, strict=True)]
    rule = ["---:" if number and place else "---" for place, number in enumerate(numbers)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *cells))


def keep_table(path: Path, rows: list[dict[str, Any]], more: Sequence[dict[str, Any]] = ()) -> None:
    """Writes a table as CSV and Markdown, and prints it.

    Args:
        path: Its files' name without ending.
        rows: Values by column; all of the same columns.
        more: Further rows of the Markdown, such as that of real images, which may lack columns.
    """
    header, told = list(rows[0]), markdown([*rows, *more])
    with path.with_name(f"{path.name}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *([row[column] for column in header] for row in rows)])
    path.with_name(f"{path.name}.md").write_text(told)
    print(told, end="", flush=True)


def keep_json(path: Path, value: Any) -> None:
    """Writes plain values as JSON, at once or not at all; folders are made."""
    with atomic(path) as file:
        file.write(f"{json.dumps(value, indent=2)}\n".encode())


def shown(value: Any) -> str:
    """A value as it stands in a table: a float with four digits, None as nothing."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
