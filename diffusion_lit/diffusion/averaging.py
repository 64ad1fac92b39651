"""Averages of weights with a power-function profile, and averages of other widths from snapshots.

The average of the weights theta over training time t with exponent gamma weighs tau by tau^gamma:

    theta_gamma(t) = (gamma + 1) / t^(gamma + 1) * integral_0^t tau^gamma theta(tau) dtau
    theta_gamma(t) = beta theta_gamma(t - 1) + (1 - beta) theta(t),   beta = (1 - 1/t)^(gamma + 1)

Its width relative to t is sigma_rel = (gamma + 1)^(1/2) / ((gamma + 2) (gamma + 3)^(1/2)), the standard deviation of
the profile. From snapshots of a few such averages, taken along the run, the average of another width at another time is
the combination whose profile is nearest in the least-squares sense. With p_i the profile of snapshot i and r the wanted
one,

    A x = b,   A_ij = <p_i, p_j>,   b_i = <p_i, r>,   divided by its sum,
    <p_a, p_b> = (gamma_a + 1) (gamma_b + 1) (t_lo / t_hi)^gamma_lo / ((gamma_a + gamma_b + 1) t_hi)

where lo is the snapshot with the smaller t. Without the division the sum would be below 1 and shrink all weights.

Source: Karras 2024, arXiv 2312.02696, section 3.1 and 3.2, equations 1 to 3, appendix C.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

WIDEST = 0.288  # sigma_rel of gamma = 0, the plain mean, is 1 / sqrt(12)


def exponent(sigma_rel: float) -> float:
    """The exponent of a profile of given width.

    Args:
        sigma_rel: Standard deviation of the profile relative to the training time, in (0, 0.288).

    Returns:
        gamma >= 0, the root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2.

    Raises:
        ValueError: If no profile has this width.
    """
    if not 0 < sigma_rel <= WIDEST:
        raise ValueError(
            f"sigma_rel is {sigma_rel}; the width of an average relative to the training time lies in (0, {WIDEST}], "
            "and good ones are mostly between 0.01 and 0.25."
        )
    square = sigma_rel**-2
    companion = torch.tensor([[-7, square - 16, square - 12], [1, 0, 0], [0, 1, 0]], dtype=torch.float64)
    return float(torch.linalg.eigvals(companion).real.max())  # of gamma^3 + 7 gamma^2 + (16 - s) gamma + 12 - s


def power_beta(step: int, gamma: float) -> float:
    """The weight of the old average at a step.

    Args:
        step: Number of steps taken, from 1.
        gamma: The profile's exponent.

    Returns:
        (1 - 1/step)^(gamma + 1): 0 at the first step.
    """
    return float((1 - 1 / step) ** (gamma + 1))


def weights(steps: Sequence[int], gammas: Sequence[float], step: int, gamma: float) -> Tensor:
    """The coefficients of the snapshots in the average of another exponent.

    Args:
        steps: Training time of each snapshot.
        gammas: Exponent of each.
        step: Training time wanted.
        gamma: Exponent wanted.

    Returns:
        Float64 weights, one per snapshot, of sum 1.
    """
    t, g = torch.tensor(steps, dtype=torch.float64), torch.tensor(gammas, dtype=torch.float64)
    products = _products(t[:, None], g[:, None], t[None], g[None])
    wanted = _products(t, g, torch.tensor(float(step)).double(), torch.tensor(gamma).double())
    solved: Tensor = torch.linalg.solve(products, wanted)
    return solved / solved.sum()


def _products(t_a: Tensor, g_a: Tensor, t_b: Tensor, g_b: Tensor) -> Tensor:
    """Inner products of profiles."""
    late = torch.maximum(t_a, t_b)
    ratio = torch.minimum(t_a, t_b) / late
    return (g_a + 1) * (g_b + 1) * ratio ** torch.where(t_a < t_b, g_b, g_a) / ((g_a + g_b + 1) * late)
