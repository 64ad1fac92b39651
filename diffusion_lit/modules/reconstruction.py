"""Reconstruction losses, the first term of the VAE's loss.

Each is a module `(x_hat, x) -> (B,)`, the sum over an image's values of

    L1          |x_hat - x|
    L2          (x_hat - x)^2
    logistic    -ln [F((x + d - x_hat) / s) - F((x - d - x_hat) / s)],   F(u) = 1 / (1 + exp(-u))
    Gaussian    the same with the normal distribution function F

where d = 1/255 is half the distance of two grey levels in [-1, 1], and the outermost levels take the whole tail. The
last two are the exact negative log-likelihood in nats of 8-bit images, with a learned scale s per channel, so that with
the KL divergence they bound the code length of an image (-ELBO). Both differences are computed without cancellation or
underflow:

    ln (F(a) - F(b)) = ln F(a) + ln F(-b) + ln(1 - exp(b - a))    (logistic, exact; normal: `diffusion.normal`)
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_lit.checks import check_count, check_number
from diffusion_lit.diffusion.normal import log_cdf, log_normal_mass

HALF_LEVEL = 1 / 255
LAST_LEVEL = 1 - HALF_LEVEL
SMALLEST_LOG_SCALE = -7.0


class Reconstruction(nn.Module, ABC):
    """Base class: the distance of images, summed over their values.

    Attributes:
        is_likelihood: Whether the distance is the negative log-likelihood in nats of 8-bit images.
    """

    is_likelihood = False

    @abstractmethod
    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """The distance.

        Args:
            x_hat: Reconstructions (B, C, H, W).
            x: Images (B, C, H, W) in [-1, 1].

        Returns:
            Shape (B,).
        """


class L1(Reconstruction):
    """Sum of absolute errors, as in Rombach 2022 (arXiv 2112.10752); sharper than L2."""

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """See `Reconstruction.forward`."""
        return (x_hat - x).abs().flatten(1).sum(1)


class L2(Reconstruction):
    """Sum of squared errors."""

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """See `Reconstruction.forward`."""
        return (x_hat - x).square().flatten(1).sum(1)


class _Discretised(Reconstruction):
    """A density around x_hat with one learned scale per channel, integrated over each grey level's bin.

    Args:
        channels: Channels of an image; 1 is one scale for all.
        scale: The scale at the start, positive.
    """

    is_likelihood = True

    def __init__(self, channels: int = 1, scale: float = 0.1) -> None:
        super().__init__()
        check_count(channels=channels)
        check_number(above=0, scale=scale)
        self.log_scale = nn.Parameter(torch.full((channels, 1, 1), scale).log())

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Negative log-likelihood in nats; see `Reconstruction.forward`."""
        x_hat, x = x_hat.float(), x.float()
        inverse = (-self.log_scale.clamp(min=SMALLEST_LOG_SCALE)).exp()
        centre, half_width = (x - x_hat) * inverse, HALF_LEVEL * inverse
        outer = self.log_cdf(torch.where(x > 0, half_width - centre, half_width + centre))
        log_p = torch.where(x.abs() > LAST_LEVEL, outer, self.log_mass(centre, half_width))
        return -log_p.flatten(1).sum(1)

    def log_cdf(self, u: Tensor) -> Tensor:
        """Logarithm of F(u)."""
        raise NotImplementedError

    def log_mass(self, centre: Tensor, half_width: Tensor) -> Tensor:
        """Logarithm of F(centre + half_width) - F(centre - half_width)."""
        raise NotImplementedError


class DiscretisedLogistic(_Discretised):
    """Logistic likelihood of 8-bit images with a learned scale.

    Args:
        channels: Number of scales: that of the image's channels, or 1 for one scale for all.
        scale: The scale at the start, positive.

    Source: Kingma 2016, arXiv 1606.04934, appendix C.3; Salimans 2017, arXiv 1701.05517, equation 2.
    """

    def log_cdf(self, u: Tensor) -> Tensor:
        """Logarithm of 1 / (1 + exp(-u))."""
        return F.logsigmoid(u)

    def log_mass(self, centre: Tensor, half_width: Tensor) -> Tensor:
        """See the formula above."""
        sides = F.logsigmoid(half_width + centre) + F.logsigmoid(half_width - centre)
        return sides + torch.log(-torch.expm1(-2 * half_width))


class DiscretisedGaussian(_Discretised):
    """Gaussian likelihood of 8-bit images with a learned scale.

    Args:
        channels: Number of scales: that of the image's channels, or 1 for one scale for all.
        scale: The standard deviation at the start, positive.

    Source: Rybkin 2021, arXiv 2006.13202 (a learned variance); Ho 2020, arXiv 2006.11239, equation 13 (the bins).
    """

    def log_cdf(self, u: Tensor) -> Tensor:
        """Logarithm of the normal distribution function."""
        return log_cdf(u)

    def log_mass(self, centre: Tensor, half_width: Tensor) -> Tensor:
        """See `log_normal_mass`."""
        return log_normal_mass(centre, half_width)
