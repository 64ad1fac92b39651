"""Writes a folder of images as chunks that `datamodules.Streamed` reads, by litdata.

    python -m datamodules.write_chunks --root photos --output /mnt/data/photos --image_size 64
    python -m datamodules.write_chunks --root photos --output s3://bucket/photos --image_size 256 --val_fraction 0.001

Classes, splits and pixels are those that `ImageFolder` makes of the folder, and so is the order: that of the hashes of
the files, which is random. No more than a few chunks of the set lie on this machine at a time where it goes to a cloud.
Pixels are stored as they are, 3 bytes each, so that reading needs no decoder.
"""

import hashlib
import json
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jsonargparse import CLI

from datamodules.cache import bits_of, content_hashes
from datamodules.catalogue import ITEM, Catalogue, hash_of
from datamodules.decode import BadImageError, Transform, decode
from datamodules.layout import describe_classes, held_out_of, lay_out
from datamodules.sources import Listing, list_images, printable
from diffusion_lit.checks import check_count, check_number
from diffusion_lit.words import counted

CLOUDS = ("s3://", "gs://", "r2://")
WRITTEN = struct.Struct("<QQi")  # row, hash and class of an image
TOLD = 5  # skipped images that are named


def encode(listing: Listing, transform: Transform, notes: str, what: tuple[int, str, int]) -> dict[str, Any] | None:
    """Decodes an image into the item that litdata writes, and notes what was written and what was not.

    Args:
        listing: Where the images lie.
        transform: What to make of each.
        notes: Folder of the notes, a file for each process.
        what: The row, the name and the class of an image.

    Returns:
        Its pixels (C, size, size), uint8, and its class; None where it cannot be used.
    """

    def note(kind: str, line: bytes) -> None:
        with open(os.path.join(notes, f"{kind}.{os.getpid()}"), "ab") as file:
            file.write(line)

    row, name, label = what
    try:
        with listing.open(name) as file:
            pixels = decode(file, transform)
    except (BadImageError, OSError) as error:
        note("skipped", f"{printable(name)} {error}\n".encode("utf-8", "surrogateescape"))
        return None
    note("written", WRITTEN.pack(row, hash_of(pixels.tobytes()), label))
    return {"image": pixels, "label": label}


def write_chunks(
    root: str,
    output: str,
    image_size: int,
    channels: int = 3,
    resize: Literal["lanczos", "area"] = "lanczos",
    crop: int | None = None,
    upscale: bool = False,
    val_fraction: float = 0.05,
    test_fraction: float = 0.05,
    use_labels: bool = True,
    chunk_mb: float = 64.0,
    processes: int = 1,
) -> None:
    """Writes a folder of images as chunks.

    Args:
        root: A folder, a zip or a glob of images; see `ImageFolder`.
        output: An empty or new folder, or a URL s3://, gs:// or r2:// with the rights to write there.
        image_size: Pixels per side.
        channels: 3 for colour, 1 for grey.
        resize: "lanczos", the sharper, or "area", the mean over the pixels that fall into each.
        crop: Pixels per side of the centre square that is kept before resizing; by default as many as fit.
        upscale: Whether images smaller than image_size are enlarged rather than left out.
        val_fraction: Share of the training images held out for validation, where there is no val folder.
        test_fraction: Share held out as test split, where there is no test folder.
        use_labels: Whether folders may be classes.
        chunk_mb: Megabytes (2^20 bytes) of a chunk.
        processes: Processes that decode.

    Raises:
        ValueError: If a value is out of range, there is no image to use, or the output is not empty.
        ModuleNotFoundError: If litdata is not installed.
    """
    check_number(least=0, below=0.5, val_fraction=val_fraction, test_fraction=test_fraction)
    check_number(above=0, most=2048, chunk_mb=chunk_mb)
    check_count(processes=processes)
    transform = Transform(image_size, channels, resize, crop, upscale)
    cloud = output.startswith(CLOUDS)
    if "://" in output and not cloud:
        raise ValueError(f"output is {output!r}; give a folder, or a URL that begins with {', '.join(CLOUDS)}.")
    if not cloud and os.path.exists(output) and (not os.path.isdir(output) or os.listdir(output)):
        raise ValueError(f"{output} is there and not empty; give another output, or remove it.")
    listing = list_images(root)
    splits, classes = deal(listing, val_fraction, test_fraction, use_labels)
    names = [name for split in splits.values() for name, _ in split]
    if not splits.get("train"):
        raise ValueError(
            f"{listing.label} has {counted(len(listing.images), 'image')}, of which none is left to train on; give "
            "a folder with more, or set val_fraction and test_fraction to 0."
        )
    transform = replace(transform, bits=bits_of(listing, names))
    items, skipped = {}, []
    per_chunk = max(1, round(chunk_mb * 2**20 / (int(np.prod(transform.shape)) + 40)))
    for split, images in splits.items():
        written, left_out = _optimize(listing, transform, images, f"{output}/{split}", per_chunk, processes)
        skipped += left_out
        if len(written):
            items[split] = written
    if "train" not in items:
        raise ValueError(f"No training image of {listing.label} can be used: {'; '.join(skipped[:TOLD])}.")
    hashes = {split: hashlib.sha256(written.tobytes()).hexdigest() for split, written in items.items()}
    counts = {split: len(written) for split, written in items.items()}
    with tempfile.TemporaryDirectory() as scratch:
        for split, written in items.items():
            _deliver(written.tobytes(), f"{split}/items.dat", output, scratch)
        catalogue = Catalogue(transform.shape, classes, counts, hashes)
        _deliver(json.dumps(catalogue.record()).encode(), "catalogue.json", output, scratch)  # last: now it is whole
    told = ", ".join(f"{count:,} of {split}" for split, count in counts.items())
    print(f"Images in {output}: {told}; {describe_classes(classes)}.")
    if skipped:
        more = f"; and {len(skipped) - TOLD} more" if len(skipped) > TOLD else ""
        print(
            f"{counted(len(skipped), 'image', 'was', 'were')} left out: {'; '.join(skipped[:TOLD])}{more}.",
            file=sys.stderr,
        )


