"""An adaptive Runge-Kutta method with step control per sample: reference solutions, inversion and likelihood.

A step of the Dormand-Prince pair evaluates the slope seven times, the last of which is the next step's first, and gives
a fifth-order solution together with a fourth-order one. A sample accepts its step where they agree to atol + rtol |y|
in the root of the mean square, and its next step is h * 0.9 * error^(-1/5), the error in units of that tolerance. Each
sample has its own noise level, step size and decision, so that the others in the batch do not change its result.

It integrates z = x / sqrt(1 + sigma²) over u = log sigma, with c = 1 / sqrt(1 + sigma²):

    dx/dsigma = (x - D(x; sigma)) / sigma     becomes     dz/du = c (c z - D(z / c; sigma)).

z keeps the scale of an image, so a tolerance means the same at every level, and z changes only where there is
structure; in x the step size would have to shrink with sigma, and half of the steps would be rejected.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from diffusion_lit.checks import check_number
from diffusion_lit.diffusion.samplers.common import Callback, Denoise, Noise, begin, check_range, level_like

Slope = Callable[[Tensor, Tensor], Tensor]

NODES = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
FOURTH = (5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)
FIRST_STEP = 0.25  # of log sigma

ERROR = tuple(fifth - fourth for fifth, fourth in zip((*STAGES[6], 0), FOURTH, strict=True))


def root_mean_square(values: Tensor) -> Tensor:
    """The root of the mean square of each sample's values, shape (B, ...) to (B,)."""
    return values.flatten(1).square().mean(1).sqrt()


class DormandPrince:
    """The Dormand-Prince 5(4) pair on dy/ds = slope(y, s), for a batch of independent initial-value problems.

    Args:
        slope: `slope(y, s)` with y of shape (B, ...) and s of shape (B,).
        y: The initial values, float32 or float64, shape (B, ...).
        start: The s of the initial values.
        rtol: Relative tolerance, above 0.
        atol: Absolute tolerance, above 0.
        first_step: The length of the first step tried, above 0.
        max_steps: The most attempts from the start on.
        norm: The size of an error in units of the tolerance, (B, ...) -> (B,); a step is accepted up to 1.

    Raises:
        ValueError: If a tolerance is not above 0.

    Source: Dormand and Prince 1980, "A family of embedded Runge-Kutta formulae", table 2; step control from Hairer,
    Nørsett and Wanner, "Solving Ordinary Differential Equations I", section II.4.
    """

    def __init__(
        self,
        slope: Slope,
        y: Tensor,
        start: float,
        *,
        rtol: float,
        atol: float,
        first_step: float = FIRST_STEP,
        max_steps: int,
        norm: Callable[[Tensor], Tensor] = root_mean_square,
    ) -> None:
        check_number(above=0, rtol=rtol, atol=atol, first_step=first_step, hint=", such as 1e-5")
        check_range("max_steps", max_steps, 1, whole=True)
        self.f, self.y, self.rtol, self.atol, self.norm = slope, y, rtol, atol, norm
        self.attempts_left = max_steps
        self.s = y.new_full((y.shape[0],), start)
        self.step = torch.full_like(self.s, first_step)
        self.slope = slope(y, self.s)

    def advance(self, stop: float) -> Tensor:
        """Integrates every sample to s = stop.

        Args:
            stop: Where to, on either side.

        Returns:
            y there; the slope there is left in `slope`.

        Raises:
            ValueError: If max_steps attempts do not suffice, or the slope is not finite.
        """
        end = self.s.new_full((), stop)
        while bool((self.s != end).any()):
            if self.attempts_left == 0:
                raise ValueError("rk45 did not reach its end within max_steps; raise max_steps, rtol or atol.")
            self.attempts_left -= 1
            self._attempt(end)
        return self.y

    def _attempt(self, stop: Tensor) -> None:
        """One step of every sample; those at the stop already take one of length 0."""
        remaining = stop - self.s
        last = remaining.abs() <= self.step
        h = torch.where(last, remaining, self.step.copysign(remaining))
        slopes = [self.slope]
        y = self.y
        for node, weights in zip(NODES[1:], STAGES[1:], strict=True):
            y = self._combine(h, slopes, weights)
            slopes.append(self.f(y, torch.where(last & (node == 1), stop, self.s + node * h)))
        error = self._error(y, self._combine(h, slopes, ERROR) - self.y)
        if not bool(error.isfinite().all()):
            raise ValueError("rk45 met a slope that is not finite; check the denoiser's output, or sample in float32.")
        accepted = error <= 1
        factor = (0.9 * error.clamp(min=1e-10) ** -0.2).clamp(0.2, 10)
        grown = torch.where(last & accepted, torch.maximum(self.step, h.abs() * factor), h.abs() * factor)
        self.step = torch.where(remaining == 0, self.step, grown)
        self.s = torch.where(accepted, torch.where(last, stop, self.s + h), self.s)
        self.y = torch.where(_column(accepted, y), y, self.y)
        self.slope = torch.where(_column(accepted, y), slopes[-1], self.slope)

    def _combine(self, h: Tensor, slopes: list[Tensor], weights: tuple[float, ...]) -> Tensor:
        """The state plus h times the weighted sum of the slopes."""
        total = sum((w * k for w, k in zip(weights, slopes, strict=True) if w != 0), torch.zeros_like(self.y))
        return self.y + _column(h, total) * total

    def _error(self, y: Tensor, difference: Tensor) -> Tensor:
        """The size of the difference in units of the tolerance, shape (B,)."""
        return self.norm(difference / (self.atol + self.rtol * torch.maximum(y.abs(), self.y.abs())))


