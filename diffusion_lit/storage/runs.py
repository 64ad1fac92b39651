"""Runs on disk: the folder of a new run, `runs/NAME/version_N`, and the checkpoints `last` and `best`."""

import re
from pathlib import Path

RUNS = Path("runs")
LONGEST = 120  # bytes of a part of a name; file systems take 255, and files of the run are named after it too
NAMES = ("last", "best")


def check_name(name: str) -> str:
    """Checks that a run's name is a path below the folder of all runs.

    Args:
        name: The name, such as `edm_digits` or `study/variant`.

    Raises:
        ValueError: If it leads elsewhere, or no folder can be called so.
    """
    for part in name.split("/"):
        if part in ("", ".", "..") or len(part.encode()) > LONGEST or not part.isprintable() or "\\" in part:
            shown = name if len(name) <= 60 else f"{name[:57]}..."
            raise ValueError(
                f"--name {shown!r} names no folder below {RUNS}: each part between slashes must have 1 to {LONGEST} "
                "printable characters and be neither . nor .. nor hold a backslash. Choose a name such as edm_digits."
            )
    return name


def versions(run: Path) -> list[Path]:
    """The versions of a run.

    Args:
        run: The run's folder, `runs/NAME`.

    Returns:
        Its folders `version_N`, the newest first.
    """
    found = [folder for folder in run.glob("version_*") if re.fullmatch(r"version_\d+", folder.name)]
    return sorted(found, key=lambda folder: int(folder.name.split("_")[1]), reverse=True)


def claim_version(run: Path) -> Path:
    """Makes the folder of a run's next version, which no other run gets.

    Args:
        run: The run's folder, `runs/NAME`.

    Returns:
        The new folder `version_N`.

    Raises:
        OSError: If it cannot be made.
    """
    while True:
        newest = versions(run)
        folder = run / f"version_{int(newest[0].name.split('_')[1]) + 1 if newest else 0}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # another run was faster
            continue
        return folder


def find_last(run: Path, name: str = "last") -> Path:
    """The last, or the best, checkpoint of a run's newest version that has one.

    Args:
        run: The run's folder, `runs/NAME`, or that of one version of it.
        name: `last` or `best`.

    Returns:
        The path of its `last.ckpt` or `best.ckpt`.

    Raises:
        ValueError: If no version holds such a checkpoint.
    """
    for folder in versions(run) or [run]:
        found = folder / "checkpoints" / f"{name}.ckpt"
        if found.is_file():
            return found
    raise ValueError(
        f"There is nothing to continue or to draw with: no version under {run} holds checkpoints/{name}.ckpt; name a "
        f"file or another run instead of {name}, or start without a checkpoint."
    )


def find_checkpoint(given: str | Path, run: Path | None = None) -> Path:
    """The checkpoint that a person means.

    Args:
        given: A file; a folder of `diffusion-lit export`; a run, runs/NAME, or one version of it, runs/NAME/version_N,
            of which the last checkpoint is meant; `last` or `best`, of the run that was trained last. A run's best is
            runs/NAME/best.
        run: The run's folder in which `last` and `best` are looked for; all below `runs` where there is none.

    Returns:
        The path of a file or of an export's folder.

    Raises:
        ValueError: If the run has no such checkpoint.
    """
    path = Path(given)
    if path.name in NAMES and not path.exists():
        if path.parent != Path():
            return find_last(path.parent, path.name)
        return _newest(path.name) if run is None else find_last(run, path.name)
    if path.is_dir() and (versions(path) or (path / "checkpoints").is_dir()):
        return find_last(path)
    return path


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint lies in.

    Returns:
        Its `version_N`, or None where it lies elsewhere.
    """
    folder = checkpoint.parent.parent
    return folder if checkpoint.parent.name == "checkpoints" and folder.name.startswith("version_") else None


def _newest(name: str) -> Path:
    """The last or best checkpoint of the run that was trained last."""
    found = list(RUNS.rglob("version_*/checkpoints/last.ckpt"))
    if not found:
        raise ValueError(
            f"There is no run below {RUNS}/ with a {name} checkpoint; train one (`diffusion-lit fit`) or give a file."
        )
    newest = max(found, key=lambda path: path.stat().st_mtime)
    return find_last(newest.parent.parent, name)
