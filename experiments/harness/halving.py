"""Successive halving: the rounds of a race, and who goes on."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BASE = "as configured"  # the config itself, which takes part in every round
TRAINING = 0.7  # share of the hours that trainings take; the rest is for starting, sampling and measuring
SIGNIFICANT = 2.0  # standard errors of a difference


@dataclass(frozen=True)
class Round:
    """A round of the race.

    Args:
        count: Number of variants, with the config itself.
        minutes: Time of each training.
        seeds: Number of seeds.
    """

    count: int
    minutes: float
    seeds: int


@dataclass(frozen=True)
class Result:
    """The result of a variant in a round.

    Args:
        name: The variant.
        minutes: Time of each training.
        figure: The mean figure, lower being better.
        error: Its standard error.
        images: Images seen, on average.
        place: Folder of the first training.
        options: What differs from the config.
        batch_size: Images per step.
    """

    name: str
    minutes: float
    figure: float
    error: float
    images: float
    place: Path
    options: dict[str, Any]
    batch_size: int

    def against(self, base: "Result") -> str:
        """Whether the variant helped, against the config in the same round."""
        difference, error = self.figure - base.figure, math.hypot(self.error, base.error)
        if abs(difference) <= SIGNIFICANT * error:
            return "no difference seen"
        return "helps" if difference < 0 else "hurts"


def plan(count: int, hours: float, finalists: int, seeds: int) -> list[Round]:
    """The rounds: half of the variants go on each time, for twice as long, and the last round has several seeds.

    Args:
        count: Number of variants, with the config itself.
        hours: How long all may take.
        finalists: Variants in the last round, beside the config itself.
        seeds: Seeds in the last round.

    Returns:
        The rounds, whose trainings take `TRAINING` of the hours.
    """
    counts = [count]
    while counts[-1] - 1 > finalists:
        counts.append(max(finalists, math.ceil((counts[-1] - 1) / 2)) + 1)
    of_last = [1] * (len(counts) - 1) + [seeds]
    takes_part = [number + (index == len(counts) - 1 and number > 2) for index, number in enumerate(counts)]
    units = sum(number * 2**index * of_last[index] for index, number in enumerate(takes_part))
    unit = TRAINING * 60 * hours / units
    return [Round(number, unit * 2**index, of_last[index]) for index, number in enumerate(counts)]


def survivors(field: dict[str, Any], results: dict[str, Result], count: int) -> dict[str, Any]:
    """The config itself and the best variants.

    Args:
        field: Options by variant.
        results: Of the round that they took part in; those that failed are missing.
        count: Number of variants that go on, with the config itself.
    """
    others = sorted((one for one in results.values() if one.name != BASE), key=lambda one: one.figure)
    return {BASE: field[BASE]} | {one.name: field[one.name] for one in others[: count - 1]}


def combined(field: dict[str, Any], results: dict[str, Result]) -> dict[str, Any]:
    """The options of all variants; of two that set the same, the better one's."""
    names = sorted(field, key=lambda name: -results[name].figure if name in results else -math.inf)
    made: dict[str, Any] = {}
    for name in names:
        made = {key: value for key, value in made.items() if not _same_part(key, field[name])} | field[name]
    return made


def _same_part(key: str, options: dict[str, Any]) -> bool:
    """Whether an option lies within, or around, one of others."""
    return any(key == one or key.startswith(f"{one}.") or one.startswith(f"{key}.") for one in options)
