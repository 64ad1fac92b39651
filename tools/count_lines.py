"""Lines of code per room, without docstrings, comments and blank lines: `python tools/count_lines.py`."""

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IGNORED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def docstring_lines(tree: ast.AST) -> set[int]:
    """Numbers of the lines that docstrings take.

    Returns:
        Line numbers from 1.
    """
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                found |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return found


def code_lines(text: str) -> int:
    """Lines of a file that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in IGNORED:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstring_lines(ast.parse(text)))


def room_of(path: Path) -> str:
    """The room that a file lies in.

    Returns:
        Such as `diffusion_lit/modules`, or `diffusion_lit` for a loose file.
    """
    return "/".join(path.parts[: 2 if path.parts[0] == "diffusion_lit" and len(path.parts) > 2 else 1])


def main() -> None:
    """Prints code lines and all lines of each room, the tests apart."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    code: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    for top in ("diffusion_lit", "datamodules", "experiments", "tools", "tests"):
        for path in sorted((root / top).rglob("*.py")):
            room, text = room_of(path.relative_to(root)), path.read_text()
            code[room] += code_lines(text)
            whole[room] += len(text.splitlines())
    for room in sorted(code, key=lambda room: (room == "tests", room)):
        print(f"{room:<28}{code[room]:>8,} of {whole[room]:>7,}")
    rest = [room for room in code if room != "tests"]
    print(f"{'without tests':<28}{sum(code[r] for r in rest):>8,} of {sum(whole[r] for r in rest):>7,}")


if __name__ == "__main__":
    main()
