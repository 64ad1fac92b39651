"""The real side of a distance: features and statistics of a split, kept under a key of all that determines them.

The key holds the data's fingerprint (its pixels, or its files and transform), split, number and shape of the images,
and the extractor with the hash of its weights. A file in the cache carries its key and is used only when it is the one
asked for. `real_against_real` gives the floor: what a perfect model would get from the same number of images.
"""

from collections.abc import Callable
from importlib.metadata import version

import torch

from diffusion_lit.diffusion.images import take
from diffusion_lit.diffusion.rng import keyed_generator
from diffusion_lit.evaluation.features import FeatureExtractor, Features
from diffusion_lit.evaluation.metrics import Reference, Statistics, check_split, frechet_distance
from diffusion_lit.modules.protocols import ImageSource
from diffusion_lit.storage.tensors import kept_tensors

FORMAT = 1


def reference_of(
    data: ImageSource,
    split: str,
    extractor: FeatureExtractor,
    batch_size: int = 64,
    limit: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Reference:
    """Features of a split, from the cache or computed now.

    Args:
        data: The data set, set up.
        split: "train", "val", "test", or several joined by "+".
        extractor: A loaded extractor.
        batch_size: Images at a time.
        limit: Takes that many images, chosen by a fixed key; all by default.
        progress: Called with the number of images after each batch.

    Returns:
        The reference, which has features; that of a single image has no statistics.

    Raises:
        ValueError: If there is no image, or images do not have the shape that the data set says or look scaled to 0
            to 1.
    """
    images = data.reference_images(split)
    labels = data.reference_labels(split)
    total = len(images)
    check_split(split, total, least=1)
    if tuple(images.shape[1:]) != tuple(data.image_shape):
        raise ValueError(
            f"The images of {split} have shape {tuple(images.shape[1:])}, but the data set says "
            f"{tuple(data.image_shape)}; the reference must be resized as the training images are."
        )
    if limit is not None and limit < total:
        rows = torch.randperm(total, generator=keyed_generator("reference", split))[:limit].sort().values
        images, labels = take(images, rows), None if labels is None else labels[rows]
    record = {
        "format": FORMAT,
        "dataset": type(data).__name__,
        "split": split,
        "count": len(images),
        "image_shape": list(data.image_shape),
        "fingerprint": data.fingerprint(split),
        "extractor": extractor.identity(),
        "torch_fidelity": version("torch-fidelity"),
    }
    kept = kept_tensors("references", record, lambda: extractor.extract(images, batch_size, progress).tensors())
    return Reference(Features(**kept), labels=labels, record=record)


def real_pairs(
    reference: Reference, held_out: Features | None, count: int, blocks: int = 1
) -> list[tuple[Features, Reference]]:
    """Disjoint real sets that show what a perfect model would get.

    Held-out images against the reference where there are `count` of them; else `count` images of both together
    against all others, as long as these are at least half as many; else the held-out images there are.

    Args:
        reference: The reference.
        held_out: Features of real images that are not in it, or None.
        count: Number of generated images.
        blocks: Most pairs; their drawn sets are disjoint.

    Returns:
        Features of the images that stand for generated ones, and what they are compared with, for each pair; empty
        where there are too few real images for any.
    """
    spare = 0 if held_out is None else len(held_out)
    if held_out is not None and spare >= count:
        order = torch.randperm(spare, generator=keyed_generator("floor"))
        return [
            (held_out[order[block * count : (block + 1) * count]], reference)
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
                pairs.append((pool[chosen], Reference(pool[~chosen])))
            return pairs
    if held_out is not None and spare >= 2:
        return [(held_out, reference)]
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
    drawn, rest = pairs[0]
    return frechet_distance(Statistics.of(drawn.features), rest.statistics), len(drawn)
