"""Conversions between conventions of noise levels: betas, alpha_bar, sigma, log-SNR and flow time.

A variance-preserving chain of T steps has `betas`, and

    alpha_bar_t = prod_{s <= t} (1 - beta_s)          x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) n
    sigma_t     = sqrt((1 - alpha_bar_t) / alpha_bar_t)   so that   x = x_t / sqrt(alpha_bar_t) = x0 + sigma_t n
    log_snr_t   = log(alpha_bar_t / (1 - alpha_bar_t)) = -2 log sigma_t

A flow path x_t = (1 - t) x0 + t n has sigma = t / (1 - t). Times between the steps of a chain belong to a `Schedule`.
"""

import torch
from torch import Tensor

FLOW_TIME_MIN = 1e-3
FLOW_TIME_MAX = 1 - FLOW_TIME_MIN
SAME = 1e-6
"""Noise levels that differ by this share or less are one level: a level is often rounded, printed and typed again."""


def betas_to_alpha_bar(betas: Tensor) -> Tensor:
    """The share of signal variance that is left after each step.

    Args:
        betas: Shape (T,), each in (0, 1).

    Returns:
        Shape (T,), falling, in (0, 1). Source: Ho et al. 2020 (arXiv 2006.11239), equation 4.
    """
    return torch.log1p(-betas).cumsum(0).exp()


def alpha_bar_to_betas(alpha_bar: Tensor) -> Tensor:
    """Inverse of `betas_to_alpha_bar`.

    Args:
        alpha_bar: Shape (T,), falling, in (0, 1).

    Returns:
        Shape (T,), each in (0, 1).
    """
    log_alpha_bar = alpha_bar.log()
    return -torch.expm1(torch.diff(log_alpha_bar, prepend=log_alpha_bar.new_zeros(1)))


def alpha_bar_to_sigma(alpha_bar: Tensor) -> Tensor:
    """Noise level in the coordinates x0 + sigma n.

    Args:
        alpha_bar: Any shape, in (0, 1].

    Returns:
        sqrt((1 - alpha_bar) / alpha_bar), of the same shape.
    """
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def sigma_to_alpha_bar(sigma: Tensor) -> Tensor:
    """Inverse of `alpha_bar_to_sigma`.

    Args:
        sigma: Any shape, 0 or more.

    Returns:
        1 / (1 + sigma^2), of the same shape.
    """
    return 1 / (1 + sigma**2)


def betas_to_sigma(betas: Tensor) -> Tensor:
    """Noise level after each step, accurate where alpha_bar is near 1 and where it is near 0.

    Args:
        betas: Shape (T,), each in (0, 1).

    Returns:
        Shape (T,), rising.
    """
    return torch.expm1(-torch.log1p(-betas).cumsum(0)).sqrt()


def sigma_to_betas(sigma: Tensor) -> Tensor:
    """Inverse of `betas_to_sigma`: beta_t = (sigma_t^2 - sigma_{t-1}^2) / (1 + sigma_t^2), with sigma_{-1} = 0.

    Args:
        sigma: Shape (T,), rising, positive.

    Returns:
        Shape (T,), each in (0, 1).
    """
    previous = torch.cat([sigma.new_zeros(1), sigma[:-1]])
    return (sigma - previous) * (sigma + previous) / (1 + sigma**2)


def sigma_to_log_snr(sigma: Tensor) -> Tensor:
    """Logarithm of the signal-to-noise ratio 1 / sigma^2.

    Args:
        sigma: Any shape, positive.

    Returns:
        -2 log sigma, of the same shape. Source: Kingma et al. 2021 (arXiv 2107.00630), section 3.1.
    """
    return -2 * sigma.log()


def log_snr_to_sigma(log_snr: Tensor) -> Tensor:
    """Inverse of `sigma_to_log_snr`.

    Args:
        log_snr: Any shape.

    Returns:
        exp(-log_snr / 2), of the same shape.
    """
    return (-log_snr / 2).exp()


def flow_time_to_sigma(t: Tensor) -> Tensor:
    """Noise level of the straight path (1 - t) x0 + t n.

    Args:
        t: Any shape, in [0, 1).

    Returns:
        t / (1 - t), of the same shape.
    """
    return t / (1 - t)


def sigma_to_flow_time(sigma: Tensor) -> Tensor:
    """Inverse of `flow_time_to_sigma`.

    Args:
        sigma: Any shape, 0 or more.

    Returns:
        sigma / (1 + sigma), of the same shape.
    """
    return sigma / (1 + sigma)


def widen(value: Tensor | float) -> Tensor:
    """A number as precise as its device allows.

    Args:
        value: A tensor of any shape, or a number.

    Returns:
        Float64, or float32 on Apple's GPUs, which have no float64.
    """
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.float64)
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64)
