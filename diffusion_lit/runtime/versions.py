"""Versions of the libraries behind the figures, and the commit of the source tree."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


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
