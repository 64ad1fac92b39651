"""MIND, the Monge inception distance: how far features have to be moved, seen along random directions.

    MIND = 3 d mean over directions u of mean over i of (sort(u.X)_i - sort(u.Y)_i)^2

with u of length 1 and X and Y of n samples and n real images in d features; the larger set is cut to the size of the
smaller one. No covariance is estimated, so that few samples do. Two sets of the same distribution lie above 0, as far
as the floor says; a shift of the mean by v alone adds 3 |v|^2.

Source: Berthet et al. 2026 (arXiv 2605.06797), with 1,000 directions.
"""

import torch
from torch import Tensor

from diffusion_lit.diffusion.rng import keyed_generator

DIRECTIONS = 1000
HELD = 2**22  # projections of a set held at a time, 32 MiB in float64


def monge_distance(generated: Tensor, reference: Tensor, directions: int = DIRECTIONS) -> float:
    """MIND of samples.

    Args:
        generated: Features (N, d).
        reference: Features (M, d).
        directions: Number of random directions, the same ones for every set of d features.

    Returns:
        The distance, at least 0; 0 for equal sets.
    """
    x, y = (part.double() for part in equal_parts(generated, reference))
    n, d = x.shape
    ways = torch.randn(directions, d, generator=keyed_generator("monge"), dtype=torch.float64)
    ways = (ways / ways.norm(dim=1, keepdim=True)).to(x.device)
    gaps = ((u @ x.T).sort().values - (u @ y.T).sort().values for u in ways.split(max(1, HELD // n)))
    return 3 * d * sum(float(gap.square().sum()) for gap in gaps) / (n * directions)


def equal_parts(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets, the larger one cut to the size of the smaller one, by rows that a fixed key draws."""
    count = min(len(one), len(other))

    def part(rows: Tensor) -> Tensor:
        if len(rows) == count:
            return rows
        return rows[torch.randperm(len(rows), generator=keyed_generator("monge", "rows"))[:count]]

    return part(one), part(other)
