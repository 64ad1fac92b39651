"""A folder with the results of one run; a new run replaces those of the run before.

A run lists its files in record.json under `files`; no other file is touched.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from diffusion_lit.storage.folders import scratch_of, sweep
from diffusion_lit.storage.room import try_folder

RECORD = "record.json"


@contextlib.contextmanager
def own_files(folder: Path) -> Iterator[Path]:
    """Makes a folder to write into; its files replace those of the run before once all are written.

    Args:
        folder: Where the results are to lie.

    Yields:
        An empty folder; write the files and RECORD, which lists them, into it.

    Raises:
        OSError: If something cannot be written; the results of the run before are as they were.
    """
    try_folder(folder)
    sweep(folder / RECORD)
    fresh = scratch_of(folder / RECORD)
    fresh.mkdir()
    try:
        yield fresh
        names = {path.name for path in fresh.iterdir()}
        for name in recorded(folder) - names:
            (folder / name).unlink(missing_ok=True)
        for name in sorted(names, key=lambda name: name == RECORD):  # the record last
            os.replace(fresh / name, folder / name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def recorded(folder: Path) -> set[str]:
    """The files that the last run in a folder wrote, by its record.

    Returns:
        Plain names; none where there is no record that can be read.
    """
    try:
        files = json.loads((folder / RECORD).read_text())["files"]
        return {
            name for name in files if isinstance(name, str) and name == Path(name).name and (folder / name).is_file()
        }
    except (OSError, ValueError, KeyError, TypeError):
        return set()
