"""The real side of a distance: features and statistics of a split, kept under a key of all that determines them.

The key holds the data's fingerprint (its pixels, or its files and transform), split, number and shape of the images,
and the extractor with the hash of its weights. A file in the cache carries its key and is used only when it is the one
asked for. `real_against_real` gives the floor: what a perfect model would get from the same number of images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from diffusion_lit.diffusion.images import take
from diffusion_lit.diffusion.rng import keyed_generator
from diffusion_lit.evaluation.features import FeatureExtractor, Features
from diffusion_lit.evaluation.metrics import Statistics, frechet_distance
from diffusion_lit.modules.protocols import ImageSource
from diffusion_lit.storage.cache import cache_folder
from diffusion_lit.storage.hashing import key_of
from diffusion_lit.storage.tensors import kept_tensors
from diffusion_lit.words import counted

FORMAT = 1


@dataclass(frozen=True)
class Reference:
    """What generated images are compared with.

    Args:
        statistics: Mean and covariance of the features.
        features: The features, or None where only the statistics are known.
        count: Number of images, or None where the file does not say.
        labels: Classes int64 (N,) of the images, or None.
        record: All that determines it, for receipts.
    """

    statistics: Statistics
    features: Features | None
    count: int | None
    labels: Tensor | None
    record: dict[str, Any]


def reference_of(
    data: ImageSource,
    split: str,
    extractor: FeatureExtractor,
    batch_size: int = 64,
    limit: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Reference:
    """Features and statistics of a split, from the cache or computed now.

    Args:
        data: The data set, set up.
        split: "train", "val", "test", or several joined by "+".
        extractor: A loaded extractor.
        batch_size: Images at a time.
        limit: Takes that many images, chosen by a fixed key; all by default.
        progress: Called with the number of images after each batch.

    Returns:
        The reference.

    Raises:
        ValueError: As `features_of`, or if there are fewer than 2 images.
    """
    features, labels, record = _read(data, split, extractor, batch_size, limit, progress, least=2)
    return Reference(Statistics.of(features.features), features, len(features), labels, record)


def features_of(
    data: ImageSource,
    split: str,
    extractor: FeatureExtractor,
    batch_size: int = 64,
    limit: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Features:
    """Features of a split, from the cache or computed now; arguments as of `reference_of`.

    Returns:
        The features of its images, be it a single one.

    Raises:
        ValueError: If there is no image, or images do not have the shape that the data set says or look scaled to 0
            to 1.
    """
    return _read(data, split, extractor, batch_size, limit, progress, least=1)[0]


def _read(
    data: ImageSource,
    split: str,
    extractor: FeatureExtractor,
    batch_size: int,
    limit: int | None,
    progress: Callable[[int], object] | None,
    least: int,
) -> tuple[Features, Tensor | None, dict[str, Any]]:
    """Features, classes and record of a split of at least so many images."""
    images = data.reference_images(split)
    labels = data.reference_labels(split)
    total = len(images)
    if total < least:
        raise ValueError(
            f"The split {split} has {counted(total, 'image')}, too few to compare with; take another split, or hold "
            "out more images."
        )
    if tuple(images.shape[1:]) != tuple(data.image_shape):
        raise ValueError(
            f"The images of {split} have shape {tuple(images.shape[1:])}, but the data set says "
            f"{tuple(data.image_shape)}; the reference must be resized as the training images are."
        )
    if limit is not None and limit < total:
        rows = torch.randperm(total, generator=keyed_generator("reference", split))[:limit].sort().values
        images, labels = take(images, rows), None if labels is None else labels[rows]
    record = reference_record(data, split, extractor, len(images))
    path = cache_folder() / "references" / f"{key_of(record)[:32]}.safetensors"
    kept = kept_tensors(path, record, lambda: extractor.extract(images, batch_size, progress).tensors())
    return Features(kept["features"], kept.get("logits")), labels, record


def reference_record(data: ImageSource, split: str, extractor: FeatureExtractor, count: int) -> dict[str, Any]:
    """All that determines the features of a split.

    Args:
        data: The data set, set up.
        split: As in `reference_of`.
        extractor: A loaded extractor.
        count: Number of images.

    Returns:
        Plain values.
    """
    return {
        "format": FORMAT,
        "dataset": type(data).__name__,
        "split": split,
        "count": count,
        "image_shape": list(data.image_shape),
        "fingerprint": data.fingerprint(split),
        "extractor": extractor.identity(),
        "torch_fidelity": version("torch-fidelity"),
    }


@dataclass(frozen=True)
class Pair:
    """Two disjoint sets of real images for the floor.

    Args:
        drawn: Features of the images that stand for generated ones.
        rest: Statistics of those that they are compared with.
        reference: Features of the latter, or None where only the statistics are known.
    """

    drawn: Features
    rest: Statistics
    reference: Features | None


def real_pairs(reference: Reference, held_out: Features | None, count: int, blocks: int = 1) -> list[Pair]:
    """Disjoint real sets that show what a perfect model would get.

    Held-out images against the reference where there are `count` of them; else `count` images of both together
    against all others, as long as these are at least half as many; else the held-out images there are.

    Args:
        reference: The reference.
        held_out: Features of real images that are not in it, or None.
        count: Number of generated images.
        blocks: Most pairs; their drawn sets are disjoint.

    Returns:
        The pairs; empty where there are too few real images for any.
    """
    spare = 0 if held_out is None else len(held_out)
    if held_out is not None and spare >= count:
        order = torch.randperm(spare, generator=keyed_generator("floor"))
        return [
            Pair(held_out[order[block * count : (block + 1) * count]], reference.statistics, reference.features)
            for block in range(min(blocks, spare // count))
        ]
    if reference.features is not None:
        pool = reference.features if held_out is None else Features.cat([reference.features, held_out])
        if len(pool) - count >= max(count / 2, 2):
            order = torch.randperm(len(pool), generator=keyed_generator("floor"))
            pairs = []
            for block in range(min(blocks, len(pool) // count)):
                chosen = torch.zeros(len(pool), dtype=torch.bool)
                chosen[order[block * count : (block + 1) * count]] = True
                pairs.append(Pair(pool[chosen], Statistics.of(pool[~chosen].features), pool[~chosen]))
            return pairs
    if held_out is not None and spare >= 2:
        return [Pair(held_out, reference.statistics, reference.features)]
    return []


def real_against_real(reference: Reference, held_out: Features | None, count: int) -> tuple[float, int] | None:
    """The floor of the Fréchet distance.

    Args:
        reference: The reference.
        held_out: Features of real images that are not in it, or None.
        count: Number of generated images.

    Returns:
        The distance and the number of images it was taken at, which is `count` where there are enough; None where
        there are too few.
    """
    pairs = real_pairs(reference, held_out, count)
    if not pairs:
        return None
    return frechet_distance(Statistics.of(pairs[0].drawn.features), pairs[0].rest), len(pairs[0].drawn)
