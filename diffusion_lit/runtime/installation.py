"""The installation: what hides a part of it, and what hides its command."""

import importlib.util
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = "lightning" if Path(sys.argv[0]).name == "lightning" else "diffusion-lit"  # as it was typed


def refuse_hidden_datamodules() -> None:
    """Refuses a file or folder `datamodules` that shadows this project's package.

    Raises:
        ValueError: If there is one.
    """
    spec = importlib.util.find_spec("datamodules")
    places = [*(spec.submodule_search_locations or []), spec.origin or ""] if spec else []
    if any(Path(place).resolve() == ROOT / "datamodules" for place in places):
        return
    if not places:
        raise ValueError("The package `datamodules` is missing beside diffusion_lit; install diffusion-lit again.")
    raise ValueError(
        f"{Path(places[0]).resolve()} has the name of this project's package `datamodules` and is found in its place; "
        "rename yours, or give the command in another folder."
    )


def foreign_lightning() -> str | None:
    """Advice if the command `lightning` belongs to another package, such as lightning-sdk.

    Returns:
        A sentence, or None where there is no such command or it is this project's.
    """
    script = shutil.which("lightning")
    if script is None:
        return None
    try:
        ours = b"diffusion_lit" in Path(script).read_bytes()
    except OSError:
        ours = False
    return None if ours else f"`lightning` is {script}, which another package installed: write diffusion-lit instead."
