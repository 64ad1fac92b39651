"""The one HTML generator: headings, paragraphs, commands, tables and images in a file that needs no other.

The markup is that of the Jinja templates beside this file, which escape all text.

A page is a function of what was put on it: written twice, it has the same bytes. It holds no script and names no other
file but by `link`; it follows the reader's choice of light or dark, and wide tables scroll on a narrow screen.
"""

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError

from diffusion_lit.report.images import png_bytes
from diffusion_lit.storage.atomic import atomic

Source = Path | str | Image.Image | Figure

SMALL = 200  # images below this many pixels a side are enlarged by a whole factor
INCH = 96  # CSS pixels
SHORT = 28  # characters of a cell that is not broken into lines
UNREADABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")  # control characters, broken Unicode


def _readable(value: Any) -> Any:
    """Text without what HTML cannot hold, which becomes a replacement character."""
    return UNREADABLE.sub("\ufffd", value) if type(value) is str else value


TEMPLATES = Environment(
    loader=PackageLoader("diffusion_lit.report"),
    autoescape=True,
    finalize=_readable,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


class Page:
    """A self-contained HTML page, built from top to bottom.

    An image that is missing or cannot be read becomes a sentence that says so, so that one lost file does not cost the
    report.

    Args:
        title: Title of the page.
        subtitle: A line below it.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self._sections: list[str] = []
        self._body: list[tuple[str, dict[str, Any]]] = []

    def heading(self, text: str, level: int = 2) -> None:
        """Opens a section; those of level 2 are listed at the top of the page.

        Args:
            text: The section's title.
            level: 2, or 3 for a section within a section.
        """
        self._sections += [text] if level == 2 else []
        self._add("heading", text=text, level=level, section=len(self._sections) if level == 2 else None)

    def text(self, paragraph: str) -> None:
        """Adds a paragraph."""
        self._add("text", paragraph=paragraph)

    def command(self, line: str) -> None:
        """Adds a command line, to copy.

        Args:
            line: The command, without a prompt.
        """
        self._add("command", line=line)

    def listing(self, text: str, summary: str) -> None:
        """Adds a long text, such as a configuration, folded away until it is asked for.

        Args:
            text: The text, whose lines are kept.
            summary: The line that shows while it is folded.
        """
        self._add("listing", text=text, summary=summary)

    def link(self, text: str, target: str | Path) -> None:
        """Adds a link to a file that lies beside the page or below its folder.

        Args:
            text: What to click on.
            target: The file's path from the page's folder.

        Raises:
            ValueError: If the path is not relative.
        """
        path = Path(target)
        if path.is_absolute() or ":" in path.as_posix().split("/")[0]:
            raise ValueError(f"{target} cannot be linked from a page; give a path that starts at the page's folder.")
        self._add("link", text=text, target=path.as_posix())

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> None:
        """Adds a table.

        Args:
            header: Titles of the columns.
            rows: Cells: text as it is, whole numbers with separators, floats with four significant digits, None empty.
            caption: A line above the table.

        Raises:
            ValueError: If a row has another number of cells than the header.
        """
        for row in rows:
            if len(row) != len(header):
                raise ValueError(f"The row {list(row)} has {len(row)} cells, but the table has {len(header)} columns.")
        numbers = [any(_is_number(row[column]) for row in rows) for column in range(len(header))]
        titles = [(name, "number short" if number else "short") for name, number in zip(header, numbers, strict=True)]
        self._add("table", header=titles, rows=[[_cell(value) for value in row] for row in rows], caption=caption)

    def image(self, source: Source, caption: str = "") -> None:
        """Adds an image.

        Args:
            source: A PNG, JPEG or GIF file (animated or not), a PIL image or a matplotlib figure.
            caption: What it shows; also its text for who cannot see it.
        """
        self.images([(source, caption)], columns=1)

    def images(self, images: Sequence[tuple[Source, str]], columns: int = 2) -> None:
        """Adds images side by side, one below the other where the screen is narrow.

        Args:
            images: Source and caption of each, as for `image`.
            columns: Images side by side: large ones shrink to fit, and of small ones there may be more.
        """
        self._add("images", figures=[_figure(*pair) for pair in images], columns=columns)

    def _add(self, part: str, **content: Any) -> None:
        """Adds a part: a macro of parts.html.j2 and what it is given."""
        self._body.append((part, content))

    def html(self) -> str:
        """The page.

        Returns:
            An HTML document.
        """
        page = TEMPLATES.get_template("page.html.j2")
        return page.render(title=self.title, subtitle=self.subtitle, sections=self._sections, body=self._body)

    def write(self, path: str | Path) -> None:
        """Writes the page, whole or not at all.

        Args:
            path: The file; its folder is made if need be.

        Raises:
            OSError: If it cannot be written; an older page of that name stays as it was.
        """
        with atomic(path) as file:
            file.write(self.html().encode())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: Any) -> tuple[str, str | None]:
    """A cell of a table and its classes; numbers stand to the right, and what is short stays on a line."""
    if _is_number(value):
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}", "number short"
    text = "" if value is None else str(value)
    return text, "short" if len(text) <= SHORT else None


def _figure(source: Source, caption: str) -> dict[str, Any]:
    """An image's attributes and caption, or the sentence that replaces it."""
    name = Path(source).name if isinstance(source, Path | str) else ""
    try:
        encoded, kind, width, height, pixels = _encode(source)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read as an image"
        return {"missing": f"The image {name} {reason}.", "caption": caption}
    attributes = {
        "class": "pixels" if pixels else None,
        "width": width,
        "height": height,
        "alt": _readable(caption or name or "figure"),
        "src": f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}",
    }
    return {"attributes": attributes, "caption": caption}


def _encode(source: Source) -> tuple[bytes, str, int, int, bool]:
    """An image's bytes, format, width and height in CSS pixels, and whether it is enlarged so that pixels show.

    A file goes in as it is, animation included. A resolution recorded in it sets its size on the screen.
    """
    if isinstance(source, Path | str):
        encoded = Path(source).read_bytes()
    elif isinstance(source, Figure):
        buffer = io.BytesIO()
        source.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
        encoded = buffer.getvalue()
    else:
        encoded = png_bytes(source)
    with Image.open(io.BytesIO(encoded), formats=("PNG", "JPEG", "GIF")) as image:
        image.load()
        (width, height), kind = image.size, str(image.format).lower()
        resolution = max(INCH, float(image.info.get("dpi", (INCH,))[0]))
    small = max(width, height) < SMALL
    scale = 256 // max(width, height) if small else INCH / resolution
    return encoded, kind, round(width * scale), round(height * scale), small
