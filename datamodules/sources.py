"""Lists images in a folder of any depth, a zip, or a list of globs, without decoding them.

Names are relative to the root, separated by "/" and sorted, so that a folder and its zip list alike. What cannot be
listed (an unreadable folder, a broken link) is reported by name. Links to folders are followed, each folder once, so
that cycles end.
"""

import glob
import io
import os
import stat
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, NamedTuple

from datamodules.decode import ENDINGS, BadImageError
from datamodules.files import may_not_read
from diffusion_lit.words import counted

OTHERS = (
    ".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".exr",
    ".hdr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw", ".dcm", ".nii", ".npy", ".npz", ".mp4", ".mov", ".avi",
)  # fmt: skip  # images of kinds that are not read
GIVE = "give a folder of images, a zip of them, or a list of globs"
MAX_MEMBER = 2**29  # bytes that an image in a zip may unpack to


class Image(NamedTuple):
    """A listed image: its name, its bytes, and its time of change (of a zip's member: its checksum)."""

    name: str
    size: int
    stamp: int


class Skip(NamedTuple):
    """A file or folder that is left out, and why, as the end of a sentence that begins with its name."""

    name: str
    reason: str


@dataclass
class Listing:
    """The images under a root.

    Args:
        root: What the names are relative to; the zip itself for a zip.
        images: The images, sorted by name.
        skipped: What could not be listed.
        label: What messages call the source.
        archive: The opened zip, where the root is one.
        process: The process that the zip's position belongs to.
    """

    root: Path
    images: list[Image]
    skipped: list[Skip] = field(default_factory=list)
    label: str = ""
    archive: zipfile.ZipFile | None = None
    process: int = field(default_factory=os.getpid)

    def open(self, name: str) -> IO[bytes]:
        """Opens an image.

        Args:
            name: Its name in the listing.

        Returns:
            The opened file, which can seek.

        Raises:
            BadImageError: If it cannot be opened.
        """
        try:
            if self.archive is None:
                return (self.root / name).open("rb")
            if self.process != os.getpid():  # a fork, which needs a position of its own
                self.archive.fp, self.process = self.root.open("rb"), os.getpid()
            info = self.archive.getinfo(name)
            if info.file_size > MAX_MEMBER:
                raise BadImageError(f"unpacks to {info.file_size} bytes, which no image has")
            return io.BytesIO(self.archive.read(info))
        except PermissionError as error:
            raise BadImageError("may not be read (no permission)") from error
        except BadImageError:
            raise
        except OSError as error:
            raise BadImageError(f"cannot be read ({error.strerror or error})") from error
        except Exception as error:  # zipfile raises many kinds at damaged, encrypted or exotic members
            raise BadImageError(f"cannot be unpacked ({' '.join(str(error).split())})") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "archive": self.archive is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        archive = zipfile.ZipFile(state["root"]) if state["archive"] else None
        self.__dict__.update(state, archive=archive, process=os.getpid())


def printable(name: str) -> str:
    """A file name as one printable line, other characters escaped.

    Args:
        name: A name as the system gives it.
    """
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in name)


def list_images(root: str | Sequence[str]) -> Listing:
    """Lists the images of a source.

    Args:
        root: A folder, a zip, a glob such as "dogs/*terrier*/**", or several of these.

    Returns:
        The listing, which may be empty.

    Raises:
        FileNotFoundError: If the source does not exist.
        PermissionError: If it may not be read.
        ValueError: If it is neither a folder, nor a zip, nor a glob.
    """
    if isinstance(root, str):
        path = Path(root).expanduser()
        if _exists(path):
            return _list_zip(path) if path.is_file() else _list_folder(path)
        if not glob.has_magic(root):
            raise FileNotFoundError(f"{path} does not exist; {GIVE}.")
        root = [root]
    if not root:
        raise ValueError("root is an empty list; " + GIVE + ".")
    return _list_globs(root)


def is_image(name: str) -> bool:
    """Whether a name has an image's ending and is not hidden.

    Args:
        name: A file name, with or without folders.

    Returns:
        True where it looks like an image.
    """
    last = name.rpartition("/")[2]
    return last.lower().endswith(ENDINGS) and not last.startswith(".")


