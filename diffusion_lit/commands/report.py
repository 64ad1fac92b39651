"""`diffusion-lit report`: a run on one HTML page."""

from pathlib import Path

from diffusion_lit.report.facts import find_run
from diffusion_lit.report.run_page import RunPage
from diffusion_lit.storage.runs import find_checkpoint, run_of


def report(run: str | None = None, out: str | None = None, ckpt_path: str | None = None) -> None:
    """Makes one self-contained HTML page of a run.

    It shows figures, curves, samples over time, evaluations, cost and configuration; the run may be going on, stopped
    or over. Reports of `diffusion-lit evaluate` are found in the run's folder, in the one above it and in the current
    one, where they name a checkpoint of the run.

    Args:
        run: The run's folder, runs/NAME/version_N, or runs/NAME for the newest version; `last` is the run trained last.
        out: The page; report.html in the run's folder by default.
        ckpt_path: The run as other commands take it, instead of `run`: a checkpoint of it, `last` or its folder.

    Raises:
        ValueError: If there is no run in the folder.
    """
    if (run is None) == (ckpt_path is None):
        raise ValueError("Give one run: --run runs/NAME, or --ckpt_path with a checkpoint in it, such as last.")
    given = Path(str(run or ckpt_path))
    found = given if given.is_dir() else find_checkpoint(given)
    folder = find_run(run_of(found) or found)
    path = folder / "report.html" if out is None else Path(out)
    if path.suffix != ".html":
        raise ValueError(f"--out {out} must end in .html.")
    made = RunPage(folder)
    made.build().write(path)
    for problem in made.problems:
        print(problem)
    print(f"The report is {path}")
