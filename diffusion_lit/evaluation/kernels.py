"""Kernel distances: the Gaussian one on CLIP's features, and how much the polynomial one scatters.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)

The scatter of its unbiased estimate from n samples and m real images follows from Hoeffding's decomposition. With
h_x = E k(x, X') - E k(x, Y), h_y likewise, and s the mean square of what a kernel matrix has beside its row and column
means,

    Var = 4 var(h_x) / n + 4 var(h_y) / m + 2 s_xx / (n (n - 1)) + 2 s_yy / (m (m - 1)) + 4 s_xy / (n m),

of which the first two vanish where both distributions are the same. Source: Sutherland et al. 2017 (arXiv 1611.04488),
appendix A, for n = m.
"""

import math

import torch
from torch import Tensor

from diffusion_lit.diffusion.rng import keyed_generator

BLOCK = 2048  # rows of a kernel matrix held at a time
SCALE = 1000  # of the Gaussian distance, as published
MOST = 2000  # rows from which a variance is estimated


def gaussian_mmd(generated: Tensor, reference: Tensor, sigma: float) -> float:
    """1,000 times the squared MMD under exp(-|x - y|^2 / (2 sigma^2)) of features of length 1, all pairs counted.

    Args:
        generated: Features (N, d), which are scaled to length 1.
        reference: Features (M, d), likewise.
        sigma: Width of the kernel.

    Returns:
        The distance, at least 0; 0 for equal sets.

    Source: Jayasumana et al. 2024 (arXiv 2401.09603), section 4: CMMD, with sigma 10.
    """
    x, y = (torch.nn.functional.normalize(one.double(), dim=1) for one in (generated, reference))

    def mean(a: Tensor, b: Tensor) -> float:
        sums = [float(((part @ b.T - 1) / sigma**2).exp().sum()) for part in torch.split(a, BLOCK)]
        return math.fsum(sums) / (len(a) * len(b))

    return SCALE * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def kernel_distance_variance(generated: Tensor, reference: Tensor, subset: int, subsets: int) -> float:
    """The variance of the kernel distance over draws of both sides; see the module.

    Args:
        generated: Features (N, d).
        reference: Features (M, d).
        subset: Size of the random subsets that it is averaged over.
        subsets: Their number, which adds a scatter of its own where a subset is not the whole.

    Returns:
        The variance.
    """
    n, m = len(generated), len(reference)
    moments = _moments(*(_some(one, name) for one, name in ((generated, "generated"), (reference, "reference"))))
    variance = _variance(moments, n, m)
    return variance + (_variance(moments, subset, subset) / subsets if subset < max(n, m) else 0.0)


def _variance(moments: tuple[float, float, float, float, float], n: int, m: int) -> float:
    first_x, first_y, xx, yy, xy = moments
    return 4 * (first_x / n + first_y / m) + 2 * (xx / (n * (n - 1)) + yy / (m * (m - 1))) + 4 * xy / (n * m)


def _moments(x: Tensor, y: Tensor) -> tuple[float, float, float, float, float]:
    """var(h_x), var(h_y), s_xx, s_yy and s_xy; the first two less what the rows' own means scatter by."""
    n, m = len(x), len(y)
    own, others, cross = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    s_xx, s_yy, s_xy = _rest(own, True), _rest(others, True), _rest(cross, False)
    h_x = (own.sum(1) - own.diagonal()) / (n - 1) - cross.mean(1)
    h_y = (others.sum(1) - others.diagonal()) / (m - 1) - cross.mean(0)
    first_x = max(0.0, float(h_x.var()) - s_xx / n - s_xy / m)
    return first_x, max(0.0, float(h_y.var()) - s_yy / m - s_xy / n), s_xx, s_yy, s_xy


def _rest(kernel: Tensor, symmetric: bool) -> float:
    """The mean square of a kernel matrix beside its row and column means, without the diagonal of a symmetric one."""
    rows, columns = kernel.shape
    kept = torch.ones_like(kernel)
    if symmetric:
        kept.fill_diagonal_(0)
    kernel = kernel * kept
    by_row, by_column = kernel.sum(1) / kept.sum(1), kernel.sum(0) / kept.sum(0)
    rest = (kernel - by_row[:, None] - by_column[None] + kernel.sum() / kept.sum()) * kept
    return float(rest.square().sum() / (kept.sum() - rows - columns + 1))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _some(features: Tensor, name: str) -> Tensor:
    """At most `MOST` rows, in float64."""
    order = torch.randperm(len(features), generator=keyed_generator("kernel", name))
    return features[order[:MOST]].double()
