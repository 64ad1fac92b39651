"""Views: any denoiser read as the network of another prediction type, in the coordinates of another library.

With x = x0 + sigma n and the estimate x0_hat = D(x; sigma), every prediction is a linear function of the two:

    eps      = (x - x0_hat) / sigma                     velocity = eps - x0_hat
    v        = (eps - sigma x0_hat) / sqrt(1 + sigma²)  score    = -eps / (standard deviation of the noise in the image)

A view is called as `view(image, time, label)`, where the path says what image and time are:

    path "ve"     image = x0 + sigma n                                              time = sigma
    path "vp"     image = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) n                time = t, a step from 0
    path "flow"   image = (1 - t) x0 + t n                                          time = t in (0, 1)
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffusion_lit.diffusion.conversions import flow_time_to_sigma, widen
from diffusion_lit.diffusion.denoiser import DenoiserLike, per_sample
from diffusion_lit.diffusion.schedules import Schedule
from diffusion_lit.diffusion.wrappers import Evaluate

PATHS = ("ve", "vp", "flow")


class View(nn.Module):
    """A denoiser read as another prediction.

    Args:
        denoiser: Any denoiser.
        read: (x0_hat, eps, sigma, shrink) -> prediction, where the image is x * shrink.
        path: "ve", "vp" or "flow".
        schedule: The schedule whose steps "vp" counts; none means the denoiser's own.

    Raises:
        ValueError: If the path is none of these, or "vp" has no schedule.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        read: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        path: str = "ve",
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__()
        if path not in PATHS:
            raise ValueError(f"There is no path {path!r}; choose one of {', '.join(PATHS)}.")
        if path == "vp" and schedule is None:
            schedule = getattr(getattr(denoiser, "scaling", None), "schedule", None)
            if schedule is None:
                raise ValueError(
                    "This denoiser has no schedule to count the steps of; give the view one, LinearSchedule() say."
                )
        self.denoiser, self.read, self.path, self.schedule = denoiser, read, path, schedule

    def _sigma(self, time: Tensor) -> Tensor:
        """The noise level at a time of the path."""
        if self.path == "ve":
            return time
        if self.path == "flow":
            return flow_time_to_sigma(time)
        assert self.schedule is not None
        return self.schedule.t_to_sigma(time)

    def forward(self, image: Tensor, time: Tensor | float, label: Tensor | None = None) -> Tensor:
        """Predicts.

        Args:
            image: Shape (B, C, H, W), in the coordinates of the path.
            time: Shape () or (B,), of the path's kind.
            label: Class indices, shape (B,), or none.

        Returns:
            The prediction, shape (B, C, H, W).
        """
        image = image.to(torch.promote_types(image.dtype, torch.float32))
        levels = self._sigma(widen(time)).to(image)
        sigma = per_sample(levels, image)
        shrink = {"ve": torch.ones_like(sigma), "vp": 1 / (1 + sigma**2).sqrt(), "flow": 1 / (1 + sigma)}[self.path]
        x = image / shrink
        (x0_hat,) = Evaluate(self.denoiser)(x, levels, label)
        return self.read(x0_hat, (x - x0_hat) / sigma, sigma, shrink)


def as_x0(denoiser: DenoiserLike, path: str = "ve", schedule: Schedule | None = None) -> View:
    """The clean image, for a sampler in other coordinates.

    Args:
        denoiser: Any denoiser.
        path: "ve", "vp" or "flow": what the image and the time are.
        schedule: The schedule whose steps "vp" counts; none means the denoiser's own.

    Returns:
        `view(image, time, label) -> x0_hat`.
    """
    return View(denoiser, lambda x0_hat, eps, sigma, shrink: x0_hat, path, schedule)


def as_eps(denoiser: DenoiserLike, path: str = "ve", schedule: Schedule | None = None) -> View:
    """The noise n.

    Args:
        denoiser: Any denoiser.
        path: As in `as_x0`.
        schedule: As in `as_x0`.

    Returns:
        `view(image, time, label) -> eps`, (x - x0_hat) / sigma.
    """
    return View(denoiser, lambda x0_hat, eps, sigma, shrink: eps, path, schedule)


def as_v(denoiser: DenoiserLike, path: str = "ve", schedule: Schedule | None = None) -> View:
    """The v of Salimans and Ho 2022 (arXiv 2202.00512), which is the same number on every path.

    v = sqrt(alpha_bar) n - sqrt(1 - alpha_bar) x0, with alpha_bar = 1 / (1 + sigma^2).

    Args:
        denoiser: Any denoiser.
        path: As in `as_x0`.
        schedule: As in `as_x0`.

    Returns:
        `view(image, time, label) -> v`.
    """
    return View(
        denoiser, lambda x0_hat, eps, sigma, shrink: (eps - sigma * x0_hat) / (1 + sigma**2).sqrt(), path, schedule
    )


def as_velocity(denoiser: DenoiserLike, path: str = "ve", schedule: Schedule | None = None) -> View:
    """The velocity n - x0 of the straight path.

    Args:
        denoiser: Any denoiser.
        path: As in `as_x0`.
        schedule: As in `as_x0`.

    Returns:
        `view(image, time, label) -> velocity`.
    """
    return View(denoiser, lambda x0_hat, eps, sigma, shrink: eps - x0_hat, path, schedule)


def as_score(denoiser: DenoiserLike, path: str = "ve", schedule: Schedule | None = None) -> View:
    """The score, the gradient of the log density of the image that the view is given.

    Args:
        denoiser: Any denoiser.
        path: As in `as_x0`.
        schedule: As in `as_x0`.

    Returns:
        `view(image, time, label) -> score`; (x0_hat - x) / sigma^2 on "ve".
    """
    return View(denoiser, lambda x0_hat, eps, sigma, shrink: -eps / (sigma * shrink), path, schedule)
