"""The denoising loss and its weights.

    loss = weight(sigma) * mean over pixels of (D(x0 + sigma n; sigma) - x0)^2

With weight 1 / c_out^2 this is each paper's own loss on the network's output: eps 1/s², v 1 + 1/s², flow ((1+s)/s)²,
EDM (s²+sd²)/(s sd)². The prediction type, the distribution of sigma and the weight are three separate choices.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from diffusion_lit.checks import check_count, check_number
from diffusion_lit.diffusion.conversions import widen
from diffusion_lit.diffusion.denoiser import Denoiser, LearnedVarianceDenoiser, per_sample
from diffusion_lit.diffusion.normal import discretised_gaussian_nll, gaussian_kl
from diffusion_lit.diffusion.preconditioning import Preconditioning


class LossWeight(nn.Module, ABC):
    """How much the error at each noise level counts."""

    @abstractmethod
    def forward(self, error: Tensor, sigma: Tensor, scaling: Preconditioning) -> Tensor:
        """Weighs errors.

        Args:
            error: Mean squared error of x0_hat for each sample, shape (B,).
            sigma: Noise levels, shape (B,).
            scaling: The prediction type.

        Returns:
            Weighted errors, shape (B,).
        """


class PredictionWeight(LossWeight):
    """1 / c_out^2: the squared error of the network's own prediction, as in each paper."""

    def forward(self, error: Tensor, sigma: Tensor, scaling: Preconditioning) -> Tensor:
        """Weighs errors; see `LossWeight.forward`."""
        c_out = scaling.coefficients(sigma)[1]
        return error / c_out**2


PaperWeight = PredictionWeight  # its name in version 0.1.0, which checkpoints and configs give


class UnitWeight(LossWeight):
    """1: the squared error of x0_hat itself."""

    def forward(self, error: Tensor, sigma: Tensor, scaling: Preconditioning) -> Tensor:
        """Weighs errors; see `LossWeight.forward`."""
        return error


class MinSNR(LossWeight):
    """min(SNR, gamma) with SNR = 1 / sigma^2, whatever the prediction type.

    On the network's own output this is min(SNR, gamma) for x0, / SNR for eps and / (SNR + 1) for v, as in the source.

    Args:
        gamma: Where the weight stops growing, positive.

    Raises:
        ValueError: If gamma is not positive.

    Source: Hang et al. 2023 (arXiv 2303.09556), section 3.4.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        super().__init__()
        check_number(above=0, gamma=gamma, hint="; 5 is the usual one")
        self.gamma = gamma

    def forward(self, error: Tensor, sigma: Tensor, scaling: Preconditioning) -> Tensor:
        """Weighs errors; see `LossWeight.forward`."""
        return error * (sigma**-2).clamp(max=self.gamma)


class LearnedUncertainty(LossWeight):
    """error / c_out^2 / exp(u) + u, with u(sigma) learned: the logarithm of the expected weighted error.

    It balances the gradients of all noise levels. u is a linear map of random Fourier features of ln(sigma) / 4 and
    starts at 0, the plain loss. The loss may become negative.

    Args:
        channels: Number of Fourier features.

    Source: Karras et al. 2024 (arXiv 2312.02696), equations 14 to 16 and 21.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, channels: int = 128) -> None:
        super().__init__()
        check_count(channels=channels)
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))
        self.coefficients = nn.Parameter(torch.zeros(channels))

    def log_error(self, sigma: Tensor) -> Tensor:
        """u: the learned logarithm of the mean of error / c_out^2 at each noise level.

        Args:
            sigma: Any shape, positive.

        Returns:
            Of sigma's shape.
        """
        angles = (sigma.log() / 4)[..., None] * self.frequencies + self.phases
        # A product and a sum, since autocast would take a matrix product down to bf16.
        log_error: Tensor = (angles.cos() * self.coefficients).sum(-1) * math.sqrt(2 / len(self.coefficients))
        return log_error

    def forward(self, error: Tensor, sigma: Tensor, scaling: Preconditioning) -> Tensor:
        """Weighs errors; see `LossWeight.forward`."""
        u = self.log_error(sigma)
        return error / scaling.coefficients(sigma)[1] ** 2 * (-u).exp() + u


