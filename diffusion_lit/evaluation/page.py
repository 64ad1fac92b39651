"""A receipt as a page to read: tables of the figures, and a plot of quality against cost."""

from typing import Any

from matplotlib.figure import Figure

from diffusion_lit.evaluation.metrics import short_count

LOWER_IS_BETTER = ("fid_", "fd_", "kid_", "kd_")


def shown(value: dict[str, Any], name: str) -> str:
    """A figure as text: mean ± standard deviation, and the minimum of distances.

    Args:
        value: As from `receipt.summarise`.
        name: Name of the figure.

    Returns:
        Four significant digits.
    """
    if value["std"] is None:
        return f"{value['mean']:.4g}"
    least = f" (min {value['min']:.4g})" if name.startswith(LOWER_IS_BETTER) else ""
    return f"{value['mean']:.4g} ± {value['std']:.2g}{least}"


def setting_name(result: dict[str, Any]) -> str:
    """A setting in a few words.

    Args:
        result: One entry of the report's results.

    Returns:
        Such as `heun, 18 steps, cfg 1.5`.
    """
    sampling = result["sampling"]
    name = f"{sampling['sampler']}, {sampling['num_steps']} steps"
    return name + (f", cfg {sampling['cfg_scale']:g}" if result["conditional"] else "")


