"""Noise schedules: tables of noise levels.

A `Schedule` of T steps is a table of noise levels in the coordinates x = x0 + sigma n, with its betas and alpha_bar as
in `conversions`; it is read at any real step t between 0 and T - 1, linear in log sigma between steps. Tables are
float64 on the CPU, which keeps both ends accurate.
"""

import math

import torch
from torch import Tensor

from diffusion_lit.checks import check_number
from diffusion_lit.diffusion.conversions import betas_to_alpha_bar, betas_to_sigma, widen

MOST_STEPS = 1_000_000  # of a table that is kept in memory


def _result_dtype(value: Tensor | float) -> torch.dtype:
    """Conversions return the precision of their input, at least float32; integers and Python floats give float64."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return torch.float64
    return torch.promote_types(value.dtype, torch.float32)


class Schedule:
    """A variance-preserving noise schedule of T steps.

    Subclasses say where the betas come from. Steps count from 0: step t of this table is step t + 1 of Ho et al. 2020.

    Args:
        betas: Shape (T,), T at least 2, each in (0, 1).

    Attributes:
        num_steps: T.
        betas: Shape (T,), float64.
        alpha_bar: Shape (T,), float64, falling.
        sigmas: Shape (T,), float64, rising.
        sigma_min: The first of `sigmas`.
        sigma_max: The last of `sigmas`.
        sampling_range: (low, high), between which sampling grids run unless told otherwise.

    Raises:
        ValueError: If there are fewer than two betas or one lies outside (0, 1).
    """

    def __init__(self, betas: Tensor) -> None:
        betas = betas.to(device="cpu", dtype=torch.float64)
        if betas.ndim != 1 or len(betas) < 2:
            raise ValueError(
                f"A schedule needs a row of 2 betas or more, not shape {tuple(betas.shape)}; raise num_steps."
            )
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(
                f"Betas must lie strictly between 0 and 1, but run from {betas.min():.4g} to {betas.max():.4g}; "
                "lower the betas, or take more steps where they are scaled by 1000 / num_steps."
            )
        self.num_steps = len(betas)
        self.betas = betas
        self.alpha_bar = betas_to_alpha_bar(betas)
        self.sigmas = betas_to_sigma(betas)
        self.sigma_min = float(self.sigmas[0])
        self.sigma_max = float(self.sigmas[-1])
        self.sampling_range = (self.sigma_min, self.sigma_max)
        self._log_sigmas: dict[torch.device, Tensor] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_steps={self.num_steps}, sigma {self.sigma_min:.4g} to {self.sigma_max:.4g})"

    def _table(self, device: torch.device) -> Tensor:
        """Logarithms of `sigmas` on a device, moved there once."""
        if device not in self._log_sigmas:
            log_sigmas = self.sigmas.log()
            self._log_sigmas[device] = log_sigmas.to(device=device, dtype=widen(torch.empty(0, device=device)).dtype)
        return self._log_sigmas[device]

    def sigma_to_t(self, sigma: Tensor | float) -> Tensor:
        """The real-valued step at which the noise level is sigma, linear in log sigma between steps.

        Args:
            sigma: Any shape, in [sigma_min, sigma_max]; values outside get the nearest end (scalings refuse them
                before).

        Returns:
            Of the same shape, in [0, T - 1]; float64 for float64 and Python floats, float32 otherwise.
        """
        log_sigma = widen(sigma).log()
        table = self._table(log_sigma.device)
        upper = torch.searchsorted(table, log_sigma.contiguous()).clamp(1, self.num_steps - 1)
        low, high = torch.take(table, upper - 1), torch.take(table, upper)  # an index () would make the host wait
        t = (upper - 1 + (log_sigma - low) / (high - low)).clamp(0, self.num_steps - 1)
        return t.to(_result_dtype(sigma))

    def t_to_sigma(self, t: Tensor | float) -> Tensor:
        """Inverse of `sigma_to_t`.

        Args:
            t: Any shape, integers or reals in [0, T - 1]; values outside get the nearest end.

        Returns:
            Of the same shape, in [sigma_min, sigma_max]; float32 for float32 and shorter, float64 otherwise.
        """
        position = widen(t).clamp(0, self.num_steps - 1)
        table = self._table(position.device)
        lower = position.floor().clamp(max=self.num_steps - 2).long()
        log_sigma = torch.lerp(torch.take(table, lower), torch.take(table, lower + 1), position - lower)
        return log_sigma.exp().to(_result_dtype(t))


class LinearSchedule(Schedule):
    """Betas that rise linearly.

    With `rescale` they are multiplied by 1000 / num_steps, so that the last sigma is nearly the same for every number
    of steps.

    Args:
        num_steps: T, at least 2 (at least 21 for the default betas with `rescale`).
        beta_start: First beta of a chain of 1000 steps.
        beta_end: Last beta of a chain of 1000 steps.
        rescale: Whether to multiply the betas by 1000 / num_steps.

    Source: Ho et al. 2020 (arXiv 2006.11239), section 4; the scaling: Nichol and Dhariwal 2021 (arXiv 2102.09672).
    """

    def __init__(
        self, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, rescale: bool = True
    ) -> None:
        check_number(least=2, most=MOST_STEPS, whole=True, num_steps=num_steps)
        check_number(above=0, beta_start=beta_start, beta_end=beta_end)
        scale = 1000 / num_steps if rescale else 1.0
        super().__init__(torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64) * scale)


class ScaledLinearSchedule(Schedule):
    """Betas whose square roots rise linearly, as in latent diffusion.

    Args:
        num_steps: T, at least 2.
        beta_start: First beta of a chain of 1000 steps.
        beta_end: Last beta of a chain of 1000 steps.
        rescale: Whether to multiply the betas by 1000 / num_steps.

    Source: the code of Rombach et al. 2022 (arXiv 2112.10752).
    """

    def __init__(
        self, num_steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012, rescale: bool = True
    ) -> None:
        check_number(least=2, most=MOST_STEPS, whole=True, num_steps=num_steps)
        check_number(above=0, beta_start=beta_start, beta_end=beta_end)
        scale = 1000 / num_steps if rescale else 1.0
        roots = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_steps, dtype=torch.float64)
        super().__init__(roots**2 * scale)


def _betas_of(signal: Tensor, max_beta: float) -> Tensor:
    """Betas of a curve of alpha_bar at T + 1 points from 1 downwards, each held at max_beta at most."""
    return (1 - signal[1:] / signal[:-1]).clamp(max=max_beta)


class CosineSchedule(Schedule):
    """alpha_bar follows a squared cosine.

    Args:
        num_steps: T, at least 2.
        s: Offset that keeps the first betas from vanishing.
        max_beta: Largest beta, which only the last steps reach.

    Source: Nichol and Dhariwal 2021 (arXiv 2102.09672), equation 17.
    """

    def __init__(self, num_steps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> None:
        check_number(least=2, most=MOST_STEPS, whole=True, num_steps=num_steps)
        check_number(least=0, s=s)
        check_number(above=0, below=1, max_beta=max_beta)
        time = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
        super().__init__(_betas_of(torch.cos((time + s) / (1 + s) * math.pi / 2) ** 2, max_beta))


class SigmoidSchedule(Schedule):
    """alpha_bar follows a falling sigmoid, normalised to run from 1 to 0.

    Args:
        num_steps: T, at least 2.
        start: Where on the sigmoid's axis the curve begins.
        end: Where it ends, above `start`.
        tau: Temperature, positive: smaller is steeper.
        max_beta: Largest beta, which only the last steps reach.

    Raises:
        ValueError: If `end` is not above `start`, or `tau` is not positive.

    Source: Jabri et al. 2022 (arXiv 2212.11972), section 3; Chen 2023 (arXiv 2301.10972), algorithm 1.
    """

    def __init__(
        self, num_steps: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0, max_beta: float = 0.999
    ) -> None:
        check_number(least=2, most=MOST_STEPS, whole=True, num_steps=num_steps)
        check_number(start=start)
        check_number(above=start, end=end, hint=", which is start")
        check_number(above=0, tau=tau)
        check_number(above=0, below=1, max_beta=max_beta)
        time = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
        curve = torch.sigmoid((start + (end - start) * time) / tau)
        super().__init__(_betas_of((curve[-1] - curve) / (curve[-1] - curve[0]), max_beta))


class ContinuousVP(Schedule):
    """The variance-preserving diffusion in continuous time tau.

    Its sigma(tau) = sqrt(exp(tau^2 (beta_max - beta_min) / 2 + tau beta_min) - 1) is exact at every tau, not a table's.
    Step t of [0, T - 1] is tau = tau_min + (1 - tau_min) t / (T - 1); the table holds the whole steps.

    Args:
        beta_min: Rate at tau = 0, positive.
        beta_max: Rate at tau = 1, at least `beta_min`.
        num_steps: T, at least 2: the unit of the time that networks are given.
        tau_min: Smallest time of training, in (0, 1).
        tau_sampling: Smallest time of sampling by default, in [tau_min, 1).

    Raises:
        ValueError: If the rates or the times are out of order.

    Source: Song et al. 2021 (arXiv 2011.13456), equation 32; times from Karras et al. 2022 (arXiv 2206.00364), table 1.
    """

    def __init__(
        self,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        num_steps: int = 1000,
        tau_min: float = 1e-5,
        tau_sampling: float = 1e-3,
    ) -> None:
        check_number(least=2, most=MOST_STEPS, whole=True, num_steps=num_steps)
        check_number(above=0, beta_min=beta_min)
        check_number(least=beta_min, beta_max=beta_max, hint=", beta_min being the least")
        check_number(above=0, below=1, tau_min=tau_min)
        check_number(least=tau_min, below=1, tau_sampling=tau_sampling, hint=", tau_min being the least")
        self.beta_min, self.beta_max, self.tau_min = beta_min, beta_max, tau_min
        exponents = self._exponent(torch.linspace(tau_min, 1, num_steps, dtype=torch.float64))
        super().__init__(-torch.expm1(-torch.diff(exponents, prepend=exponents.new_zeros(1))))
        sampling_min = torch.expm1(self._exponent(torch.tensor(tau_sampling, dtype=torch.float64))).sqrt()
        self.sampling_range = (float(sampling_min), self.sigma_max)

    def _exponent(self, tau: Tensor) -> Tensor:
        """-log alpha_bar at time tau."""
        return tau * tau * (self.beta_max - self.beta_min) / 2 + tau * self.beta_min

    def sigma_to_t(self, sigma: Tensor | float) -> Tensor:
        """As `Schedule.sigma_to_t`, in closed form."""
        exponent = torch.log1p(widen(sigma) ** 2)
        root = (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * exponent).sqrt()
        tau = 2 * exponent / (self.beta_min + root)
        t = (tau - self.tau_min) / (1 - self.tau_min) * (self.num_steps - 1)
        return t.clamp(0, self.num_steps - 1).to(_result_dtype(sigma))

    def t_to_sigma(self, t: Tensor | float) -> Tensor:
        """As `Schedule.t_to_sigma`, in closed form."""
        position = widen(t).clamp(0, self.num_steps - 1) / (self.num_steps - 1)
        tau = self.tau_min + (1 - self.tau_min) * position
        return torch.expm1(self._exponent(tau)).sqrt().to(_result_dtype(t))
