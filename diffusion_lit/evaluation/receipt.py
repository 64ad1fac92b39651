"""Receipts: what was measured, with everything that would change it, as JSON and as a page to read.

The JSON is a function of the checkpoint, the options and the libraries; when and where it was made stands apart under
`run`, so that a repeated evaluation gives the same report but for that.
"""

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from diffusion_lit.evaluation.metrics import mean_and_deviation
from diffusion_lit.evaluation.page import markdown, plot


def summarise(blocks: Sequence[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Figures of several blocks as mean, standard deviation, minimum and the values themselves.

    Args:
        blocks: Figures by name, one dictionary per block.

    Returns:
        For each name `mean`, `std` (None for one block), `min` and `blocks`.
    """
    summary = {}
    for name in blocks[0]:
        values = [block[name] for block in blocks]
        mean, deviation = mean_and_deviation(values)
        summary[name] = {"mean": mean, "std": deviation, "min": min(values), "blocks": values}
    return summary


def versions() -> dict[str, str | None]:
    """Versions of what computes the figures.

    Returns:
        Version by name; None for what is not installed as a package.
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "torch-fidelity", "numpy", "scipy", "lightning", "diffusion-lit"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["commit"] = commit()
    return found


def commit() -> str | None:
    """The commit of the source tree, with `+` where it was changed since.

    Returns:
        Its hash, or None where the package does not lie in a git checkout.
    """
    here = Path(__file__).resolve().parent
    try:
        options: dict[str, Any] = {"cwd": here, "capture_output": True, "text": True, "timeout": 10, "check": True}
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **options).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}{'+' if changed else ''}"


def hardware(device: torch.device, ranks: int) -> dict[str, Any]:
    """What the samples were made on.

    Args:
        device: The device of rank 0.
        ranks: Number of processes.

    Returns:
        Name of the processor and numbers of ranks and threads.
    """
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {"device": device.type, "processor": name, "ranks": ranks, "threads": torch.get_num_threads()}


def write_report(report: dict[str, Any], path: Path) -> list[Path]:
    """Writes the receipt as JSON and Markdown, and a plot where there are several settings.

    Args:
        report: The report.
        path: The JSON file; the others lie beside it.

    Returns:
        What was written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path, path.with_suffix(".md")]
    if len(report["results"]) > 1 and any(result.get("references") for result in report["results"]):
        written.append(path.with_suffix(".png"))
        plot(report).savefig(written[-1], dpi=150)
    path.write_text(json.dumps(report, indent=2, sort_keys=False, allow_nan=True) + "\n")
    written[1].write_text(markdown(report))
    return written
