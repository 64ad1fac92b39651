"""The root folder of all caches."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The root of all caches: DIFFUSION_LIT_CACHE, else the user's cache folder.

    Returns:
        The folder, which need not exist.
    """
    given = os.environ.get("DIFFUSION_LIT_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion-lit"
