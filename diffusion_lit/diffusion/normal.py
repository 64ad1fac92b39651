"""Normal distributions for likelihoods: KL divergence and the probability of a bin, in nats.

Values and gradients are finite for all finite arguments: both branches of `torch.where` are kept finite, since it
multiplies the gradient of the unused branch by 0, and 0 times infinity is NaN.
"""

import math

import torch
from torch import Tensor


def gaussian_kl(mean_difference: Tensor, log_variance_p: Tensor, log_variance_q: Tensor) -> Tensor:
    """KL(p || q) of two normal distributions, in nats.

    Args:
        mean_difference: Difference of the means, any shape.
        log_variance_p: Logarithm of the variance of p, broadcastable to it.
        log_variance_q: Logarithm of the variance of q, broadcastable to it.

    Returns:
        Shape of `mean_difference`.
    """
    gap = log_variance_p - log_variance_q
    return 0.5 * (gap.exp() - 1 - gap + mean_difference**2 * (-log_variance_q).exp())


def log_cdf(u: Tensor) -> Tensor:
    """Logarithm of the standard normal distribution function; torch's own has no gradient beyond 10^4 deviations.

    Args:
        u: Any shape.

    Returns:
        Of the same shape, negative.
    """
    low = u.clamp(max=-1)
    tail = torch.log(torch.special.erfcx(-low * math.sqrt(0.5)) / 2) - low.square() / 2
    return torch.where(u < -1, tail, torch.special.log_ndtr(u.clamp(min=-1)))


def log_normal_mass(centre: Tensor, half_width: Tensor) -> Tensor:
    """Logarithm of the standard normal probability of a bin.

    With l = `log_cdf` it is l(b) + log(1 - exp(l(a) - l(b))) for a bin [a, b] in the lower tail, where both are exact;
    one in the upper tail is mirrored. In a thin bin l(b) - l(a) is the width times the slope l' in the middle.

    Args:
        centre: Middle of the bin, in standard deviations, any shape.
        half_width: Half its width, positive, broadcastable to it.

    Returns:
        Shape of `centre`, negative.
    """
    middle = -centre.abs()
    log_near = log_cdf(middle + half_width)
    slope = math.sqrt(2 / math.pi) / torch.special.erfcx(-middle * math.sqrt(0.5))
    wide = log_near - log_cdf(middle - half_width)
    precision = torch.finfo(wide.dtype)
    thin = half_width < precision.eps ** (1 / 3)  # where both forms are equally exact
    fall = torch.where(thin, 2 * half_width * slope, wide).clamp(min=math.sqrt(precision.tiny))
    return log_near + torch.log(-torch.expm1(-fall))


def discretised_gaussian_nll(x0: Tensor, mean: Tensor, log_variance: Tensor, levels: int = 256) -> Tensor:
    """Negative log probability of a pixel's bin under a normal distribution, in nats.

    The bins are centred on `levels` values from -1 to 1; the outermost ones reach to infinity.

    Args:
        x0: Pixels in [-1, 1], any shape.
        mean: Of the same shape.
        log_variance: Broadcastable to it.
        levels: Number of values that a pixel can take.

    Returns:
        Of the same shape, positive.

    Source: Ho et al. 2020 (arXiv 2006.11239), equation 13.
    """
    half_bin = 1 / (levels - 1)
    precision = (-log_variance / 2).exp()
    centre, half_width = (x0 - mean) * precision, half_bin * precision
    outer = log_cdf(torch.where(x0 > 0, half_width - centre, half_width + centre))
    return -torch.where(x0.abs() > 1 - half_bin, outer, log_normal_mass(centre, half_width))
