"""Chunks as litdata writes them, made without it from the layout that `datamodules.chunks` states."""

import hashlib
import json
import struct

import numpy as np


def chunk_of(images, labels):
    """The bytes of a chunk."""
    items = []
    for image, label in zip(images, labels, strict=True):
        array = struct.pack("<5I", 4, 3, *image.shape) + image.tobytes()
        items.append(struct.pack("<2I", len(array), 8) + array + struct.pack("<q", label))
    table = 4 * (len(items) + 2) + np.cumsum([0, *map(len, items)])
    return struct.pack(f"<{len(items) + 2}I", len(items), *table) + b"".join(items)


def write_set(folder, counts, per_chunk=4, side=4, classes=("even", "odd"), seed=0):
    """A set whose labels are the parity of the rows; returns the images of each split."""
    rng = np.random.default_rng(seed)
    found, hashes = {}, {}
    for split, count in counts.items():
        (folder / split).mkdir(parents=True)
        images = rng.integers(0, 256, (count, 3, side, side), dtype=np.uint8)
        labels = np.arange(count) % 2
        chunks = []
        for number, start in enumerate(range(0, count, per_chunk)):
            rows = slice(start, start + per_chunk)
            content = chunk_of(images[rows], labels[rows])
            name = f"chunk-0-{number}.bin"
            (folder / split / name).write_bytes(content)
            chunks.append({"filename": name, "chunk_size": len(images[rows]), "chunk_bytes": len(content), "dim": None})
        config = {"data_format": ["numpy", "int"], "compression": None, "encryption": None}
        (folder / split / "index.json").write_text(json.dumps({"chunks": chunks, "config": config}))
        items = b"".join(
            hashlib.sha256(image.tobytes()).digest()[:8] + struct.pack("<i", label)
            for image, label in zip(images, labels, strict=True)
        )
        (folder / split / "items.dat").write_bytes(items)
        found[split], hashes[split] = images, hashlib.sha256(items).hexdigest()
    record = {"format": 1, "shape": [3, side, side], "classes": list(classes), "counts": counts, "hashes": hashes}
    (folder / "catalogue.json").write_text(json.dumps(record))
    return found