def deal(
    listing: Listing, val_fraction: float, test_fraction: float, use_labels: bool
) -> tuple[dict[str, list[tuple[str, int]]], list[str]]:
    """Deals images to splits as `ImageFolder` does.

    Args:
        listing: The images.
        val_fraction: Share of the training images held out for validation, where there is no val folder.
        test_fraction: Share held out as test split, where there is no test folder.
        use_labels: Whether folders may be classes.

    Returns:
        Names and classes of the images of each split, in the order of the hashes of their files; and the classes.
    """
    layout = lay_out(listing, use_labels)
    found = content_hashes(listing, layout.pools)
    number = {name: place for place, name in enumerate(layout.classes)}
    splits: dict[str, list[tuple[str, int]]] = {}
    hashes: dict[str, list[str]] = {}
    for pool, images in layout.pools.items():
        if images:
            ranked = sorted((image.name for image in images), key=lambda name: (found[name], name))
            hashes[pool] = [found[name] for name in ranked]
            splits[pool] = [(name, number.get(str(layout.class_of(name)), 0)) for name in ranked]
    train = splits.get("train", [])
    val = 0 if "val" in splits else held_out_of(hashes.get("train", []), val_fraction, lowest=True)
    test = 0 if "test" in splits else held_out_of(hashes.get("train", []), test_fraction, lowest=False)
    if val:
        splits["val"] = train[:val]
    if test:
        splits["test"] = train[len(train) - test :]
    splits["train"] = train[val : max(val, len(train) - test)]
    return splits, layout.classes


def _optimize(
    listing: Listing,
    transform: Transform,
    images: Sequence[tuple[str, int]],
    output: str,
    per_chunk: int,
    processes: int,
) -> tuple[np.ndarray, list[str]]:
    """Has litdata write one split; returns hashes and classes of what was written, in its order, and what was not."""
    if not images:
        return np.empty(0, ITEM), []
    try:
        import litdata
    except ImportError as error:
        raise ModuleNotFoundError("Chunks are written by litdata; pip install 'diffusion-lit[streaming]'.") from error
    with tempfile.TemporaryDirectory() as notes:
        litdata.optimize(
            partial(encode, listing, transform, notes),
            [(row, name, label) for row, (name, label) in enumerate(images)],
            output,
            chunk_size=per_chunk,
            num_workers=min(processes, len(images)),
            keep_data_ordered=True,
            reorder_files=False,
            start_method="fork" if sys.platform == "linux" else None,
            verbose=False,
        )
        written = b"".join(path.read_bytes() for path in Path(notes).glob("written.*"))
        skipped = [line for path in sorted(Path(notes).glob("skipped.*")) for line in path.read_text().splitlines()]
    rows = sorted(WRITTEN.iter_unpack(written))  # as litdata keeps the order of the inputs
    return np.array([(digest, label) for _, digest, label in rows], ITEM), skipped


def _deliver(content: bytes, name: str, output: str, scratch: str) -> None:
    """Puts a file beside the chunks."""
    place = Path(scratch, name.replace("/", "."))
    place.write_bytes(content)
    if output.startswith(CLOUDS):
        from litdata.streaming.fs_provider import _get_fs_provider

        _get_fs_provider(output).upload_file(str(place), f"{output.rstrip('/')}/{name}")
    else:
        shutil.copy(place, Path(output, name))


if __name__ == "__main__":
    CLI(write_chunks, as_positional=False)
