"""Numbers, names and lists as messages say them: `1 image`, `an EDM`, `a, b and 3 more`."""

import re
from collections.abc import Sequence


def counted(number: int, noun: str, verb: str = "", verbs: str = "") -> str:
    """A number with its noun, such as `1 image` or `2 classes`, and with a verb: `1 image was`, `2 images were`."""
    if number == 1:
        return f"1 {noun} {verb}".strip()
    return f"{number:,} {noun}{'es' if noun.endswith(('s', 'x', 'ch')) else 's'} {verbs}".strip()


def short_count(number: int) -> str:
    """A number as it stands in a metric's name, exact: 5000 as `5k`."""
    if number % 1_000_000 == 0:
        return f"{number // 1_000_000}m"
    return f"{number // 1000}k" if number % 1000 == 0 else str(number)


def article(what: object) -> str:
    """A name, or that of an object's class, behind `a` or `an`: `an EDM`, `a VAE`, `a UNet`, `an ImageFolder`."""
    name = what if isinstance(what, str) else (what if isinstance(what, type) else type(what)).__name__
    sounds_open = re.match(r"[aeioAEIO]|[FHLMNRSX](?=[A-Z])|[uU](?![nN]i|[nN][eE]t|[A-Z])", name)
    return f"{'an' if sounds_open else 'a'} {name}"


def few(names: Sequence[str], most: int = 6) -> str:
    """The first of some names in one line, and how many more there are; `none` for none."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"


def first_line(error: Exception) -> str:
    """The first line of what an exception says, or the name of its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