def shrinkage(sigma: Tensor, like: Tensor) -> Tensor:
    """The factor c = 1 / sqrt(1 + sigma²) by which x keeps the size of an image.

    Args:
        sigma: Noise levels, shape () or (B,).
        like: A batch that it shall multiply, shape (B, ...).

    Returns:
        c, of as many dimensions as `like`.
    """
    return _column(1 / torch.hypot(sigma, torch.ones_like(sigma)), like)


def _column(value: Tensor, like: Tensor) -> Tensor:
    """One value per sample, shape () or (B,), so that it broadcasts with shape (B, ...)."""
    return value.reshape(-1, *[1] * (like.ndim - 1))


def rk45(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 10_000,
    noise: Noise = torch.randn_like,
    callback: Callback | None = None,
) -> Tensor:
    """The probability-flow ODE to a tolerance, with step control per sample.

    The state passes through every level of the grid, where the callback is called, with as many steps in between as the
    tolerance requires; a grid of few levels, at least (sigma_max, sigma_min, 0), costs least. The step to level 0 takes
    x0_hat. The denoiser is called with one sigma per sample, 1 + 6 times the steps of the slowest sample.

    Args:
        denoise: Any `denoise(x, sigma) -> x0_hat`.
        x: The state at `sigmas[0]`, shape (B, ...).
        sigmas: The grid, shape (N+1,), falling or rising.
        rtol: Relative tolerance of a step on x / sqrt(1 + sigma²), above 0; in float32 not below 1e-6.
        atol: Absolute tolerance of a step on the same, above 0.
        max_steps: The most steps tried.
        noise: Unused; all samplers have the same arguments.
        callback: Called as `callback(step, x, x0_hat, sigma)` at each level of the grid but the last.

    Returns:
        The state at `sigmas[-1]`, of x's shape and dtype.

    Raises:
        ValueError: If a tolerance is not above 0, the grid neither falls nor rises, max_steps do not suffice or the
            denoiser's output is not finite.

    Source: arXiv 2011.13456, appendix D.4 (RK45 on the probability-flow ODE); Dormand and Prince 1980.
    """
    dtype = x.dtype
    x, levels = begin(x, sigmas, stochastic=False)
    low, high = min(level for level in levels if level > 0), max(levels)

    def slope(z: Tensor, log_sigma: Tensor) -> Tensor:
        sigma = log_sigma.exp().clamp(low, high)
        c = shrinkage(sigma, z)
        return c * (c * z - denoise(z / c, sigma))

    z = x * shrinkage(x.new_tensor(levels[0]), x)
    solver = DormandPrince(slope, z, math.log(levels[0]), rtol=rtol, atol=atol, max_steps=max_steps)
    for step, (sigma, sigma_next) in enumerate(pairwise(levels)):
        level = level_like(x, sigma)
        c = shrinkage(level, x)
        x0_hat = c * solver.y - solver.slope / c
        if callback is not None:
            callback(step, solver.y / c, x0_hat, level)
        if sigma_next == 0:
            return x0_hat.to(dtype)
        solver.advance(math.log(sigma_next))
    return (solver.y / shrinkage(level_like(x, levels[-1]), x)).to(dtype)
