"""The distributions of noise levels that training draws from; `schedules` has the tables of a DDPM."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffusion_lit.checks import check_number
from diffusion_lit.diffusion.conversions import FLOW_TIME_MAX, FLOW_TIME_MIN, flow_time_to_sigma, widen
from diffusion_lit.diffusion.schedules import ContinuousVP as ContinuousVP
from diffusion_lit.diffusion.schedules import CosineSchedule as CosineSchedule
from diffusion_lit.diffusion.schedules import LinearSchedule as LinearSchedule
from diffusion_lit.diffusion.schedules import ScaledLinearSchedule as ScaledLinearSchedule
from diffusion_lit.diffusion.schedules import Schedule as Schedule
from diffusion_lit.diffusion.schedules import SigmoidSchedule as SigmoidSchedule


class NoiseLevels(ABC):
    """The distribution that training draws sigma from."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws noise levels.

        Args:
            n: How many.
            generator: Where every draw comes from; the result lies on its device.

        Returns:
            Shape (n,), float32, positive. Levels outside the support of a scaling are moved to its edge by the loss.
        """


class DiscreteUniform(NoiseLevels):
    """Every step of a schedule equally often.

    Args:
        schedule: The steps to draw from.

    Source: Ho et al. 2020 (arXiv 2006.11239), algorithm 1.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._sigmas = schedule.sigmas.float()  # moved once, not at each step

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws n of the schedule's sigmas; see `NoiseLevels.sample`."""
        self._sigmas = self._sigmas.to(generator.device)
        t = torch.randint(self.schedule.num_steps, (n,), generator=generator, device=generator.device)
        return self._sigmas[t]


class UniformT(NoiseLevels):
    """Time uniform over its whole range.

    Args:
        schedule: Real-valued steps of this schedule; none means the flow time t in [1e-3, 1 - 1e-3], sigma = t / (1 -
            t).

    Source: Song et al. 2021 (arXiv 2011.13456), equation 7; flow: Lipman et al. 2023 (arXiv 2210.02747).
    """

    def __init__(self, schedule: Schedule | None = None) -> None:
        self.schedule = schedule

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws n levels; see `NoiseLevels.sample`."""
        uniform = widen(torch.rand(n, generator=generator, device=generator.device))
        if self.schedule is None:
            sigma = flow_time_to_sigma(FLOW_TIME_MIN + (FLOW_TIME_MAX - FLOW_TIME_MIN) * uniform)
        else:
            sigma = self.schedule.t_to_sigma(uniform * (self.schedule.num_steps - 1))
        return sigma.float()


class LogNormal(NoiseLevels):
    """Logarithm of sigma normal.

    Args:
        P_mean: Mean of log sigma.
        P_std: Standard deviation of log sigma, 0 or more.
        sigma_max: Draws above it are moved to it, such as to the level that a consistency model starts from; by default
            there are no such.

    Raises:
        ValueError: If `P_std` is negative, or `sigma_max` is not positive.

    Source: Karras et al. 2022 (arXiv 2206.00364), table 1.
    """

    def __init__(self, P_mean: float = -1.2, P_std: float = 1.2, sigma_max: float | None = None) -> None:
        check_number(P_mean=P_mean)
        check_number(least=0, P_std=P_std, hint="; 1.2 is the usual one")
        check_number(above=0, sigma_max=sigma_max)
        self.P_mean, self.P_std, self.sigma_max = P_mean, P_std, sigma_max

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws n levels; see `NoiseLevels.sample`."""
        normal = torch.randn(n, generator=generator, device=generator.device)
        sigma = (self.P_mean + self.P_std * normal).exp()
        return sigma if self.sigma_max is None else sigma.clamp(max=self.sigma_max)


class LogitNormal(NoiseLevels):
    """Normal logit of the flow time, which favours times in the middle; t is clamped to [1e-3, 1 - 1e-3].

    Since sigma = t / (1 - t), the logit of t is log sigma: this is `LogNormal` in terms of flow time, clamped at its
    ends.

    Args:
        mean: Mean of logit(t); above 0 favours noise.
        std: Standard deviation of logit(t), 0 or more.

    Raises:
        ValueError: If `std` is negative.

    Source: Esser et al. 2024 (arXiv 2403.03206), section 3.1.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        check_number(mean=mean)
        check_number(least=0, std=std, hint="; 1 is the usual one")
        self.mean, self.std = mean, std

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws n levels; see `NoiseLevels.sample`."""
        logit = self.mean + self.std * torch.randn(n, generator=generator, device=generator.device)
        limit = math.log(FLOW_TIME_MAX / FLOW_TIME_MIN)
        return logit.clamp(-limit, limit).exp()


class Constant(NoiseLevels):
    """One noise level for all, for a denoiser of a single sigma and for measuring the loss at it.

    Args:
        sigma: The level, positive.

    Raises:
        ValueError: If sigma is not positive.
    """

    def __init__(self, sigma: float) -> None:
        check_number(above=0, sigma=sigma, hint="; 0.5 suits images in [-1, 1]")
        self.sigma = sigma

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Gives n times the same level; see `NoiseLevels.sample`."""
        return torch.full((n,), self.sigma, device=generator.device)
