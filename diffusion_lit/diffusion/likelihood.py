"""Likelihood of images under a model, by the probability-flow ODE.

Along dx/ds = (x - D(x; s)) / s the density of x = x0 + s n changes by the divergence of the slope alone, so that

    log p(x; sigma_min) = log N(x_end; 0, prior_std² I) + integral from sigma_min to sigma_max of (d - tr dD/dx) / s ds

for d values in x, with x_end the end of the path that rk45 follows. The trace is exact (one backward pass per value) or
Hutchinson's unbiased estimate e^T (dD/dx) e with random signs e, drawn once per path (one backward pass). An image of
256 levels is dequantised by uniform noise of one level; -log p is then an upper bound on its code length.

Source: Song et al. 2021 (arXiv 2011.13456), section 4.3 and appendix D.2; dequantisation: Theis et al. 2016
(arXiv 1511.01844), section 3.1.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lit.checks import check_count, check_number
from diffusion_lit.diffusion.samplers.adaptive import DormandPrince, root_mean_square, shrinkage
from diffusion_lit.diffusion.samplers.common import Denoise, Noise

LEVELS = 256
ROUNDING = 0.02  # of a level, when an image is taken for an 8-bit one


@dataclass(frozen=True)
class Likelihood:
    """The log-likelihood of continuous images under a denoiser.

    The integral starts at sigma_min, as the density at level 0 need not exist. At sigma_max the data's mean m is
    neglected, which changes log p by about |m| / sigma_max nats.

    Args:
        sigma_min: The level at which an image is taken to lie, above 0.
        sigma_max: The level at which the density is taken for normal, above sigma_min.
        prior_std: The standard deviation there; None is sigma_max. On a variance-preserving path it is
            sqrt(1 + sigma_max²).
        exact: Whether to take the exact trace, at one backward pass per value, or Hutchinson's estimate.
        rtol: Relative tolerance of a step of the ODE, above 0.
        atol: Absolute tolerance of a step, above 0.
        max_steps: The most steps tried.

    Raises:
        ValueError: If the range of levels is empty or prior_std is not above 0.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    prior_std: float | None = None
    exact: bool = False
    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        """Refuses an empty range."""
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"The range is sigma_min {self.sigma_min} to sigma_max {self.sigma_max}; "
                "give 0 < sigma_min < sigma_max."
            )
        check_number(above=0, prior_std=self.prior_std, rtol=self.rtol, atol=self.atol)
        check_count(max_steps=self.max_steps)

    def log_prob(self, denoise: Denoise, x: Tensor, *, noise: Noise = torch.randn_like) -> Tensor:
        """The log-density of images.

        Args:
            denoise: Any differentiable `denoise(x, sigma) -> x0_hat`, with guidance and labels bound.
            x: Images, shape (B, ...); the integral runs in their dtype, float32 or float64.
            noise: Draws standard normal noise like its argument, once, where the trace is estimated.

        Returns:
            log p(x) in nats, shape (B,), of x's dtype.

        Raises:
            ValueError: If denoise is not differentiable, or the ODE does not reach its end.
        """
        if not torch.is_floating_point(x) or x.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f"A likelihood needs float32 or float64 images, not {x.dtype}; convert them first.")
        size = x[0].numel()
        signs = None if self.exact else torch.where(noise(x) < 0, -1.0, 1.0).to(x.dtype)

        def slope(state: Tensor, log_sigma: Tensor) -> Tensor:
            sigma = log_sigma.exp().clamp(self.sigma_min, self.sigma_max)
            z, c = state[:, :size], shrinkage(sigma, state)
            x0_hat, trace = denoise_and_trace(denoise, (z / c).reshape(x.shape), sigma, signs)
            return torch.cat([c * (c * z - x0_hat.flatten(1)), 1 - trace[:, None] / size], 1)

        def norm(error: Tensor) -> Tensor:
            return torch.maximum(root_mean_square(error[:, :size]), error[:, size].abs())

        # The last column is the integral per value, to the same tolerance as the image whatever its size.
        c_start, c_end = (1 / math.hypot(1, level) for level in (self.sigma_min, self.sigma_max))
        state = torch.cat([c_start * x.flatten(1), x.new_zeros(len(x), 1)], 1)
        solver = DormandPrince(
            slope,
            state,
            math.log(self.sigma_min),
            rtol=self.rtol,
            atol=self.atol,
            max_steps=self.max_steps,
            norm=norm,
        )
        end = solver.advance(math.log(self.sigma_max))
        std = self.sigma_max if self.prior_std is None else self.prior_std
        log_prior = -0.5 * (end[:, :size] / (c_end * std)).square().mean(1) - math.log(std * math.sqrt(2 * math.pi))
        return size * (log_prior + end[:, size])

    def bits_per_dim(self, denoise: Denoise, images: Tensor, *, noise: Noise = torch.randn_like) -> Tensor:
        """Bits per value of 8-bit images, with uniform dequantisation.

        A level i in 0 to 255 becomes (i + u) / 128 - 1 with u uniform in [0, 1).

        Args:
            denoise: As in `log_prob`.
            images: 8-bit images in [-1, 1], that is 2 i / 255 - 1, shape (B, ...), or uint8.
            noise: Draws standard normal noise like its argument; u is its cumulative probability, so that seeded noise
                seeds the dequantisation and the trace alike.

        Returns:
            Bits per value, shape (B,).

        Raises:
            ValueError: If the images are not 8-bit ones, or as in `log_prob`.
        """
        levels = images.float() if images.dtype == torch.uint8 else (images + 1) * (LEVELS - 1) / 2
        if images.dtype != torch.uint8 and not torch.allclose(
            levels, levels.round().clamp(0, 255), rtol=0, atol=ROUNDING
        ):
            raise ValueError("The images are not 8-bit ones in [-1, 1]; give uint8, or 2 i / 255 - 1 for levels i.")
        uniform = torch.special.ndtr(noise(levels))
        x = (levels.round() + uniform) * (2 / LEVELS) - 1
        nats = -self.log_prob(denoise, x, noise=noise) / x[0].numel()
        bits: Tensor = nats / math.log(2) + math.log2(LEVELS / 2)
        return bits


def denoise_and_trace(denoise: Denoise, x: Tensor, sigma: Tensor, signs: Tensor | None) -> tuple[Tensor, Tensor]:
    """The estimate and the trace of its Jacobian.

    Args:
        denoise: Any differentiable `denoise(x, sigma) -> x0_hat`.
        x: The state, shape (B, ...).
        sigma: The noise level, shape () or (B,).
        signs: Hutchinson's probe of x's shape; None takes the exact trace.

    Returns:
        x0_hat of x's shape, and tr dD/dx, shape (B,), without gradients.

    Raises:
        ValueError: If denoise is not differentiable.
    """
    # Evaluation runs in inference mode, whose tensors take part in no gradient unless they are copied outside of it.
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        x0_hat = denoise(x, sigma.clone())
        if not x0_hat.requires_grad:
            raise ValueError("The denoiser gives no gradient; call it without torch.no_grad or inference_mode.")
        if signs is not None:
            (product,) = torch.autograd.grad(x0_hat, x, signs.clone())
            return x0_hat.detach(), (product * signs).flatten(1).sum(1)
        trace = x.new_zeros(len(x))
        flat = x0_hat.flatten(1)
        for index in range(flat.shape[1]):
            (row,) = torch.autograd.grad(flat[:, index].sum(), x, retain_graph=True)
            trace = trace + row.flatten(1)[:, index]
        return x0_hat.detach(), trace
