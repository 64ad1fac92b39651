"""What the names of images' folders mean: classes, splits, or nothing; see `folder`."""

import hashlib
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from datamodules.sources import Image, Listing, Skip, printable
from diffusion_lit.words import counted

SHOWN = 12  # classes listed one by one

POOLS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """What a listing means.

    Args:
        listing: Where the images lie.
        pools: The images of "train", "val" and "test" as they are on disk; all are "train" where there are no splits.
        classes: Names of the classes, sorted; empty where there are none.
        prefix: The part of the names that all share.
        split: Whether there are splits on disk.
        note: Why folders are no classes, where one may wonder; empty otherwise.
    """

    listing: Listing
    pools: dict[str, list[Image]]
    classes: list[str]
    prefix: str
    split: bool
    note: str = ""

    def class_of(self, name: str) -> str | None:
        """The class of an image.

        Args:
            name: Its name in the listing.

        Returns:
            The name of its folder, or None where it is in none.
        """
        parts = name[len(self.prefix) :].split("/")[int(self.split) :]
        return parts[0] if len(parts) > 1 else None


def lay_out(listing: Listing, use_labels: bool = True) -> Layout:
    """Finds splits and classes in the names of a listing.

    Args:
        listing: The images.
        use_labels: Whether folders may be classes.

    Returns:
        The layout. Images beside the splits or classes, which have none, are added to what the listing skipped.
    """
    prefix = _common(listing.images)
    skipped = list(listing.skipped)
    pools: dict[str, list[Image]] = {"train": [], "val": [], "test": []}
    heads = {image.name[len(prefix) :].partition("/")[0] for image in listing.images}
    found = {POOLS[head] for head in heads if head in POOLS}
    split = "train" in found and len(found) > 1
    for image in sorted(listing.images, key=lambda image: _rank(image.name[len(prefix) :])):
        head, _, rest = image.name[len(prefix) :].partition("/")
        if split and not (rest and head in POOLS):
            skipped.append(Skip(image.name, "lies beside the folders of the splits"))
        else:
            pools[POOLS[head] if split else "train"].append(image)
    layout = Layout(listing, pools, [], prefix, split)
    counts = Counter(layout.class_of(image.name) for image in pools["train"])
    beside = counts.pop(None, 0)
    names = sorted((name for name in counts if name is not None), key=natural)
    note = ""
    if len(names) < 2 or not use_labels:
        names = []
    elif beside > sum(counts.values()) / len(names):
        note = (
            f"{counted(beside, 'image', 'lies', 'lie')} beside the {len(names)} folders, which are therefore no classes"
        )
        names = []
    for pool, images in pools.items() if names else ():
        strays = [image for image in images if layout.class_of(image.name) not in names]
        for image in strays:
            none = layout.class_of(image.name) is None
            where = "beside the folders of the classes" if none else "in the folder of no training class"
            skipped.append(Skip(image.name, f"lies {where}"))
        pools[pool] = [image for image in images if layout.class_of(image.name) in names]
    return Layout(replace(listing, skipped=skipped), pools, names, prefix, split, note)


def natural(name: str) -> tuple[list[tuple[int, int | str]], str]:
    """Sorts names as people do: numbers in them as numbers, "2" before "10".

    Returns:
        What to sort it by.
    """
    parts = [part for part in re.split("([0-9]+)", name) if part]
    return [(0, int(part)) if part[0] in "0123456789" else (1, part) for part in parts], name


def hash_at(fraction: float) -> str:
    """The hash below which a share of all hashes lie.

    Args:
        fraction: The share, in [0, 1).

    Returns:
        16 hexadecimal digits.
    """
    return f"{int(fraction * 2**64):016x}"


def held_out_of(hashes: Sequence[str], fraction: float, lowest: bool) -> int:
    """How many images are held out at one end of their rising hashes.

    Args:
        hashes: The hashes of their files' contents, rising.
        fraction: The share of all hashes, in [0, 1).
        lowest: Whether those with the lowest hashes are held out, or those with the highest.

    Returns:
        At least 1, unless the share is 0.
    """
    if not fraction:
        return 0
    place = bisect_left(hashes, hash_at(fraction if lowest else 1 - fraction))
    return max(1, place if lowest else len(hashes) - place)


def describe_classes(names: Sequence[str], counts: Mapping[str | None, int] | None = None) -> str:
    """Classes with their numbers and counts, in one line.

    Args:
        names: The classes in the order of their numbers.
        counts: Images of each by its name.

    Returns:
        Such as "2 classes: 0 = cat (160), 1 = dog (158)"; of many, the first and the last.
    """
    if not names:
        return "no classes"
    told = [
        f"{number} = {printable(name)}" + ("" if counts is None else f" ({counts[name]})")
        for number, name in enumerate(names)
    ]
    shown = told if len(told) <= SHOWN else [*told[: SHOWN - 2], "...", told[-1]]
    return f"{counted(len(names), 'class')}: {', '.join(shown)}"


def _rank(name: str) -> str:
    """Puts names in an order that is random and always the same."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()


def _common(images: Sequence[Image]) -> str:
    """The folders that all names begin with."""
    if not images:
        return ""
    first, last = (image.name.split("/")[:-1] for image in (images[0], images[-1]))  # sorted: all others lie between
    shared = takewhile(lambda parts: parts[0] == parts[1], zip(first, last, strict=False))
    return "".join(f"{part}/" for part, _ in shared)
