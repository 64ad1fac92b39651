"""Checks of the numbers that a user gives, for every room: each raises a ValueError of one sentence.

A range that is tested by `<` lets NaN pass, and a count that is not tested takes 2.5 or True. Here a number is finite
unless stated otherwise, and a count is whole. None stands for a default and passes.
"""

import math
from numbers import Integral, Real
from typing import Any


def check_number(
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    infinite: bool = False,
    whole: bool = False,
    hint: str = "",
    **values: Any,
) -> None:
    """Refuses what is no number inside a range.

    Args:
        least: The smallest number allowed.
        above: All numbers must be above this one; replaces `least`.
        most: The largest number allowed.
        below: All numbers must be below this one; replaces `most`.
        infinite: Whether infinity is a number too.
        whole: Whether the numbers must be whole.
        hint: What follows the range in the sentence, such as `; 0.5 suits images`.
        values: Numbers by name, or None.

    Raises:
        ValueError: If one is outside, not a number (NaN, a word, a truth value), infinite or not whole.
    """
    for name, value in values.items():
        if value is None:
            continue
        kind = Integral if whole else Real
        fits = isinstance(value, kind) and not isinstance(value, bool) and not math.isnan(value)
        fits = fits and (infinite or not math.isinf(value))
        fits = fits and (least is None or value >= least) and (above is None or value > above)
        if not (fits and (most is None or value <= most) and (below is None or value < below)):
            raise ValueError(f"{name} is {value!r}; give a {_words(least, above, most, below, infinite, whole)}{hint}.")


def check_count(least: int = 1, *, hint: str = "", **values: Any) -> None:
    """Refuses what does not count: anything but whole numbers from `least` on; see `check_number`."""
    check_number(least=least, whole=True, hint=hint, **values)


def check_share(*, hint: str = "", **values: Any) -> None:
    """Refuses anything but numbers from 0 to 1; see `check_number`."""
    check_number(least=0, most=1, hint=hint, **values)


def check_counts(name: str, values: Any, least: int = 1, empty: bool = True) -> None:
    """Refuses a list with an entry that is no count; see `check_count`.

    Args:
        name: What the list is called.
        values: The list, or None.
        least: The smallest number allowed.
        empty: Whether there may be none.

    Raises:
        ValueError: If an entry is not whole or too small, or the list is empty and must not be.
    """
    check_numbers(name, values, empty=empty, least=least, whole=True)


def check_numbers(name: str, values: Any, *, empty: bool = True, **range_: Any) -> None:
    """Refuses a list with an entry outside a range.

    Args:
        name: What the list is called.
        values: The list, or None.
        empty: Whether there may be none.
        range_: The range, as for `check_number`.

    Raises:
        ValueError: If an entry is outside, or the list is empty and must not be.
    """
    if values is None:
        return
    if not empty and len(values) == 0:
        raise ValueError(f"{name} is empty; give at least one number.")
    for value in values:
        check_number(**range_, **{name: value})


def _words(
    least: float | None, above: float | None, most: float | None, below: float | None, infinite: bool, whole: bool
) -> str:
    """A range in words."""
    start = f"from {least:g}" if least is not None else f"above {above:g}" if above is not None else ""
    end = f"to {most:g}" if most is not None else f"below {below:g}" if below is not None else ""
    if start.startswith("from") and end.startswith("below"):
        end = f"to {end}"
    elif start and not end:
        start += " on" if start.startswith("from") else ""
    elif start.startswith("above") and end:
        end = f"and {end}" if end.startswith("below") else f"{end}"
    number = "whole number" if whole else "number" if infinite else "finite number"
    return " ".join(filter(None, (number, start, end)))
