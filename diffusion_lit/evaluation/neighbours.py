"""Density and coverage: like precision and recall, but counted so that single outliers of the reference do not matter.

With r_i the distance of real image i to its k-th nearest real neighbour, and samples j of number M:

    density  = (1 / (k M)) sum_ij [d(i, j) < r_i]      how many real balls a sample lies in, over k: may exceed 1
    coverage = (1 / N) sum_i [min_j d(i, j) < r_i]     the share of real balls that hold a sample

Two sets of the same distribution have on average a density of 1 and a coverage of

    1 - (N - 1) ... (N - k) / ((M + N - 1) ... (M + N - k)),

which is near 1 - 1 / 2^k for equal numbers.

Source: Naeem et al. 2020 (arXiv 2002.09797), equations 5 and 6, and lemmas 1 and 2; k = 5 is theirs.
"""

import torch
from torch import Tensor

NEIGHBOURS = 5
SAME = 1e-6  # a sample on a ball's edge, such as a copy of the neighbour that defines it, is outside despite rounding
DISTANCES = 2**25  # held at a time, 256 MiB in float64


def density_coverage(generated: Tensor, reference: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Density and coverage of samples.

    Args:
        generated: Features (M, d).
        reference: Features (N, d).
        neighbours: k.

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
    generated, reference = generated.double(), reference.double()
    inside, covered = 0, 0
    size = max(1, DISTANCES // max(len(generated), len(reference)))
    for rows in torch.split(torch.arange(len(reference)), size):
        own = torch.cdist(reference[rows], reference)
        own[torch.arange(len(rows)), rows] = 0  # which the product of matrices leaves at the size of its rounding
        radii = own.kthvalue(neighbours + 1, dim=1).values[:, None]
        hits = torch.cdist(reference[rows], generated) < radii * (1 - SAME)
        inside += int(hits.sum())
        covered += int(hits.any(1).sum())
    return inside / (neighbours * len(generated)), covered / len(reference)
