"""A receipt as a page to read, and its plot of quality against cost; the tables are in `receipt_tables`."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from diffusion_lit.report.facts import begun_from
from diffusion_lit.report.receipt_tables import guidance_name, setting_name, tables
from diffusion_lit.words import counted, short_count


def attributed(warnings: dict[str, list[str]]) -> list[str]:
    """Warnings with the settings, or the references, that they belong to.

    Args:
        warnings: What to warn of by the name of a setting or reference.

    Returns:
        Each warning once, after the names of all that it belongs to; after none where there is but one.
    """
    owners: dict[str, list[str]] = {}
    for name, said in warnings.items():
        for warning in dict.fromkeys(said):
            owners.setdefault(warning, []).append(name)
    return [warning if len(warnings) == 1 else f"{'; '.join(names)}: {warning}" for warning, names in owners.items()]


def likelihood_sentence(report: dict[str, Any]) -> str | None:
    """The likelihood in words.

    Returns:
        A sentence, or None where it was not asked for.
    """
    if "likelihood" not in report:
        return None
    likelihood = report["likelihood"]
    error = "" if likelihood["standard_error"] is None else f" ± {likelihood['standard_error']:.4f}"
    return (
        f"Likelihood: {likelihood['bits_per_dim']:.4f}{error} bits per dimension over "
        f"{counted(likelihood['count'], 'image')} of {likelihood['split']}."
    )


def blocks_sentence(report: dict[str, Any]) -> str:
    """How many samples the figures are taken over."""
    extractor, samples = report["extractor"], report["samples"]
    return (
        f"{counted(samples['num_blocks'], 'block')} of {samples['num_samples']:,} samples "
        f"({extractor['metric']}_{short_count(samples['num_samples'])}): mean ± error (minimum). The error is how much "
        "one block's figure would scatter if samples and reference were both drawn anew."
    )


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    lines = [f"# Evaluation of {report['checkpoint']['file']}", ""]
    if report["references"]:
        lines += [blocks_sentence(report), ""]
    lines += [line for table in tables(report) for line in table.markdown()]
    likelihood = likelihood_sentence(report)
    if likelihood:
        lines += [likelihood, ""]
    if report["warnings"]:
        lines += ["## Warnings", "", *[f"- {warning}" for warning in report["warnings"]], ""]
    lines += ["## Receipt", ""]
    checkpoint = {key: value for key, value in report["checkpoint"].items() if key != "init_from"}
    begun = begun_from(report["checkpoint"].get("init_from"))
    lines.append(f"- checkpoint: {_listed(checkpoint)}{f'. {begun}' if begun else ''}")
    for key in (*(["guide"] if "guide" in report else []), "data", "extractor", "samples", "versions", "run"):
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
    """Quality against NFE: one panel per reference, one line per sampler and guidance."""
    metric = report["extractor"]["metric"]
    names = list(report["references"])
    figure = Figure(figsize=(5.5 * len(names), 4), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        lines: dict[str, list[tuple[int, float, float]]] = {}
        for result in report["results"]:
            value = result["references"][name]["figures"][metric]
            label = result["sampling"]["sampler"] + guidance_name(result)
            bar = value.get("error") or value["std"] or 0.0
            lines.setdefault(label, []).append((result["nfe"], value["mean"], bar))
        for label, points in lines.items():
            calls, means, deviations = zip(*sorted(points), strict=True)
            panel.errorbar(calls, means, deviations, marker="o", capsize=3, label=label)
        floor = report["references"][name].get("floor")
        if floor:
            value = floor["figures"][metric]["mean"]
            panel.axhline(value, linestyle="--", color="grey", label=f"real against real, n = {floor['count']:,}")
        panel.set(xlabel="NFE (denoiser calls per sample)", ylabel=metric, title=f"against {name}", yscale="log")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.legend()
    return figure
