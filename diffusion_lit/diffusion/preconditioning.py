"""Prediction types: what the network sees and what its output means.

    D(x; sigma) = c_skip * x + c_out * net(c_in * x, c_noise, label)

with x = x0 + sigma n. The network is trained, in effect, on the target (x0 - c_skip x) / c_out:

    type   c_skip             c_out                  c_in               c_noise    target
    EDM    sd²/(s²+sd²)       s sd/√(s²+sd²)         1/√(s²+sd²)        ln(s)/4
    eps    1                  -s                     1/√(1+s²)          t(s)       n
    x0     0                  1                      1/√(1+s²)          t(s)       x0
    v      1/(1+s²)           -s/√(1+s²)             1/√(1+s²)          t(s)       (n - s x0)/√(1+s²)
    flow   1/(1+s)            -s/(1+s)               1/(1+s)            s/(1+s)    n - x0

where s = sigma, sd = sigma_data, and t(s) is the step of the schedule that was trained on.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffusion_lit.checks import check_number
from diffusion_lit.diffusion.conversions import FLOW_TIME_MAX, FLOW_TIME_MIN, sigma_to_flow_time, widen
from diffusion_lit.diffusion.schedules import Schedule

Coefficients = tuple[Tensor, Tensor, Tensor, Tensor]

FLOW_RANGE = (FLOW_TIME_MIN / (1 - FLOW_TIME_MIN), FLOW_TIME_MAX / (1 - FLOW_TIME_MAX))


class Preconditioning(ABC):
    """A prediction type: `scaling(sigma) -> (c_skip, c_out, c_in, c_noise)`.

    Subclasses define `coefficients`. A support that begins at 0 or ends at infinity is open there.

    Args:
        support: (sigma_min, sigma_max), the noise levels that a network of this type is trained on.
        sampling_range: Where sampling grids run unless told otherwise; none means the support.
        variance_preserving: Whether sampling starts from sqrt(1 + sigma^2) n, as on a VP path, and not from sigma n.
        schedule: The schedule that tells the network the time; none where sigma itself does.
    """

    def __init__(
        self,
        support: tuple[float, float],
        sampling_range: tuple[float, float] | None = None,
        variance_preserving: bool = False,
        schedule: Schedule | None = None,
    ) -> None:
        self.sigma_min, self.sigma_max = support
        self.sampling_range = support if sampling_range is None else sampling_range
        self.variance_preserving = variance_preserving
        self.schedule = schedule

    @abstractmethod
    def coefficients(self, sigma: Tensor) -> Coefficients:
        """The four coefficients, without a check of the support.

        Args:
            sigma: Any shape, float32 or float64, positive.

        Returns:
            c_skip, c_out, c_in and c_noise, each of sigma's shape and dtype.
        """

    def __call__(self, sigma: Tensor | float) -> Coefficients:
        """The four coefficients.

        Args:
            sigma: Any shape, inside the support.

        Returns:
            c_skip, c_out, c_in and c_noise, each of sigma's shape, in float64 for float64 and Python floats, else
            float32.

        Raises:
            ValueError: If a sigma is outside the support.
        """
        sigma = sigma if isinstance(sigma, Tensor) else widen(sigma)
        self.check(sigma)
        return self.coefficients(sigma.to(torch.promote_types(sigma.dtype, torch.float32)))

    def check(self, sigma: Tensor) -> None:
        """Refuses noise levels that a network of this type is not trained on.

        Args:
            sigma: Any shape.

        Raises:
            ValueError: If a sigma is outside [sigma_min, sigma_max] by more than rounding, not positive or not finite.
        """
        if torch.compiler.is_compiling():  # a value cannot be looked at inside a compiled graph
            return
        inside = self.knows(sigma)
        if not bool(inside.all()):
            bad = sigma[~inside].flatten()[0].item()
            raise ValueError(
                f"sigma {bad:.6g} is outside the noise levels that {type(self).__name__} is trained on, "
                f"{self.sigma_min:.6g} to {self.sigma_max:.6g}; choose sigma_min and sigma_max of the grid inside, and "
                "S_tmax below where churn raises the noise."
            )

    def knows(self, sigma: Tensor) -> Tensor:
        """Which noise levels a network of this type is trained on.

        Args:
            sigma: Any shape.

        Returns:
            Of the same shape, bool: positive, finite, and inside [sigma_min, sigma_max] up to rounding.
        """
        slack = max(1e-4, 4 * torch.finfo(sigma.dtype).eps) if sigma.is_floating_point() else 1e-4
        low, high = self.sigma_min * (1 - slack), self.sigma_max * (1 + slack)
        return (sigma >= low) & (sigma <= high) & (sigma > 0) & (sigma < math.inf)

    def clamp(self, sigma: Tensor) -> Tensor:
        """Moves noise levels to the nearest edge of the support, as training does with the tails of what it draws.

        Args:
            sigma: Any shape, positive.

        Returns:
            Of the same shape and dtype.
        """
        return sigma.clamp(self.sigma_min, self.sigma_max)


class EDMPreconditioning(Preconditioning):
    """Coefficients that keep the network's input and target at unit variance for every sigma.

    Args:
        sigma_data: Standard deviation of the data, positive.

    Raises:
        ValueError: If `sigma_data` is not positive.

    Source: Karras et al. 2022 (arXiv 2206.00364), table 1 and equations 117 to 131.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        check_number(above=0, sigma_data=sigma_data, hint="; 0.5 suits images")
        super().__init__(support=(0.0, math.inf), sampling_range=(0.002, 80.0))
        self.sigma_data = sigma_data

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """See `Preconditioning.coefficients`."""
        norm = torch.hypot(sigma, torch.full_like(sigma, self.sigma_data))
        share = self.sigma_data / norm
        return share**2, sigma * share, 1 / norm, sigma.log() / 4


