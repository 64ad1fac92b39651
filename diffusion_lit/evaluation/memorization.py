"""Whether a model repeats its training images.

For an image s let `r(s) = d(s, nearest training image) / d(s, nearest held-out image)`. A model that has learned
the distribution and not the images draws samples whose r is distributed as that of held-out images themselves (each
taken out of the held-out set in turn), since training and held-out images are exchangeable. Two things follow.

A single sample is a copy when its r is too small for one of n. Near 0 the distribution of r is a power law, as
distances to nearest neighbours are: below the k-th smallest of m held-out values, `y = log(r_k / r)` is exponential
with an unknown rate. The k - 1 smaller held-out values give independent draws of it, whose sum is S, so that a further
value is as deep as y with the predictive probability

    P(r) = k / (m + 1) * (1 + y / S)^(1 - k)

which holds for every k and m, however few: no estimate of the rate is taken for the truth. A sample with n P(r) < 0.01
is a copy, and by Bonferroni's inequality the probability that there is one among n samples by chance is at most 0.01.

Many samples may lean to training images though none is a copy. Of n samples K lie below the 1% quantile of the
held-out r, the j-th smallest of m values; that there are so many or more has the exact probability of a beta-binomial
variable, BetaBin(n; j, m + 1 - j). Likewise a sample's nearest image of all is one of N training and M held-out
images of the former kind with probability N / (N + M).

All is asked in feature space, where meaning is close, and in pixel space, where copies are.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import betabinom
from torch import Tensor

from diffusion_lit.diffusion.images import take
from diffusion_lit.modules.protocols import ImageSource
from diffusion_lit.words import counted

QUANTILE = 0.01
SIGNIFICANT = 1e-3
FALSE_ALARM = 0.01  # probability of calling any of the samples a copy by chance
TAIL = 0.1  # share of the held-out values that the power law is fitted to
SHOWN = 12
CHUNK = 2048


@dataclass(frozen=True)
class Neighbours:
    """The nearest training and held-out image of each sample in one space.

    Args:
        ratio: r(s) of each sample, float64 (n,).
        training: Index of its nearest training image, int64 (n,).
        held_out: Index of its nearest held-out image, int64 (n,).
        copies: Indices of the samples that are copies, worst first.
        record: Shares, chances and the worst pairs as plain values; an infinite ratio is None.
    """

    ratio: Tensor
    training: Tensor
    held_out: Tensor
    copies: Tensor
    record: dict[str, Any]

    @property
    def memorised(self) -> bool:
        """Whether there are copies, or more samples lean to training images than chance allows."""
        return bool(self.record["memorised"])


def held_out_split(data: ImageSource) -> str:
    """The split of held-out images that memorisation is told by.

    Args:
        data: The data, set up.

    Returns:
        "test", or "val+test" where that one has a single image or none.

    Raises:
        ValueError: If fewer than 2 images are held out.
    """
    splits = ["test"]
    if len(data.reference_images("test")) < 2 and data.fingerprint("val") != data.fingerprint("test"):
        splits.append("val+test")
    there = {split: len(data.reference_images(split)) for split in splits}
    if there[splits[-1]] < 2:
        raise ValueError(
            "--memorization takes at least 2 images that the model was not trained on, and "
            f"{counted(there[splits[-1]], 'image', 'is', 'are')} held out; leave it out, or train with a larger "
            "val_fraction and test_fraction."
        )
    return splits[-1]


def nearest(
    queries: Any, points: Any, flips: bool = False, itself: bool = False, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The nearest point of each query by Euclidean distance, in float64.

    Args:
        queries: Features (n, d), or uint8 images (n, C, H, W), which are compared by their pixels in [0, 1].
        points: The same of N points.
        flips: Whether a mirrored query counts too (images only).
        itself: Whether queries and points are the same set, in which case a query is not its own neighbour.
        device: Where to compute.

    Returns:
        Distances, float64 (n,), and indices of the points, int64 (n,).

    Raises:
        ValueError: If there is no point to be near.
    """
    if len(points) <= int(itself):
        raise ValueError(f"{counted(len(points), 'image', 'is', 'are')} too few to look for neighbours in.")
    unit = 255 if torch.as_tensor(queries[:1]).dtype == torch.uint8 else 1  # whole numbers, so that ties are exact
    best = torch.full((len(queries),), float("inf"), dtype=torch.float64)
    index = torch.zeros(len(queries), dtype=torch.int64)
    for start in range(0, len(queries), CHUNK):
        asked = _vectors(queries, start, flips, device)
        closest = torch.full((asked[0].shape[0],), float("inf"), dtype=torch.float64, device=device)
        found = torch.zeros(asked[0].shape[0], dtype=torch.int64, device=device)
        for first in range(0, len(points), CHUNK):
            (there,) = _vectors(points, first, False, device)
            for query in asked:
                distance = query.square().sum(1)[:, None] + there.square().sum(1) - 2 * query @ there.T
                if itself:
                    same = torch.arange(start, start + len(query), device=device)[:, None] == torch.arange(
                        first, first + len(there), device=device
                    )
                    distance.masked_fill_(same, float("inf"))
                value, where = distance.min(1)
                closer = value < closest
                closest = torch.where(closer, value, closest)
                found = torch.where(closer, where + first, found)
        best[start : start + len(closest)] = closest.clamp(min=0).sqrt().cpu() / unit
        index[start : start + len(found)] = found.cpu()
    return best, index


