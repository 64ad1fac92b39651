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

import math
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
        neighbours: The k, in rising order.

    Returns:
        Float64 (N, number of k), NaN where there are no more than k images.
    """
    known = [k for k in neighbours if k < len(features)]
    found = torch.full((len(features), len(neighbours)), math.nan, dtype=torch.float64, device=features.device)
    for rows, distances in _distances(features, features) if known else ():
        distances[torch.arange(len(rows)), rows] = 0  # which the product of matrices leaves at the size of its rounding
        found[rows, : len(known)] = distances.topk(known[-1] + 1, largest=False).values[:, known]
    return found


def _distances(one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of one set and their float64 distances to all of the other, few at a time."""
    one, other = one.double(), other.double()
    for rows in torch.split(torch.arange(len(one)), max(1, DISTANCES // max(len(one), len(other)))):
        yield rows, torch.cdist(one[rows], other)


def neighbour_figures(generated: Tensor, reference: Tensor, reference_radii: Tensor | None = None) -> dict[str, float]:
    """Precision, recall, density and coverage of samples, from one pass over the distances.

    Args:
        generated: Features (M, d).
        reference: Features (N, d).
        reference_radii: The reference's `radii`, (N, 2), where they are known.

    Returns:
        `precision` and `recall` where there are more than 3 images on each side, `density` and `coverage` where there
        are more than 5 real images and a sample.
    """
    near, far = (radii(reference) if reference_radii is None else reference_radii).unbind(1)
    made = radii(generated, [PRECISION_NEIGHBOURS])[:, 0]
    precise, recalled, inside, covered = torch.zeros_like(made, dtype=torch.bool), 0, 0, 0
    for rows, distances in _distances(reference, generated):
        precise |= (distances <= near[rows, None]).any(0)
        recalled += int((distances <= made).any(1).sum())
        hits = distances < far[rows, None] * (1 - SAME)
        inside += int(hits.sum())
        covered += int(hits.any(1).sum())
    n, m = len(reference), len(generated)
    figures: dict[str, float] = {}
    if min(n, m) > PRECISION_NEIGHBOURS:
        figures |= {"precision": float(precise.double().mean()), "recall": recalled / n}
    if n > NEIGHBOURS and m:
        figures |= {"density": inside / (NEIGHBOURS * m), "coverage": covered / n}
    return figures
