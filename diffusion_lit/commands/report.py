"""`lightning report`: a run on one HTML page."""

from pathlib import Path

from diffusion_lit.report.facts import (
    find_run,
)
from diffusion_lit.report.run_page import RunPage


def report(run: str, out: str | None = None) -> None:
    """Makes one self-contained HTML page of a run.

    It shows figures, curves, samples over time, evaluations, cost and configuration; the run may be going on, stopped
    or over. Reports of `lightning evaluate` are found in the run's folder, in the one above it and in the current one,
    where they name a checkpoint of the run.

    Args:
        run: The run's folder, runs/NAME/version_N, or runs/NAME for the newest version.
        out: The page; report.html in the run's folder by default.

    Raises:
        ValueError: If there is no run in the folder.
    """
    folder = find_run(Path(run))
    path = folder / "report.html" if out is None else Path(out)
    if path.suffix != ".html":
        raise ValueError(f"--out {out} must end in .html.")
    made = RunPage(folder)
    made.build().write(path)
    for problem in made.problems:
        print(problem)
    print(f"The report is {path}")
