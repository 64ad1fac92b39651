"""Every study in its small form, one after the other, and one page of what they found.

    make studies
    python -m experiments.studies --only schedules,variance

A study that fails does not stop the others; the exit status tells of it. Started again after an interruption, each goes
on where it was. The page, `runs/studies/index.html`, shows the finding and the figures of every study that was ever
written under that folder, and links to the study's own.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from diffusion_lit.report import Page
from experiments.harness.command import command
from experiments.harness.study import ROOT

STUDIES = [
    "toy_diffusion",
    "single_step_denoiser",
    "schedules",
    "learning_rates",
    "noise_cutoff",
    "variance",
    "guidance_scale",
    "coarse_first",
    "attention_ablation",
    "capacity",
    "memorization",
    "warm_start",
    "metrics",
    "few_steps",
    "cold_diffusion",
]


def studies(only: str | None = None, jobs: int = 2) -> None:
    """Runs the studies and writes their page.

    Args:
        only: Names of some of them, such as `schedules,variance`; all by default.
        jobs: Trainings at a time within a study; they share the cores.

    Raises:
        ValueError: If there is no such study.
        SystemExit: With status 1 if a study failed.
    """
    names = STUDIES if only is None else [name.strip() for name in only.split(",")]
    for name in names:
        if name not in STUDIES:
            raise ValueError(f"There is no study {name!r}; choose some of {', '.join(STUDIES)}.")
    failed = []
    for name in names:
        started = time.perf_counter()
        words = [sys.executable, "-m", f"experiments.{name}", f"--jobs={jobs}"]
        status = subprocess.run(words, cwd=Path.cwd()).returncode
        if status in (130, 143, -2, -15):
            raise SystemExit(130)
        if status:
            failed.append(name)
        print(f"{name}: {'FAILED' if status else 'done'} after {time.perf_counter() - started:.0f} s", flush=True)
        write_index(ROOT)
    print(f"{len(names) - len(failed)} of {len(names)} studies are done; see {ROOT}/index.html")
    if failed:
        print(f"Failed: {', '.join(failed)}; their own words stand above.", file=sys.stderr)
        raise SystemExit(1)


def write_index(root: Path) -> Path:
    """Writes the page of all studies."""
    records = [(path.parent, json.loads(path.read_text())) for path in sorted(root.glob("*/study.json"))]
    records.sort(key=lambda pair: (_place(pair[1]["name"]), pair[0].name))
    page = Page("Studies", f"{len(records)} questions that people ask of diffusion models, each with its answer")
    page.table(
        ["study", "finding"],
        [[record["name"], " ".join(record["findings"])] for _, record in records],
        "What was found; each figure below comes from a run that was made here.",
    )
    for folder, record in records:
        show(page, folder, record)
    page.write(root / "index.html")
    return root / "index.html"


def show(page: Page, folder: Path, record: dict[str, Any]) -> None:
    """Puts a study on the page.

    Args:
        page: The page.
        folder: The study's folder.
        record: Its `study.json`.
    """
    page.heading(record["name"])
    page.text(record["title"])
    for finding in record["findings"]:
        page.text(finding)
    page.command(record["command"])
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in record["seconds"].items())
    page.text(f"{seconds}; {record['hardware']['processor']}, {record['hardware']['threads']} threads.")
    for figure in record["figures"]:
        page.image(folder / figure["file"], figure["caption"])
    for name, reason in record["failed"].items():
        page.text(f"The training {name} failed: {reason}")
    page.link("Tables and the rest", f"{folder.name}/index.html")


def _place(name: str) -> int:
    """Where a study stands in the order; other configs of it come after it, unknown ones last."""
    study = name.split("-")[0]
    return STUDIES.index(study) if study in STUDIES else len(STUDIES)


if __name__ == "__main__":
    command(studies)