def table(report: dict[str, Any]) -> list[str]:
    """The figures as Markdown tables, one per reference, the floor as the last row.

    Args:
        report: The report.

    Returns:
        Lines.
    """
    lines: list[str] = []
    for name, reference in report["references"].items():
        figures = list(next(iter(report["results"]))["references"][name]["figures"])
        lines += [f"### Against {name}", "", "| setting | NFE | " + " | ".join(figures) + " |"]
        lines += ["| --- | ---: |" + " ---: |" * len(figures)]
        for result in report["results"]:
            values = result["references"][name]["figures"]
            cells = [shown(values[figure], figure) for figure in figures]
            lines.append(f"| {setting_name(result)} | {result['nfe']} | " + " | ".join(cells) + " |")
        floor = reference.get("floor")
        if floor:
            cells = [
                shown(floor["figures"][figure], figure) if figure in floor["figures"] else "" for figure in figures
            ]
            lines.append(f"| real against real, n = {floor['count']:,} | | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def single_image_table(report: dict[str, Any]) -> list[str]:
    """The figures of a model of one picture.

    Args:
        report: The report.

    Returns:
        Lines of Markdown; none for other models.
    """
    found = [result for result in report["results"] if "single_image" in result]
    if not found:
        return []
    figures = list(found[0]["single_image"])
    lines = ["### Against the one training picture", "", "| setting | NFE | " + " | ".join(figures) + " |"]
    lines.append("| --- | ---: |" + " ---: |" * len(figures))
    for result in found:
        cells = [f"{value:.4g}" for value in result["single_image"].values()]
        lines.append(f"| {setting_name(result)} | {result['nfe']} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def per_class_table(report: dict[str, Any]) -> list[str]:
    """The Fréchet distance of each class, a row per setting and reference.

    Args:
        report: The report.

    Returns:
        Lines of Markdown; none where it was not asked for.
    """
    lines: list[str] = []
    metric = report["extractor"]["metric"]
    for result in report["results"]:
        for name, classes in result.get("per_class", {}).items():
            if not lines:
                lines = [f"### {metric} of each class", "", "| setting | against | " + " | ".join(classes) + " |"]
                lines.append("| --- | --- |" + " ---: |" * len(classes))
            cells = [
                f"{entry[metric]:.4g} (n = {entry['generated']:,})" if metric in entry else "too few"
                for entry in classes.values()
            ]
            lines.append(f"| {setting_name(result)} | {name} | " + " | ".join(cells) + " |")
    return [*lines, ""] if lines else []


def memorization_table(report: dict[str, Any]) -> list[str]:
    """Whether training pictures are repeated, a row per setting and space.

    Args:
        report: The report.

    Returns:
        Lines of Markdown; none where it was not asked for.
    """
    lines: list[str] = []
    for result in report["results"]:
        found = result.get("memorization")
        if not found:
            continue
        lines = lines or [
            "### Memorisation",
            "",
            "r is the distance to the nearest training picture over that to the nearest held-out one. A copy has an r "
            "too small to occur once by chance; p is the probability of so many samples below the held-out 1% "
            "quantile.",
            "",
            "| setting | space | copies | below the quantile | by chance | p | nearest is training | by chance | "
            "verdict |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        ]
        for space, figures in found["spaces"].items():
            cells = [
                setting_name(result),
                space,
                f"{figures['copies']:,} ({figures['share_of_copies']:.2%})",
                f"{figures['share_below_quantile']:.2%}",
                f"{figures['share_below_quantile_by_chance']:.2%}",
                f"{figures['p_value']:.2g}",
                f"{figures['nearest_is_training']:.1%}",
                f"{figures['nearest_is_training_by_chance']:.1%}",
                "memorised" if figures["memorised"] else "not memorised",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""] if lines else []


def markdown(report: dict[str, Any]) -> str:
    """The report as a page.

    Args:
        report: The report.

    Returns:
        Markdown.
    """
    checkpoint, extractor, samples = report["checkpoint"], report["extractor"], report["samples"]
    lines = [f"# Evaluation of {checkpoint['file']}", ""]
    if report["references"]:
        lines += [
            f"{samples['num_blocks']} block(s) of {samples['num_samples']:,} samples "
            f"({extractor['metric']}_{short_count(samples['num_samples'])}): mean ± standard deviation over the blocks "
            "(minimum).",
            "",
            *table(report),
        ]
    lines += [*single_image_table(report), *per_class_table(report), *memorization_table(report)]
    if "likelihood" in report:
        likelihood = report["likelihood"]
        lines += [
            f"Likelihood: {likelihood['bits_per_dim']:.4f} ± {likelihood['standard_error']:.4f} bits per dimension "
            f"over {likelihood['count']:,} pictures of {likelihood['split']}.",
            "",
        ]
    if report["warnings"]:
        lines += ["## Warnings", "", *[f"- {warning}" for warning in report["warnings"]], ""]
    lines += ["## Receipt", ""]
    for key in ("checkpoint", "data", "extractor", "samples", "versions", "run"):
        lines.append(f"- {key}: {_listed(report[key])}")
    for name, reference in report["references"].items():
        lines.append(f"- reference {name}: {_listed(reference['record'])}")
    for result in report["results"]:
        facts = {**result["sampling"], "nfe": result["nfe"], "network_forwards": result["network_forwards"]}
        lines.append(f"- sampling {setting_name(result)}: {_listed(facts)}")
    return "\n".join(lines) + "\n"


def _listed(values: dict[str, Any]) -> str:
    """Names and values in one line."""
    return "; ".join(f"{name} {value}" for name, value in values.items())


def plot(report: dict[str, Any]) -> Figure:
    """Quality against NFE: one panel per reference, one line per sampler and guidance.

    Args:
        report: The report.

    Returns:
        The figure.
    """
    metric = report["extractor"]["metric"]
    names = list(report["references"])
    figure = Figure(figsize=(5.5 * len(names), 4), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        lines: dict[str, list[tuple[int, float, float]]] = {}
        for result in report["results"]:
            value = result["references"][name]["figures"][metric]
            guidance = f", cfg {result['sampling']['cfg_scale']:g}" if result["conditional"] else ""
            label = result["sampling"]["sampler"] + guidance
            lines.setdefault(label, []).append((result["nfe"], value["mean"], value["std"] or 0.0))
        for label, points in lines.items():
            calls, means, deviations = zip(*sorted(points), strict=True)
            panel.errorbar(calls, means, deviations, marker="o", capsize=3, label=label)
        floor = report["references"][name].get("floor")
        if floor:
            value = floor["figures"][metric]["mean"]
            panel.axhline(value, linestyle="--", color="grey", label=f"real against real, n = {floor['count']:,}")
        panel.set(xlabel="NFE (denoiser calls per sample)", ylabel=metric, title=f"against {name}", yscale="log")
        panel.legend()
    return figure
