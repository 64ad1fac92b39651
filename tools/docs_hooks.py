"""What the documentation site (mkdocs.yml) does to a page: links into the repository, and mathematics.

Links that leave docs/ lead to the repository; one that leads nowhere stops the build. Mathematics becomes MathML, which
browsers draw by themselves: `$...$` and `$$...$$` of a page are TeX, and an indented formula of a docstring is
translated from the plain notation of the code (`x = x0 + sigma * n`) first.
"""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<=\]\()(\.\./[^)\s#]+)(#[^)\s]*)?(?=\))")
TEX = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
BLOCK = re.compile(r'<div class="(?:language-text )?highlight">.*?<code>(.*?)</code></pre></div>', re.DOTALL)
CELL = re.compile(r"(?<=<td><code>).*?(?=</code>)")
OPTION = re.compile(r"(--[\w.-]+)")  # which no line of a table may break
GREEK = "alpha beta gamma delta epsilon theta lambda sigma tau phi psi pi"
TOKEN = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:_[A-Za-z0-9]+)*|\d+(?:\.\d+)?|\S|\s+")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turns links that leave docs/ into links to the repository."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def lead(match: re.Match[str]) -> str:
        there = (folder / match[1]).resolve()
        if there.is_relative_to(ROOT / "docs"):
            return match[0]
        if not there.exists():
            raise PluginError(f"{page.file.src_uri} links to {match[1]}, which is not there.")
        return f"https://github.com/diffusion-lit/diffusion-lit/blob/main/{there.relative_to(ROOT)}{match[2] or ''}"

    return LINK.sub(lead, markdown)


def on_page_content(content: str, *, page: Any, **_: Any) -> str:
    """Draws the mathematics of a page."""
    content = TEX.sub(lambda m: convert(html.unescape(m[2]), display="inline" if m[1] == "span" else "block"), content)
    content = CELL.sub(lambda m: OPTION.sub(r'<span class="option">\1</span>', m[0]), content)
    if not page.file.src_uri.startswith("api/"):
        return content
    return BLOCK.sub(lambda match: formulas(match), content)


def formulas(match: re.Match[str]) -> str:
    """A block of a docstring as formulas, a line each, or as it is where a line of it is none."""
    lines = html.unescape(re.sub(r"<[^>]+>", "", match[1])).strip("\n").splitlines()
    if not lines or not all("=" in line or "<-" in line for line in lines):
        return match[0]
    try:
        return "".join(convert(plain_to_tex(part), display="block") for line in lines for part in parts(line))
    except Exception:  # what the translation cannot read stays as it was written
        return match[0]


def parts(line: str) -> list[str]:
    """The formulas of a line that holds several side by side, which a phone shows one below the other."""
    found = re.split(r" {3,}", line.strip())
    return found if all("=" in part for part in found) else [line]


def plain_to_tex(line: str) -> str:
    r"""A formula in the notation of the docstrings as TeX: `sqrt(1 - alpha_bar_t) n` as `\sqrt{1-\bar\alpha_t} n`."""
    line = re.sub(r"\((?:algorithm|equation) \d\)", "", line).strip().rstrip(",.")
    line = re.sub(r"(\b[A-Z])\+(?= )", r"\1^⁺", re.sub(r"\^-(\d)", r"^{-\1}", line))
    tokens = TOKEN.findall(grouped(line.replace("<-", "←").replace("<=", "≤")))
    made = [tex_of(token) for token in tokens]
    for at, token in enumerate(tokens[1:-1], 1):  # TeX sets words side by side as one
        if token.isspace() and any(made[beside].startswith(r"\text") for beside in (at - 1, at + 1)):
            made[at] = made[at] if len(token) > 1 else r"\; "
    return "".join(made)


def grouped(line: str) -> str:
    """`sqrt(...)` and `^(...)` with braces, so that what belongs together stays together."""
    for before, after in (("sqrt(", "√{"), ("√(", "√{"), ("^(", "^{")):
        while before in line:
            start = line.index(before) + len(before)
            depth, end = 1, start
            while depth and end < len(line):
                depth += {"(": 1, ")": -1}.get(line[end], 0)
                end += 1
            line = line[: start - len(before)] + after + line[start : end - 1] + "}" + line[end:]
    return line


def tex_of(token: str) -> str:
    """A token of the plain notation as TeX."""
    signs = {
        "*": r"\cdot ",
        "²": "^2",
        "³": "^3",
        "√": r"\sqrt ",
        "~": r"\sim ",
        "←": r"\leftarrow ",
        "½": r"\frac12 ",
        "⁺": "{+}",
    }
    if token in signs:
        return signs[token]
    if token.isspace():
        return r"\quad " if len(token) > 1 else " "
    if not token[0].isalpha():
        return token
    head, *rest = token.split("_")
    hats = [rest.pop(rest.index(hat)) for hat in ("hat", "bar") if hat in rest]
    number = re.fullmatch(r"([A-Za-z])(\d+)", head)
    if number:
        head, rest = number[1], [number[2], *rest]
    if len(head) > 1 and head not in GREEK.split() and any(len(part) > 1 for part in rest):
        words = [part for part in rest if len(part) > 1]
        head, rest = rf"\text{{{' '.join([head, *words])}}}", [part for part in rest if len(part) == 1]
    elif head in (*GREEK.split(), "sum", "prod", "log", "exp", "max", "min"):
        head = rf"\{head}"
    elif head == "integral":
        head = r"\int "
    elif head.removeprefix("d") in GREEK.split():
        head = rf"d\{head.removeprefix('d')}"
    elif len(head) > 1 and not re.fullmatch("d[a-z]", head):
        head = rf"\text{{{head}}}"
    for hat in hats:
        head = rf"\{hat}{{{head}}}"
    below = ",".join(
        rf"\{part}" if part in GREEK.split() else rf"\text{{{part}}}" if len(part) > 1 else part for part in rest
    )
    return f"{head}_{{{below}}} " if below else f"{head} "
