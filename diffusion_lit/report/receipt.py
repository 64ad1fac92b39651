"""Receipts: what was measured, with everything that would change it, as JSON and as a page to read.

The JSON is a function of the checkpoint, the options and the libraries; when and where it was made stands apart under
`run`, so that a repeated evaluation gives the same report otherwise.
"""

import json
from pathlib import Path
from typing import Any

from diffusion_lit.report.receipt_page import markdown, plot


def write_report(report: dict[str, Any], path: Path) -> list[Path]:
    """Writes the receipt as JSON and Markdown, and a plot where there are several settings.

    Args:
        report: The report.
        path: The JSON file; the others lie beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path, path.with_suffix(".md")]
    if len(report["results"]) > 1 and any(result.get("references") for result in report["results"]):
        written.append(path.with_suffix(".png"))
        plot(report).savefig(written[-1], dpi=150)
    path.write_text(json.dumps(report, indent=2, sort_keys=False, allow_nan=False) + "\n")
    written[1].write_text(markdown(report))
    return written
