"""Downloads by torchvision, verified by checksum and written atomically; and messages of their errors."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info
from torchvision.datasets.utils import download_url

from diffusion_lit.words import first_line


def download(urls: Sequence[str], name: str, checksum: str, folder: Path) -> Path:
    """Downloads one file from the first address that has it.

    Args:
        urls: Where the file may be found, the preferred one first.
        name: The file's name.
        checksum: Its MD5, in hexadecimal digits.
        folder: Where it goes; it appears there whole and verified or not at all.

    Raises:
        RuntimeError: If no address has the file as it should be.
    """
    errors = []
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch:
        for url in urls:
            rank_zero_info(f"Downloading {url}")
            try:
                download_url(url, scratch, filename=name, md5=checksum)
            except Exception as error:  # torchvision lets through whatever the network raises; try the next address
                errors.append(f"{url}: {first_line(error)}")
            else:
                os.replace(Path(scratch) / name, folder / name)
                return folder / name
    raise RuntimeError("; ".join(errors))


def may_not_read(path: Path) -> PermissionError:
    """The error that tells that a file may not be read."""
    return PermissionError(f"{path} may not be read; ask its owner for permission to read it.")
