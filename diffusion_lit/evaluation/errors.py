"""The standard error of a figure over new draws of both samples and reference.

The scatter over blocks of samples leaves out that the reference is a draw too, and is hardly known from a few blocks.
The kernel distance has a known variance (`kernels`). That of other figures is found by subsampling: with a share f =
0.8 of each side, drawn without replacement, a mean over n images scatters by (1 / f - 1) / n times their variance, so
that the variance over subsamples divided by 1 / f - 1 is that of the whole. (A bootstrap's repeated images would spoil
figures of nearest neighbours.) Where both sides are of one distribution, a Fréchet distance and MIND are quadratic
forms of what scatters, and their errors come out up to 1.5 times too large. The extrapolation and the Inception score
scatter by their own subsets too, so that they are taken of halves (f = 0.5); the former's error comes out two to three
times too large.

Source: Politis, Romano and Wolf 1999, Subsampling, section 2.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_lit.diffusion.rng import keyed_generator
from diffusion_lit.evaluation.extrapolation import LEAST, FrechetTo
from diffusion_lit.evaluation.features import FeatureExtractor, Features
from diffusion_lit.evaluation.kernels import gaussian_mmd, kernel_distance_variance
from diffusion_lit.evaluation.metrics import (
    KID_SUBSETS,
    Reference,
    inception_score,
    kernel_name,
    kid_subset_size,
)
from diffusion_lit.evaluation.monge import equal_parts, monge_distance
from diffusion_lit.evaluation.neighbours import neighbour_figures

SHARE, HALF, DRAWS = 0.8, 0.5, 12
MOST = 5000  # images of a side that subsamples are drawn from: the variance of more is smaller in proportion
MOST_EXTRAPOLATED, MOST_NEIGHBOURS = 1000, 1200  # of figures that take longer
FEWEST = 12  # minimum number of images of a side

Figure = Callable[[Tensor, Tensor], dict[str, float]]


def standard_errors(extractor: FeatureExtractor, generated: Features, reference: Reference) -> dict[str, float]:
    """Standard deviations of the figures of `compute_metrics` over draws of the samples and of the reference.

    Args:
        extractor: What made the features; its name goes into the figures' names.
        generated: Features of the generated images.
        reference: What they are compared with; where only its statistics are known, these count as exact.

    Returns:
        A number by each figure's name; nothing where there are too few images.
    """
    x, name, real = generated.features, extractor.name, reference.features
    if len(x) < FEWEST or (real is not None and len(real) < FEWEST):
        return {}
    whole = FrechetTo(reference.statistics.mu, reference.statistics.sigma) if real is None else None
    metric = extractor.metric

    def frechet(a: Tensor, b: Tensor) -> dict[str, float]:
        return {metric: (whole or FrechetTo.of(b))(a)}

    def infinity(a: Tensor, b: Tensor) -> dict[str, float]:
        return {f"{metric}_infinity": (whole or FrechetTo.of(b)).infinity(a)}

    y = x[:0] if real is None else real.features
    found = _subsampled(frechet, x, y, MOST)
    if len(x) >= LEAST:
        found |= _subsampled(infinity, x, y, MOST_EXTRAPOLATED, HALF)
    if real is not None:
        variance = kernel_distance_variance(x, y, kid_subset_size(len(x), len(y)), KID_SUBSETS)
        found[kernel_name(name)] = math.sqrt(max(0.0, variance))
        near = _subsampled(neighbour_figures, x, y, MOST_NEIGHBOURS)
        found |= {f"{figure}_{name}": value for figure, value in near.items()}
        found |= _subsampled(
            lambda a, b: {f"mind_{name}": monge_distance(a, b)}, *equal_parts(x, y), most=MOST_NEIGHBOURS
        )
        sigma = extractor.mmd_sigma
        if sigma is not None:
            found |= _subsampled(lambda a, b: {f"mmd_{name}": gaussian_mmd(a, b, sigma)}, x, y, MOST)
    if generated.logits is not None:
        found |= _subsampled(lambda a, b: {f"isc_{name}": inception_score(a)}, generated.logits, x[:0], MOST, HALF)
    return found


def _subsampled(figure: Figure, x: Tensor, y: Tensor, most: int, share: float = SHARE) -> dict[str, float]:
    """Standard deviations of figures, from subsamples of both sides; of one where the other is empty."""
    generator = keyed_generator("errors")

    def some(rows: Tensor, count: int) -> Tensor:
        return rows[torch.randperm(len(rows), generator=generator)[:count]]

    sizes = (len(x), len(y))
    x, y = some(x, most), some(y, most)
    smaller = max(len(one) / size for one, size in zip((x, y), sizes, strict=True) if size)
    drawn = [figure(some(x, round(share * len(x))), some(y, round(share * len(y)))) for _ in range(DRAWS)]
    scale = math.sqrt(smaller / (1 / share - 1))
    return {
        name: scale * float(torch.tensor([one[name] for one in drawn], dtype=torch.float64).std()) for name in drawn[0]
    }
