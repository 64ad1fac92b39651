"""The figures of a receipt as tables."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from diffusion_lit.evaluation.memorization import SIGNIFICANT
from diffusion_lit.words import counted

LOWER_IS_BETTER = ("fid_", "fd_", "kid_", "kd_", "mmd_", "rfid_", "rfd_")


def shown(value: dict[str, Any], name: str) -> str:
    """A figure as text: mean ± error (of older reports the standard deviation), and the minimum of distances.

    Args:
        value: As from `receipt.summarise`.
        name: Name of the figure.
    """
    bar = value["std"] if value.get("error") is None else value["error"]
    if bar is None:
        return f"{value['mean']:.4g}"
    several = name.startswith(LOWER_IS_BETTER) and value["std"] is not None
    least = f" (min {value['min']:.4g})" if several else ""
    return f"{value['mean']:.4g} ± {bar:.2g}{least}"


def setting_name(result: dict[str, Any]) -> str:
    """A setting in a few words.

    Args:
        result: One entry of the report's results.

    Returns:
        Such as `heun, 18 steps, cfg 1.5`.
    """
    sampling = result["sampling"]
    steps = sampling["num_steps"]
    name = f"{sampling['sampler']}, {steps} {'step' if steps == 1 else 'steps'}"
    return name + guidance_name(result)


def guidance_name(result: dict[str, Any]) -> str:
    """The guidance of a setting in a few words, after a comma; nothing where there is none."""
    sampling = result["sampling"]
    name = f", cfg {sampling['cfg_scale']:g}" if result["conditional"] else ""
    return name + (f", guide {sampling['guide_scale']:g}" if sampling.get("guide_ckpt") else "")


class Table(NamedTuple):
    """A table of figures.

    Args:
        title: Its title.
        note: What a reader must know, or nothing.
        words: Number of columns on the left that hold words; those after them hold figures.
        header: Titles of the columns.
        rows: Cells as text.
        closing: Number of columns on the right that hold words.
    """

    title: str
    note: str
    words: int
    header: list[str]
    rows: list[list[str]]
    closing: int = 0

    def markdown(self) -> list[str]:
        """The table in Markdown."""
        figures = len(self.header) - self.words - self.closing
        rule = ["---"] * self.words + ["---:"] * figures + ["---"] * self.closing
        note = [self.note, ""] if self.note else []
        return [f"### {self.title}", "", *note, *(_line(cells) for cells in (self.header, rule, *self.rows)), ""]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plain_table(rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal, its first column to the left and the others to the right.

    Args:
        rows: The cells, the header first.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def tables(report: dict[str, Any]) -> list[Table]:
    """All figures of a report.

    Returns:
        A table per reference, the floor as its last row, and those of what else was asked for.
    """
    others = (
        single_image_table(report),
        per_class_table(report),
        memorization_table(report),
        reconstruction_table(report),
    )
    return [*reference_tables(report), *(table for table in others if table.rows)]


def reference_tables(report: dict[str, Any]) -> list[Table]:
    """The figures against each reference.

    Returns:
        A table per reference, a row per setting and the floor as the last.
    """
    found = []
    for name, reference in report["references"].items():
        figures = list(next(iter(report["results"]))["references"][name]["figures"])
        rows = []
        for result in report["results"]:
            values = result["references"][name]["figures"]
            cells = [shown(values[figure], figure) for figure in figures]
            rows.append([setting_name(result), str(result["nfe"]), *cells])
        floor = reference.get("floor")
        if floor:
            cells = [
                shown(floor["figures"][figure], figure) if figure in floor["figures"] else "" for figure in figures
            ]
            rows.append([f"real against real, n = {floor['count']:,}", "", *cells])
        found.append(Table(f"Against {name}", "", 1, ["setting", "NFE", *figures], rows))
    return found


def single_image_table(report: dict[str, Any]) -> Table:
    """The figures of a model of one image.

    Returns:
        A row per setting; none for other models.
    """
    found = [result for result in report["results"] if "single_image" in result]
    rows = [
        [setting_name(result), str(result["nfe"]), *(f"{value:.4g}" for value in result["single_image"].values())]
        for result in found
    ]
    figures = list(found[0]["single_image"]) if found else []
    return Table("Against the one training image", "", 1, ["setting", "NFE", *figures], rows)


def per_class_table(report: dict[str, Any]) -> Table:
    """The Fréchet distance of each class.

    Returns:
        A row per setting and reference; none where it was not asked for.
    """
    rows: list[list[str]] = []
    names: list[str] = []
    metric = report["extractor"]["metric"]
    for result in report["results"]:
        for name, classes in result.get("per_class", {}).items():
            names = names or list(classes)
            cells = [
                f"{entry[metric]:.4g} (n = {entry['generated']:,})" if metric in entry else "too few"
                for entry in classes.values()
            ]
            rows.append([setting_name(result), name, *cells])
    return Table(f"{metric} of each class", "", 2, ["setting", "against", *names], rows)


def verdict(figures: dict[str, Any]) -> str:
    """What figures of memorisation say, where the images are enough for them to say anything."""
    if figures["memorised"]:
        return "memorised"
    return "not memorised" if figures.get("smallest_p_value", 0) < SIGNIFICANT else "too few images to tell"


def memorization_table(report: dict[str, Any]) -> Table:
    """Whether training images are repeated.

    Returns:
        A row per setting and space; none where it was not asked for.
    """
    rows = []
    for result in report["results"]:
        for space, figures in result.get("memorization", {}).get("spaces", {}).items():
            cells = [
                setting_name(result),
                space,
                f"{figures['copies']:,} ({figures['share_of_copies']:.2%})",
                f"{figures['share_below_quantile']:.2%}",
                f"{figures['share_below_quantile_by_chance']:.2%}",
                f"{figures['p_value']:.2g}",
                f"{figures['nearest_is_training']:.1%}",
                f"{figures['nearest_is_training_by_chance']:.1%}",
                verdict(figures),
            ]
            rows.append(cells)
    note = (
        "r is the distance to the nearest training image over that to the nearest held-out one. A copy has an r too "
        "small to occur once by chance; p is the probability of so many samples below the held-out 1% quantile."
    )
    counts = ["copies", "below the quantile", "by chance", "p", "nearest is training", "by chance"]
    return Table("Memorisation", note, 2, ["setting", "space", *counts, "verdict"], rows, closing=1)


def reconstruction_table(report: dict[str, Any]) -> Table:
    """Quality of reconstructions of held-out images.

    Returns:
        Rows of reconstructions, the floor and unrelated images; none where they were not measured.
    """
    found = report.get("reconstruction")
    if found is None:
        return Table("Reconstructions", "", 1, [], [])
    figures = list(found["reconstructions"])
    names = {"reconstructions": "reconstructions", "floor": "the images themselves", "unrelated": "another image"}
    rows = [[title, *(shown(found[name][figure], figure) for figure in figures)] for name, title in names.items()]
    note = (
        f"{counted(found['blocks'], 'block')} of {counted(found['count'], 'image')} of {found['split']}; the "
        f"Fréchet distance is to {found['reference']}. Side by side in {found['images']}."
    )
    return Table("Reconstructions", note, 1, ["in the place of an image", *figures], rows)
