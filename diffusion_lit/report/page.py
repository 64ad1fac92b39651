"""The one HTML generator: headings, paragraphs, commands, tables and images in a file that needs no other.

A page is a function of what was put on it: written twice, it has the same bytes. It holds no script and names no other
file but by `link`; it follows the reader's choice of light or dark, and wide tables scroll on a narrow screen.
"""

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError

from diffusion_lit.report.images import png_bytes
from diffusion_lit.storage.atomic import atomic

Source = Path | str | Image.Image | Figure

SMALL = 200  # images below this many pixels a side are enlarged by a whole factor
INCH = 96  # CSS pixels
SHORT = 28  # characters of a cell that is not broken into lines

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --faint: #59636e; --paper: #ffffff; --well: #f3f5f7; --line: #d5dae0;
  --link: #0757b3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --faint: #a3adb8; --paper: #14171b; --well: #1f242a;
  --line: #38404a; --link: #7fb8ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 66rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .25rem; }
p { max-width: 46rem; margin: .6rem 0; }
a { color: var(--link); }
nav { margin: 1rem 0; } nav a { margin-right: 1rem; white-space: nowrap; }
.subtitle, figcaption, caption { color: var(--faint); }
pre { background: var(--well); padding: .6rem .8rem; border-radius: 6px; overflow-x: auto; font-size: .85rem; }
pre.command { white-space: pre-wrap; }
details { margin: .6rem 0; } summary { cursor: pointer; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .9rem; } caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td { font-variant-numeric: tabular-nums; } .number { text-align: right; } .short { white-space: nowrap; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; margin: .8rem 0; }
figure { margin: 0; max-width: calc((100% - (var(--columns) - 1) * 1rem) / var(--columns)); }
@media (max-width: 44rem) { figure { max-width: 100%; } }
img { display: block; max-width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
img.pixels { image-rendering: pixelated; }
figcaption { font-size: .85rem; padding-top: .3rem; max-width: 40rem; }
.missing { color: var(--faint); font-style: italic; }
""".strip()


class Page:
    """A self-contained HTML page, built from top to bottom.

    All text is escaped. An image that is missing or cannot be read becomes a sentence that says so, so that one lost
    file does not cost the report.

    Args:
        title: Title of the page.
        subtitle: A line below it.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self._sections: list[str] = []
        self._parts: list[str] = []

    def heading(self, text: str, level: int = 2) -> None:
        """Opens a section; those of level 2 are listed at the top of the page.

        Args:
            text: The section's title.
            level: 2, or 3 for a section within a section.
        """
        anchor = ""
        if level == 2:
            self._sections.append(text)
            anchor = f' id="section-{len(self._sections)}"'
        self._parts.append(f"<h{level}{anchor}>{_text(text)}</h{level}>")

    def text(self, paragraph: str) -> None:
        """Adds a paragraph.

        Args:
            paragraph: Plain text.
        """
        self._parts.append(f"<p>{_text(paragraph)}</p>")

    def command(self, line: str) -> None:
        """Adds a command line, to copy.

        Args:
            line: The command, without a prompt.
        """
        self._parts.append(f'<pre class="command"><code>{_text(line)}</code></pre>')

    def listing(self, text: str, summary: str) -> None:
        """Adds a long text, such as a configuration, folded away until it is asked for.

        Args:
            text: The text, whose lines are kept.
            summary: The line that shows while it is folded.
        """
        self._parts.append(
            f"<details><summary>{_text(summary)}</summary><pre><code>{_text(text)}</code></pre></details>"
        )

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
        self._parts.append(f'<p><a href="{quote(path.as_posix())}">{_text(text)}</a></p>')

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
        titles = (
            f'<th scope="col"{_class("number short" if number else "short")}>{_text(name)}</th>'
            for name, number in zip(header, numbers, strict=True)
        )
        lines = ['<div class="scroll"><table>']
        lines += [f"<caption>{_text(caption)}</caption>"] if caption else []
        lines += [f"<thead><tr>{''.join(titles)}</tr></thead>"]
        lines += ["<tbody>", *("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows), "</tbody></table></div>"]
        self._parts.append("\n".join(lines))

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
            columns: Large images shrink until so many of them stand side by side; of small ones there may be more.
        """
        figures = "\n".join(_figure(*pair) for pair in images)
        self._parts.append(f'<div class="row" style="--columns: {columns}">\n{figures}\n</div>')

    def html(self) -> str:
        """The page.

        Returns:
            An HTML document.
        """
        lines = [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(self.title)}</title>",
            f"<style>\n{STYLE}\n</style>",
            "</head>",
            "<body>",
            f"<h1>{_text(self.title)}</h1>",
        ]
        lines += [f'<p class="subtitle">{_text(self.subtitle)}</p>'] if self.subtitle else []
        if len(self._sections) > 2:
            links = (f'<a href="#section-{i}">{_text(name)}</a>' for i, name in enumerate(self._sections, start=1))
            lines.append("<nav>" + "\n".join(links) + "</nav>")
        return "\n".join([*lines, *self._parts, "</body>", "</html>"]) + "\n"

    def write(self, path: str | Path) -> None:
        """Writes the page, whole or not at all.

        Args:
            path: The file; its folder is made if need be.

        Raises:
            OSError: If it cannot be written; an older page of that name stays as it was.
        """
        with atomic(path) as file:
            file.write(self.html().encode())


def _text(value: Any) -> str:
    """Escapes text; what HTML cannot hold (control characters, broken Unicode) becomes a replacement character."""
    return escape(re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", "\ufffd", str(value)))


def _class(names: str) -> str:
    return f' class="{names}"' if names else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    """A cell of a table; numbers stand to the right, and what is short stays on a line."""
    if _is_number(value):
        return f'<td class="number short">{f"{value:,}" if isinstance(value, int) else f"{value:.4g}"}</td>'
    text = "" if value is None else str(value)
    return f"<td{_class('short' if len(text) <= SHORT else '')}>{_text(text)}</td>"


def _figure(source: Source, caption: str) -> str:
    """An image with its caption, or the sentence that stands in its place."""
    name = Path(source).name if isinstance(source, Path | str) else ""
    try:
        encoded, kind, width, height, pixels = _encode(source)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read as an image"
        image = f'<p class="missing">The image {_text(name)} {reason}.</p>'
    else:
        data = base64.b64encode(encoded).decode()
        image = (
            f'<img{_class("pixels" if pixels else "")} width="{width}" height="{height}" '
            f'alt="{_text(caption or name or "figure")}" src="data:image/{kind};base64,{data}">'
        )
    return f"<figure>{image}{f'<figcaption>{_text(caption)}</figcaption>' if caption else ''}</figure>"


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
