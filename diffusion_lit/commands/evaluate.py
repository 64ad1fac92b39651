"""`diffusion-lit evaluate`: a checkpoint's figures, with a receipt."""

from functools import partial
from json import loads
from pathlib import Path
from typing import Any

from diffusion_lit.checks import check_count
from diffusion_lit.commands.evaluate_plan import Plan
from diffusion_lit.commands.evaluate_run import run
from diffusion_lit.diffusion.samplers import sampler_table
from diffusion_lit.report.receipt_page import likelihood_sentence
from diffusion_lit.report.receipt_tables import plain_table, tables
from diffusion_lit.runtime.ranks import fabric

help_notes = sampler_table  # below the help
WIDEST = 100  # characters of a table in a terminal; a wider one is laid on its side, where that is narrower


def evaluate(plan: Plan, devices: int = 1, strategy: str = "auto", json: bool = False) -> None:
    """Measures a checkpoint: Fréchet and kernel distance, precision, recall and more, with a receipt.

    Writes OUT (JSON) and a page beside it (.md). Draws NUM_BLOCKS disjoint blocks of NUM_SAMPLES samples with the
    average (EMA) weights and gives each figure's mean over the blocks, its error over draws of samples and reference,
    the minimum and the real-against-real floor. --sampler, --num_steps and --cfg_scale take lists, such as heun,ddim,
    and then there are a table and a plot of quality against cost (.png). Killed and started again, it goes on where it
    was. What is not given is as the model was trained to be sampled.

    Args:
        plan: The model, what is drawn, and what it is compared with.
        devices: Number of processes, one per device, that share the work; as many as torchrun has started.
        strategy: How processes are started: ddp, or ddp_fork within another Python program.
        json: Prints the report, and nothing else, on standard output, for a program.

    Raises:
        ValueError: If the checkpoint, data, extractor and options do not fit together, or weights are missing.
    """
    check_count(devices=devices)
    ranks = fabric(devices, plan.device, strategy)
    written = ranks.launch(partial(run, plan=plan))
    if ranks.is_global_zero and written:
        text = Path(written[0]).read_text()
        print(text if json else summary(loads(text), written))


def summary(report: dict[str, Any], written: list[str]) -> str:
    """The summary to print: the figures, the warnings, and where the rest is.

    Args:
        report: The report.
        written: The files.

    Returns:
        Lines.
    """
    lines = []
    for table in tables(report):
        rows = [table.header, *table.rows]
        ways = [plain_table(rows), plain_table(list(zip(*rows, strict=True)))]
        fits = _width(ways[0]) <= WIDEST
        lines += [table.title, ways[0] if fits else min(ways, key=_width), ""]
    likelihood = likelihood_sentence(report)
    lines += [likelihood] if likelihood else []
    lines += [f"warning: {warning}" for warning in report["warnings"]]
    return "\n".join([*lines, *(f"  {path}" for path in written)])


def _width(text: str) -> int:
    return max(map(len, text.splitlines()))