def _vectors(rows: Any, start: int, flips: bool, device: torch.device | str) -> list[Tensor]:
    """A chunk of rows as float64 vectors, and their mirror images where asked."""
    chunk = torch.as_tensor(rows[start : start + CHUNK]).to(device)
    if chunk.dtype != torch.uint8:
        return [chunk.flatten(1).double()]
    chunk = chunk.double()
    return [chunk.flatten(1)] + ([chunk.flip(-1).flatten(1)] if flips else [])


def compare(
    samples: Any, training: Any, held_out: Any, flips: bool = False, device: torch.device | str = "cpu"
) -> Neighbours:
    """Compares samples' nearest training images with their nearest held-out ones in one space.

    Args:
        samples: Features (n, d), or uint8 images (n, C, H, W).
        training: The same of the N training images.
        held_out: The same of M held-out images, at least 2.
        flips: Whether training images were mirrored (images only).
        device: Where to compute.

    Returns:
        The neighbours, with the shares and chances in their record.
    """
    to_training, which_training = nearest(samples, training, flips, device=device)
    to_held_out, which_held_out = nearest(samples, held_out, flips, device=device)
    ratio = _ratio(to_training, to_held_out)
    real_training, _ = nearest(held_out, training, flips, device=device)
    real_held_out, _ = nearest(held_out, held_out, flips, itself=True, device=device)
    real = _ratio(real_training, real_held_out).sort().values
    rank = max(1, round(QUANTILE * len(real)))
    threshold = float(real[rank - 1])
    rank = int((real <= threshold).sum())  # more than asked for where values tie
    below = int((ratio <= threshold).sum())
    worst = ratio.argsort()
    expected = len(ratio) * tail_probability(ratio[worst], real)
    copies = worst[expected < FALSE_ALARM]
    chance = chance_of(below, len(ratio), rank, len(real))
    record = {
        "memorised": len(copies) > 0 or chance < SIGNIFICANT,
        "copies": len(copies),
        "share_of_copies": len(copies) / len(ratio),
        "first_copies": copies[:100].tolist(),
        "share_below_quantile": below / len(ratio),
        "share_below_quantile_by_chance": rank / (len(real) + 1),
        "p_value": chance,
        "smallest_p_value": chance_of(len(ratio), len(ratio), rank, len(real)),
        "quantile": _finite(threshold),
        "median_ratio": _finite(ratio.median()),
        "median_ratio_of_held_out": _finite(real.median()),
        "nearest_is_training": float((to_training < to_held_out).double().mean()),
        "nearest_is_training_by_chance": len(training) / (len(training) + len(held_out)),
        "worst": [
            {
                "sample": int(index),
                "training": int(which_training[index]),
                "held_out": int(which_held_out[index]),
                "ratio": _finite(ratio[index]),
            }
            for index in worst[:SHOWN]
        ],
    }
    return Neighbours(ratio, which_training, which_held_out, copies, record)


def tail_probability(ratio: Tensor, real: Tensor) -> Tensor:
    """Probability that a further held-out image has so small an r, predicted from the smallest ones.

    Args:
        ratio: Values of r, float64 (n,).
        real: Those of the m held-out images, rising, float64 (m,).

    Returns:
        P(r) of each, (n,): 1 from the k-th smallest held-out value on, at least the share of held-out values that are
        not larger, and 1 everywhere where the held-out values have no tail to predict from.
    """
    count, total = min(len(real), max(10, round(TAIL * len(real)))), len(real) + 1
    largest = real[count - 1]
    sum_of_depths = torch.log(largest / real[: count - 1].clamp(min=1e-12)).sum()
    if not (largest > 0 and torch.isfinite(largest) and sum_of_depths > 1e-6):  # copies or ties among real images
        return torch.ones_like(ratio)
    depth = torch.log(largest / ratio).clamp(min=0)
    predicted = count / total * (1 + depth / sum_of_depths) ** (1 - count)
    seen = torch.searchsorted(real, ratio.contiguous(), right=True) / total
    return torch.where(ratio < largest, torch.maximum(predicted, seen), 1.0)


def chance_of(below: int, count: int, rank: int, held_out: int) -> float:
    """Probability that samples of the same distribution as held-out images have at least this many below a quantile.

    Args:
        below: Number of samples at or below the threshold.
        count: Number of samples n.
        rank: The threshold is the rank-th smallest held-out value.
        held_out: Number m of held-out values.

    Returns:
        P(K >= below) of the beta-binomial distribution BetaBin(n; rank, m + 1 - rank).
    """
    hits = betabinom.pmf(np.arange(below, count + 1), count, rank, held_out + 1 - rank)  # its own `sf` is 1 - cdf
    return float(min(1.0, hits.sum()))


def _finite(value: Tensor | float) -> float | None:
    """A ratio for a record; None for an infinite one, as of a held-out image with a copy among the others."""
    return float(value) if math.isfinite(value) else None


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Above / below, 1 where both are 0."""
    return torch.where(below > 0, above / below.clamp(min=1e-300), torch.where(above > 0, float("inf"), 1.0))


def worst_triples(neighbours: Neighbours, samples: Tensor, training: Any, held_out: Any) -> Tensor:
    """The samples most like a training image, each beside its nearest training and held-out image.

    Args:
        neighbours: As from `compare`.
        samples: The samples, uint8 (n, C, H, W).
        training: The training images.
        held_out: The held-out images.

    Returns:
        Triples, worst first, uint8 (at most 12, 3, C, H, W).
    """
    worst = neighbours.ratio.argsort()[:SHOWN]
    near, other = take(training, neighbours.training[worst]), take(held_out, neighbours.held_out[worst])
    return torch.stack([samples[worst], near, other], dim=1)
