"""What README and docs take from the code: the lines that links lead to, and what each config costs and gives.

    make docs        renews both after the code has moved

A link into the code is `[`Symbol`](path/to/file.py#L12)`, `Class.method` being a symbol too. The table of recipes
stands between two comments of docs/recipes.md and is made of the comments that open the configs.
"""

import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if path.name != "base.yaml"]
TABLE = re.compile(r"(?<=<!-- recipes -->\n).*?(?=<!-- end of recipes -->)", re.DOTALL)
FIELD = re.compile(r"(\w+): +(.*)")
NEAR = 20  # lines that a definition may move before its links count as wrong
LINK = re.compile(r"\[`([\w.]+)`\]\(([^)#\s]+\.py)#L(\d+)\)")


class Span(NamedTuple):
    """First and last line of a definition, decorators left out."""

    first: int
    last: int


def symbols(path: Path) -> dict[str, Span]:
    """Where each function, class, method and constant of a file is defined, by its qualified name."""
    found = {}

    def walk(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            assert node.end_lineno is not None
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[prefix + node.name] = Span(node.lineno, node.end_lineno)
                if isinstance(node, ast.ClassDef):
                    walk(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    if isinstance(target, ast.Name):
                        found[prefix + target.id] = Span(node.lineno, node.end_lineno)

    walk(ast.parse(path.read_text()).body, "")
    return found


def problems(page: Path) -> list[str]:
    """What is wrong with the links of a page into the code, a sentence each."""
    found = []
    for symbol, target, line in LINK.findall(page.read_text()):
        path = (page.parent / target).resolve()
        if not path.is_file():
            found.append(f"{page.name}: {symbol} is linked to {target}, which is not there.")
            continue
        span = symbols(path).get(symbol)
        if span is None:
            found.append(f"{page.name}: {target} defines no {symbol}.")
        elif not span.first - NEAR <= int(line) <= span.last + NEAR:
            found.append(f"{page.name}: {symbol} is defined in line {span.first} of {target}, not {line}: make docs.")
    return found


def header(config: Path) -> dict[str, str]:
    """The comment that opens a config: what it is (under ""), and Run, Data, Cost and Expect."""
    fields, name = {"": ""}, ""
    for line in config.read_text().splitlines():
        if not line.startswith("#"):
            break
        text = line.removeprefix("#").strip()
        match = FIELD.fullmatch(text)
        if match:
            name, text = match.groups()
        fields[name] = f"{fields.get(name, '')} {text}".strip()
    return fields


def recipes() -> str:
    """The table of configs: what each trains, costs and gives."""
    rows = ["| config | what it trains | cost | what to expect |", "| --- | --- | --- | --- |"]
    for config in CONFIGS:
        fields = header(config)
        what = re.split(r"[.:](?:\s|$)", fields[""])[0]
        rows.append(f"| [{config.stem}](../configs/{config.name}) | {what} | {fields['Cost']} | {fields['Expect']} |")
    return "".join(f"{row}\n" for row in rows)


def renewed(page: Path) -> str:
    """The text of a page with lines of links and table as they are now; links without a symbol stay."""

    def renew(match: re.Match[str]) -> str:
        symbol, target, line = match.groups()
        path = (page.parent / target).resolve()
        span = symbols(path).get(symbol) if path.is_file() else None
        return f"[`{symbol}`]({target}#L{span.first if span else line})"

    return TABLE.sub(lambda _: recipes(), LINK.sub(renew, page.read_text()))


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(renewed(page))
    lost = [problem for page in PAGES for problem in problems(page)]
    print("\n".join(lost) or "README and docs are up to date.")
    sys.exit(bool(lost))