def walk(folder: Path, skipped: list[Skip]) -> Iterator[tuple[str, os.stat_result]]:
    """Walks all files with an image's ending, each folder once even if links form a cycle.

    Args:
        folder: Where to start.
        skipped: What cannot be listed is added here.

    Yields:
        The name relative to the folder, and what the system says of the file.
    """
    seen: set[tuple[int, int]] = set()

    def name_of(place: str) -> str:
        name = os.path.relpath(place, folder)
        return "" if name == "." else name

    def refused(error: OSError) -> None:
        skipped.append(Skip(name_of(error.filename) or str(folder), f"cannot be listed ({_why(error)})"))

    for place, below, names in os.walk(folder, onerror=refused, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        below[:] = sorted(name for name in below if not _is_hidden(name))
        prefix = os.path.join(name_of(place), "")
        skipped += _unreadable(prefix, names)
        for name in sorted(prefix + name for name in names if is_image(name)):
            try:
                status = (folder / name).stat()
            except OSError as error:
                skipped.append(Skip(name, f"cannot be found ({_why(error)})"))
                continue
            if stat.S_ISREG(status.st_mode):
                yield name, status
            else:
                skipped.append(Skip(name, "is no regular file"))


def _unreadable(folder: str, names: Sequence[str]) -> list[Skip]:
    """Messages about images of unsupported formats in a folder: one line per format."""
    found = Counter(os.path.splitext(name)[1].lower() for name in names if not name.startswith("."))
    return [
        Skip(
            folder or "the folder itself",
            f"holds {counted(found[ending], f'{ending} file')}, which {'is' if found[ending] == 1 else 'are'} not read",
        )
        for ending in OTHERS
        if found[ending]
    ]


def _list_folder(folder: Path) -> Listing:
    if not folder.is_dir():
        raise ValueError(f"{folder} is neither a folder nor a zip; {GIVE}.")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise PermissionError(f"{folder} may not be read; ask its owner for permission to read and enter it.")
    skipped: list[Skip] = []
    images = [Image(name, status.st_size, status.st_mtime_ns) for name, status in walk(folder, skipped)]
    return Listing(folder, sorted(images), skipped, printable(str(folder)))


def _list_zip(path: Path) -> Listing:
    try:
        archive = zipfile.ZipFile(path)
    except PermissionError as error:
        raise may_not_read(path) from error
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} is neither a folder nor a whole zip ({error}); {GIVE}.") from error
    members = [info for info in archive.infolist() if not info.is_dir() and not _is_hidden(info.filename)]
    images: dict[str, Image] = {}
    folders: dict[str, list[str]] = {}
    for info in members:
        folder, slash, name = info.filename.rpartition("/")
        folders.setdefault(folder + slash, []).append(name)
        if is_image(name):
            images[info.filename] = Image(info.filename, info.file_size, info.CRC)
    skipped = [skip for folder, names in sorted(folders.items()) for skip in _unreadable(folder, names)]
    return Listing(path, sorted(images.values()), skipped, printable(str(path)), archive)


def _list_globs(patterns: Sequence[str]) -> Listing:
    skipped: list[Skip] = []
    images: dict[str, Image] = {}
    for pattern in patterns:
        full = os.path.abspath(os.path.expanduser(pattern))
        before = len(images) + len(skipped)
        for name, status in _matches(full, skipped):
            images[name] = Image(name, status.st_size, status.st_mtime_ns)
        if len(images) + len(skipped) == before:
            raise FileNotFoundError(f"No image matches {pattern!r}; its files must end in {', '.join(ENDINGS)}.")
    return Listing(Path("/"), sorted(images.values()), skipped, ", ".join(patterns))


def _matches(pattern: str, skipped: list[Skip]) -> Iterator[tuple[str, os.stat_result]]:
    """The images that a glob names, or that lie below a folder that it names; "**" is folders of any depth."""
    head, deep, _ = pattern.partition("**")  # glob's own "**" would follow links in a circle
    if deep:
        head = head.rpartition("/")[0]
    for found in sorted(glob.glob(head)):
        path = Path(found)
        if path.is_dir():
            for name, status in walk(path, skipped):
                full = str(path / name)
                if not deep or _matches_parts(full.split("/"), pattern.split("/")):
                    yield full, status
        elif not deep and is_image(found):
            try:
                yield found, path.stat()
            except OSError as error:
                skipped.append(Skip(found, f"cannot be found ({_why(error)})"))


def _matches_parts(names: Sequence[str], globs: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a glob, of which "**" is any number of parts."""
    if not globs:
        return not names
    if globs[0] == "**":
        return any(_matches_parts(names[start:], globs[1:]) for start in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], globs[0]) and _matches_parts(names[1:], globs[1:])


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except PermissionError as error:
        raise PermissionError(f"{path} may not be looked at; ask the owner of the folders above it.") from error
    except (OSError, ValueError):
        return False
    return True


def _why(error: OSError) -> str:
    return error.strerror or str(error)