def _vp_path(schedule: Schedule | None, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """c_in and c_noise on a variance-preserving path."""
    assert schedule is not None
    return 1 / torch.hypot(sigma, torch.ones_like(sigma)), schedule.sigma_to_t(sigma)


class EpsPreconditioning(Preconditioning):
    """The network predicts the noise n.

    Args:
        schedule: The steps that the network is trained on.

    Source: Ho et al. 2020 (arXiv 2006.11239), equation 14; as a denoiser, Karras et al. 2022 (arXiv 2206.00364), table
        1.
    """

    def __init__(self, schedule: Schedule) -> None:
        super().__init__((schedule.sigma_min, schedule.sigma_max), schedule.sampling_range, True, schedule)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """See `Preconditioning.coefficients`."""
        return torch.ones_like(sigma), -sigma, *_vp_path(self.schedule, sigma)


class VPreconditioning(Preconditioning):
    """The network predicts v = sqrt(alpha_bar) n - sqrt(1 - alpha_bar) x0.

    Args:
        schedule: The steps that the network is trained on.

    Source: Salimans and Ho 2022 (arXiv 2202.00512), appendix D.
    """

    def __init__(self, schedule: Schedule) -> None:
        super().__init__((schedule.sigma_min, schedule.sigma_max), schedule.sampling_range, True, schedule)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """See `Preconditioning.coefficients`."""
        c_in, c_noise = _vp_path(self.schedule, sigma)
        return c_in**2, -sigma * c_in, c_in, c_noise


class X0Preconditioning(Preconditioning):
    """The network predicts the clean image x0.

    Args:
        schedule: The steps that the network is trained on; none means a flow path, with flow time in [1e-3, 1 - 1e-3].

    Source: Salimans and Ho 2022 (arXiv 2202.00512), section 4.
    """

    def __init__(self, schedule: Schedule | None = None) -> None:
        if schedule is None:
            super().__init__(FLOW_RANGE)
        else:
            super().__init__((schedule.sigma_min, schedule.sigma_max), schedule.sampling_range, True, schedule)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """See `Preconditioning.coefficients`."""
        if self.schedule is None:
            c_in, c_noise = 1 / (1 + sigma), sigma_to_flow_time(sigma)
        else:
            c_in, c_noise = _vp_path(self.schedule, sigma)
        return torch.zeros_like(sigma), torch.ones_like(sigma), c_in, c_noise


class FlowPreconditioning(Preconditioning):
    """The network predicts the velocity n - x0 of the straight path (1 - t) x0 + t n, with t in [1e-3, 1 - 1e-3].

    Source: Lipman et al. 2023 (arXiv 2210.02747); Liu et al. 2023 (arXiv 2209.03003), equation 1.
    """

    def __init__(self) -> None:
        super().__init__(FLOW_RANGE)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """See `Preconditioning.coefficients`."""
        c_in, time = 1 / (1 + sigma), sigma_to_flow_time(sigma)
        return c_in, -time, c_in, time