class DenoisingLoss(nn.Module):
    """Weighted squared error of the denoiser.

    Args:
        weight: The weight on the squared error of x0_hat; none means `PredictionWeight`.
    """

    def __init__(self, weight: LossWeight | None = None) -> None:
        super().__init__()
        self.weight = PredictionWeight() if weight is None else weight

    def forward(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        sigma: Tensor,
        noise: Tensor,
        label: Tensor | None = None,
        augment: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """The loss of each sample.

        Args:
            denoiser: What is trained.
            x0: Clean images, shape (B, C, H, W).
            sigma: Noise levels, shape (B,); those outside the support of the scaling are moved to its edge.
            noise: Standard normal, shape (B, C, H, W).
            label: Class indices, shape (B,), or none.
            augment: Augmentation labels, shape (B, augment_dim), or none.
            condition: Condition images, shape (B, C', H, W), or none.

        Returns:
            Shape (B,): the mean over pixels of the weighted squared error.
        """
        sigma = denoiser.scaling.clamp(sigma)
        x0_hat = denoiser(x0 + per_sample(sigma, x0) * noise, sigma, label, augment=augment, condition=condition)
        return self.weigh(x0_hat, x0, sigma, denoiser.scaling)

    def weigh(self, x0_hat: Tensor, x0: Tensor, sigma: Tensor, scaling: Preconditioning) -> Tensor:
        """The weighted error of an estimate.

        Args:
            x0_hat: Estimates, shape (B, C, H, W).
            x0: Clean images, shape (B, C, H, W).
            sigma: Noise levels, shape (B,).
            scaling: The prediction type.

        Returns:
            Shape (B,).
        """
        error = (x0_hat - x0).square().flatten(1).mean(1)
        weighted: Tensor = self.weight(error, sigma, scaling)
        return weighted


def _beta_and_posterior(sigma: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """Beta and the posterior variance of the step between two noise levels, in variance-preserving coordinates."""
    beta = (sigma - previous) * (sigma + previous) / (1 + sigma**2)
    noise, previous_noise = (level**2 / (1 + level**2) for level in (sigma, previous))  # 1 - alpha_bar
    return beta, previous_noise / noise * beta


def _reverse_step(scaling: Preconditioning, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The true reverse step from a noise level to the one before, in variance-preserving coordinates and float64.

    Args:
        scaling: A prediction type with a schedule.
        sigma: Noise levels, shape (B,).

    Returns:
        The logarithms of the posterior variance and of beta, the coefficient of x0 in the posterior mean, and whether
        the step is the first of the chain, each (B,). The posterior variance of the first step is 0; the one of the
        second step stands in its place, as in the sources' code.
    """
    schedule = scaling.schedule
    if schedule is None:
        raise ValueError(
            f"HybridLoss needs a schedule, and this {type(scaling).__name__} has none; use EpsPreconditioning."
        )
    sigma = widen(sigma)
    t = schedule.sigma_to_t(sigma)
    first = t < 0.5
    previous = torch.where(first, torch.zeros_like(t), schedule.t_to_sigma(t - 1))
    beta, posterior = _beta_and_posterior(sigma, previous)
    start, second = (schedule.t_to_sigma(torch.full_like(t, step)) for step in (0, 1))
    posterior = torch.where(first, _beta_and_posterior(second, start)[1], posterior)
    x0_share = beta * (1 + sigma**2) / sigma**2 / (1 + previous**2).sqrt()
    return posterior.log(), beta.log(), x0_share, first


class HybridLoss(DenoisingLoss):
    """L_simple + vlb_weight * L_vlb, for networks that also predict the variance of a step.

    L_vlb is the variational bound of the chain in bits per dimension: for each step the KL divergence of the reverse
    step from the true posterior, for the first step the likelihood of the pixels in 256 levels. Its gradient reaches
    only the variance; the mean learns from L_simple. A sample's term is multiplied by T, as it estimates the sum over
    all T steps.

    Args:
        weight: The weight of L_simple on the squared error of x0_hat; none means `PredictionWeight`.
        vlb_weight: The weight of L_vlb, 0 or more.

    Raises:
        ValueError: If `vlb_weight` is negative.

    Source: Nichol and Dhariwal 2021 (arXiv 2102.09672), equations 4 to 7, 15 and 16.
    """

    def __init__(self, weight: LossWeight | None = None, vlb_weight: float = 0.001) -> None:
        super().__init__(weight)
        check_number(least=0, vlb_weight=vlb_weight, hint="; 0.001 is the usual one")
        self.vlb_weight = vlb_weight

    def forward(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        sigma: Tensor,
        noise: Tensor,
        label: Tensor | None = None,
        augment: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """The loss of each sample; see `DenoisingLoss.forward`.

        Raises:
            ValueError: If the denoiser predicts no variance, or its scaling has no schedule.
        """
        if not isinstance(denoiser, LearnedVarianceDenoiser):
            raise ValueError("HybridLoss trains a predicted variance; use a LearnedVarianceDenoiser, or DenoisingLoss.")
        sigma = denoiser.scaling.clamp(sigma)
        x = x0 + per_sample(sigma, x0) * noise
        x0_hat, v = denoiser.learned_variance(x, sigma, sigma, label, augment, condition)
        bound = self.bound(x0_hat.detach(), v, x0, sigma, denoiser.scaling)
        return self.weigh(x0_hat, x0, sigma, denoiser.scaling) + self.vlb_weight * bound

    def bound(self, x0_hat: Tensor, v: Tensor, x0: Tensor, sigma: Tensor, scaling: Preconditioning) -> Tensor:
        """The estimate that each sample gives of the variational bound.

        Args:
            x0_hat: Estimates, shape (B, C, H, W).
            v: Interpolation of the log variance between the posterior's (0) and beta (1), shape (B, C, H, W).
            x0: Clean images, shape (B, C, H, W).
            sigma: Noise levels, shape (B,).
            scaling: A prediction type with a schedule.

        Returns:
            T times the term of the sample's step, in bits per dimension, shape (B,).

        Raises:
            ValueError: If the scaling has no schedule.
        """
        log_posterior, log_beta, x0_share, first = _reverse_step(scaling, sigma)
        log_posterior, log_beta, x0_share = (per_sample(c.to(x0_hat), x0) for c in (log_posterior, log_beta, x0_share))
        log_variance = v * log_beta + (1 - v) * log_posterior
        kl = gaussian_kl(x0_share * (x0 - x0_hat), log_posterior, log_variance)
        # The mean of the first reverse step is x0_hat itself. Other rows get a perfect one, far from all overflow.
        first = per_sample(first, x0)
        mean, spread = torch.where(first, x0_hat, x0), torch.where(first, log_variance, 0.0)
        nats = torch.where(first, discretised_gaussian_nll(x0.to(x0_hat), mean, spread), kl).flatten(1).mean(1)
        assert scaling.schedule is not None
        return nats * (scaling.schedule.num_steps / math.log(2))
