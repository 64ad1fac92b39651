"""UniPC: a predictor and a corrector of one form, at one denoiser call per step.

In lambda = -log sigma, with h = lambda_t - lambda_s, the exact solution from level s to t is

    x_t = (t / s) x - expm1(-h) m_0 - sum_k w_k (m_k - m_0) / r_k,   m_k = D(x_k; s_k), r_k = (lambda_k - lambda_s) / h,

up to the order of the number of m_k, if sum_k w_k r_k^(j-1) = j! psi_(j+1) for each j, with psi_1 = expm1(-h) and
psi_(j+1) = -psi_j / h - 1 / j!. The predictor takes the m_k of earlier steps; the corrector adds the one at t, which
the next step needs anyway, so that it costs no call. A single weight is B(h) / 2, where bh1 and bh2 differ.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from diffusion_lit.diffusion.samplers.common import Callback, Denoise, Noise, begin, check_range, euler_step, level_like

Evaluation = tuple[float, Tensor]


def unipc(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    order: int = 2,
    variant: str = "bh2",
    noise: Noise = torch.randn_like,
    callback: Callback | None = None,
) -> Tensor:
    """UniPC with data prediction: a step is predicted, and corrected once the denoiser was called at its end.

    It converges with order + 1 (for order 3, all but the first step do). The first steps have the order that the
    evaluations so far allow. On a grid that ends in 0 the last steps count down to the first-order one, which gives
    x0_hat; on one that ends above it they keep their order, where diffusers counts down too, and the end itself is
    predicted, not corrected.

    Args:
        denoise: Any `denoise(x, sigma) -> x0_hat`.
        x: The state at `sigmas[0]`, shape (B, ...).
        sigmas: The grid, shape (N+1,), falling or rising.
        order: The number of evaluations that a prediction uses, 1 to 3.
        variant: "bh1" (B(h) = -h) or "bh2" (B(h) = expm1(-h)).
        noise: Unused; all samplers have the same arguments.
        callback: Called as `callback(step, x, x0_hat, sigma)` before each step; x is the corrected state.

    Returns:
        The state at `sigmas[-1]`, of x's shape and dtype.

    Raises:
        ValueError: If an option is outside its range, or the grid neither falls nor rises.

    Source: arXiv 2302.04867, algorithms 1 and 2, eq. 3, 8 and 9.
    """
    check_range("order", order, 1, 3, whole=True)
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"The option variant is {variant!r}; give 'bh1' or 'bh2'.")
    dtype = x.dtype
    x, levels = begin(x, sigmas, stochastic=False)
    past: list[Evaluation] = []
    x_last = x
    for step, (sigma, sigma_next) in enumerate(pairwise(levels)):
        level = level_like(x, sigma)
        x0_hat = denoise(x, level)
        if past:
            x = _unified_step(x_last, sigma, past, variant, (sigma, x0_hat))
        if callback is not None:
            callback(step, x, x0_hat, level)
        kept = min(order, len(levels) - 1 - step) if levels[-1] == 0 else order
        past = [*past, (sigma, x0_hat)][-kept:]
        x_last = x
        x = _unified_step(x_last, sigma_next, past, variant, None)
    return x.to(dtype)


def _unified_step(
    x: Tensor, sigma_next: float, past: list[Evaluation], variant: str, ahead: Evaluation | None
) -> Tensor:
    """From the last of the past evaluations, of which x is the state, to sigma_next; `ahead` makes it the corrector."""
    sigma, m_0 = past[-1]
    x = euler_step(x, m_0, sigma_next / sigma)
    others = past[-2::-1] + ([] if ahead is None else [ahead])
    if not others or sigma_next == 0:
        return x
    h = math.log(sigma / sigma_next)
    nodes = [math.log(sigma / level) / h for level, _ in others]
    half = -h / 2 if variant == "bh1" else math.expm1(-h) / 2
    weights = [half] if len(nodes) == 1 else _unified_weights(h, nodes)
    for weight, node, (_, m) in zip(weights, nodes, others, strict=True):
        x = x - weight / node * (m - m_0)
    return x


def _unified_weights(h: float, nodes: list[float]) -> list[float]:
    """Solves the conditions of the module's docstring for the weights."""
    psi, targets = math.expm1(-h), []
    for j in range(1, len(nodes) + 1):
        psi = -psi / h - 1 / math.factorial(j)
        targets.append(math.factorial(j) * psi)
    powers = torch.tensor([[r**j for r in nodes] for j in range(len(nodes))], dtype=torch.float64)
    weights: list[float] = torch.linalg.solve(powers, torch.tensor(targets, dtype=torch.float64)).tolist()
    return weights
