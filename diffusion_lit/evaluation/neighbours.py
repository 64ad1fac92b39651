"""Figures of nearest neighbours: precision and recall, density and coverage.

With r_k(i) the distance of image i to the k-th nearest other of its own set, for N real images i and M samples j:

    precision = (1 / M) sum_j [min_i d(i, j) / r_3(i) <= 1]     the share of samples that lie in a real ball
    recall    = (1 / N) sum_i [min_j d(i, j) / r_3(j) <= 1]     the share of real images that lie in a sample's ball
    density   = (1 / (5 M)) sum_ij [d(i, j) < r_5(i)]           how many real balls a sample lies in, over 5
    coverage  = (1 / N) sum_i [min_j d(i, j) < r_5(i)]          the share of real balls that hold a sample

Density and coverage are counted so that single outliers of the reference do not matter. Two sets of the same
distribution have on average a density of 1 and, with k = 5, a coverage of

    1 - (N - 1) ... (N - k) / ((M + N - 1) ... (M + N - k)),

which is near 1 - 1 / 2^k for equal numbers.

Sources: Kynkäänniemi et al. 2019 (arXiv 1904.06991), k = 3; Naeem et al. 2020 (arXiv 2002.09797), equations 5 and 6,
lemmas 1 and 2, k = 5.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

PRECISION_NEIGHBOURS = 3
NEIGHBOURS = 5
SAME = 1e-6  # a sample on a ball's edge, such as a copy of the neighbour that defines it, is outside despite rounding
DISTANCES = 2**25  # held at a time, 256 MiB in float64


def radii(features: Tensor, neighbours: Sequence[int] = (PRECISION_NEIGHBOURS, NEIGHBOURS)) -> Tensor:
    """The distance of each image to its k-th nearest other, which takes N^2 distances.

    Args:
        features: Features (N, d).
        neighbours: The k, each below N.

    Returns:
        Float64 (N, number of k).

    Raises:
        ValueError: If there are no more than k images.
    """
    if len(features) <= max(neighbours):
        raise ValueError(f"{max(neighbours)} neighbours need more images than that, not {len(features)}.")
    found = []
    for rows, distances in _distances(features, features):
        distances[torch.arange(len(rows)), rows] = 0  # which the product of matrices leaves at the size of its rounding
        found.append(distances.topk(max(neighbours) + 1, largest=False).values[:, list(neighbours)])
    return torch.cat(found)


def _distances(one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of one set and their float64 distances to all of the other, few at a time."""
    one, other = one.double(), other.double()
    for rows in torch.split(torch.arange(len(one)), max(1, DISTANCES // max(len(one), len(other)))):
        yield rows, torch.cdist(one[rows], other)


def precision_recall(
    generated: Tensor, reference: Tensor, reference_radii: Tensor | None = None
) -> tuple[float, float]:
    """Precision and recall of samples, k = 3.

    Args:
        generated: Features (M, d).
        reference: Features (N, d).
        reference_radii: The reference's `radii` for k = 3, (N,), where they are known.

    Returns:
        Precision and recall, each in [0, 1].

    Raises:
        ValueError: If either has no more than k images.
    """
    k = PRECISION_NEIGHBOURS
    if min(len(generated), len(reference)) <= k:
        raise ValueError(f"Precision and recall need more than {k} images on each side.")
    real = radii(reference, [k])[:, 0] if reference_radii is None else reference_radii
    made = radii(generated, [k])[:, 0]
    precise, recalled = torch.zeros_like(made, dtype=torch.bool), 0
    for rows, distances in _distances(reference, generated):
        precise |= (distances <= real[rows, None]).any(0)
        recalled += int((distances <= made).any(1).sum())
    return float(precise.double().mean()), recalled / len(reference)


def density_coverage(
    generated: Tensor, reference: Tensor, neighbours: int = NEIGHBOURS, reference_radii: Tensor | None = None
) -> tuple[float, float]:
    """Density and coverage of samples.

    Args:
        generated: Features (M, d).
        reference: Features (N, d).
        neighbours: k.
        reference_radii: The reference's `radii` for that k, (N,), where they are known.

    Returns:
        Density, at least 0, and coverage, in [0, 1].

    Raises:
        ValueError: If there are no more than k real images, or no sample.
    """
    if len(reference) <= neighbours or len(generated) == 0:
        raise ValueError(
            f"Density and coverage need more than {neighbours} real images and a sample, not {len(reference)} and "
            f"{len(generated)}."
        )
    real = radii(reference, [neighbours])[:, 0] if reference_radii is None else reference_radii
    inside, covered = 0, 0
    for rows, distances in _distances(reference, generated):
        hits = distances < real[rows, None] * (1 - SAME)
        inside += int(hits.sum())
        covered += int(hits.any(1).sum())
    return inside / (neighbours * len(generated)), covered / len(reference)
