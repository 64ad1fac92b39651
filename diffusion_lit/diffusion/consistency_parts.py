"""What a consistency loss is made of: the gap of two noise levels, the path between, the distance and the weight.

    loss = weight(t, r) * distance(D(x_t; t), stop D(x_r; r)),        0 <= r < t

Each of the four choices is an object. How r follows t is a `Gap`, where x_r comes from a `PathPoint`.
"""

import math
from abc import ABC, abstractmethod
from typing import cast

import torch
from torch import Tensor

from diffusion_lit.checks import check_count, check_number
from diffusion_lit.diffusion.denoiser import DenoiserLike, per_sample
from diffusion_lit.diffusion.guidance import ClassifierFreeGuidance
from diffusion_lit.diffusion.preconditioning import Preconditioning
from diffusion_lit.diffusion.wrappers import Evaluate, at_rows


class Gap(ABC):
    """How far below t the second noise level r lies, and how that shrinks in training."""

    @abstractmethod
    def __call__(self, t: Tensor, progress: float) -> Tensor:
        """The second noise level.

        Args:
            t: Noise levels, shape (B,), positive.
            progress: Share of the training that is done, in [0, 1].

        Returns:
            r of shape (B,), 0 <= r < t.
        """


class ShrinkingRatio(Gap):
    """r / t = 1 - (1 + k sigmoid(-b t)) / q^(1 + stage), at least 0; the stage rises over the training.

    The first stages are nearly denoising, r = 0; each further one divides the gap by q.

    Args:
        q: What a stage divides the gap by, above 1.
        stages: Number of stages, of equal length; at the end of the training the gap is that of the last.
        k: How much wider the gap is at low noise levels, 0 or more.
        b: How fast that fades with the noise level, positive.
        first: The stage that training begins with; 0 is denoising at almost all levels.

    Raises:
        ValueError: If a number is out of range.

    Source: Geng et al. 2024 (arXiv 2406.14548), equation 14 and appendix A.
    """

    def __init__(self, q: float = 2.0, stages: int = 8, k: float = 8.0, b: float = 1.0, first: int = 0) -> None:
        check_number(above=1, q=q)
        check_count(stages=stages)
        check_count(0, first=first)
        check_number(least=0, k=k)
        check_number(above=0, b=b)
        if first >= stages:
            raise ValueError(f"first is {first}, but there are {stages} stages, 0 to {stages - 1}; give one of these.")
        self.q, self.stages, self.k, self.b, self.first = q, stages, k, b, first

    def __call__(self, t: Tensor, progress: float) -> Tensor:
        """The second noise level; see `Gap.__call__`."""
        stage = min(self.first + math.floor(progress * (self.stages - self.first)), self.stages - 1)
        share = (1 + self.k * torch.sigmoid(-self.b * t)) * self.q ** -(1 + stage)
        return t * (1 - share).clamp(min=0)


class ShrinkingGrid(Gap):
    """r is one step of a Karras grid of N steps below t; N doubles from `first` to `last` over the training.

    Args:
        first: Number of steps at the start, at least 1.
        last: Most steps, which the end of the training has; at least `first`.
        rho: Exponent of the grid, positive.
        sigma_min: Lower end of the grid, positive; below it r is 0.
        sigma_max: Upper end of the grid.

    Raises:
        ValueError: If a number is out of range.

    Source: Song and Dhariwal 2023 (arXiv 2310.14189), section 3.4 and table 1; here t need not be a level of the grid.
    """

    def __init__(
        self, first: int = 10, last: int = 1280, rho: float = 7.0, sigma_min: float = 0.002, sigma_max: float = 80.0
    ) -> None:
        check_count(first=first)
        check_count(first, last=last)
        check_number(above=0, rho=rho, sigma_min=sigma_min)
        check_number(above=sigma_min, sigma_max=sigma_max)
        self.first, self.last, self.rho = first, last, rho
        self.low, self.high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)

    def __call__(self, t: Tensor, progress: float) -> Tensor:
        """The second noise level; see `Gap.__call__`."""
        doublings = math.floor(math.log2(self.last / self.first)) + 1
        steps = min(self.first * 2 ** math.floor(progress * doublings), self.last)
        root = t ** (1 / self.rho) - (self.high - self.low) / steps
        return torch.where(root >= self.low, root.clamp(min=self.low) ** self.rho, 0.0)


class Distance(ABC):
    """How far two estimates lie apart."""

    @abstractmethod
    def __call__(self, difference: Tensor) -> Tensor:
        """The distance.

        Args:
            difference: One estimate minus the other, shape (B, ...).

        Returns:
            Shape (B,).
        """


class SquaredDistance(Distance):
    """The mean square over pixels."""

    def __call__(self, difference: Tensor) -> Tensor:
        """The distance; see `Distance.__call__`."""
        return difference.square().flatten(1).mean(1)


class PseudoHuber(Distance):
    """sqrt(m + c^2) - c, with m the mean square over pixels: the root mean square, smooth at 0.

    Args:
        c: Where it turns from a square into a root, positive.

    Raises:
        ValueError: If `c` is not positive.

    Source: Song and Dhariwal 2023 (arXiv 2310.14189), section 3.3; the same but for a factor, as their c grows with the
        root of the number of pixels.
    """

    def __init__(self, c: float = 0.00054) -> None:
        check_number(above=0, c=c)
        self.c = c

    def __call__(self, difference: Tensor) -> Tensor:
        """The distance; see `Distance.__call__`."""
        square = difference.square().flatten(1).mean(1)
        return square / ((square + self.c**2).sqrt() + self.c)  # which does not cancel


class PairWeight:
    """How much a pair of noise levels counts: 1."""

    def __call__(self, t: Tensor, r: Tensor, scaling: Preconditioning) -> Tensor:
        """The weight.

        Args:
            t: The upper noise levels, shape (B,).
            r: The lower ones, shape (B,).
            scaling: The prediction type.

        Returns:
            Shape (B,), positive.
        """
        return torch.ones_like(t)


class InverseGap(PairWeight):
    """1 / (t - r): as the gap shrinks the difference of the estimates does too, and the loss keeps its size.

    Source: Song and Dhariwal 2023 (arXiv 2310.14189), table 1; Geng et al. 2024 (arXiv 2406.14548), section 3.3.
    """

    def __call__(self, t: Tensor, r: Tensor, scaling: Preconditioning) -> Tensor:
        """The weight; see `PairWeight.__call__`."""
        return 1 / (t - r)


class PathPoint:
    """The point x_r of the path through x_t that makes a pair with it: x0 + r n of the same draw (training and tuning).

    Over all draws that lead to x_t, (x_t - x_r) / (t - r) = n has the mean of the ODE's velocity. A single draw is off
    by the difference, which gradients of a squared distance average out.
    """

    def __call__(
        self, x: Tensor, x0: Tensor, noise: Tensor, t: Tensor, r: Tensor, label: Tensor | None, augment: Tensor | None
    ) -> Tensor:
        """The point.

        Args:
            x: x_t, shape (B, ...).
            x0: Clean images, of x's shape.
            noise: Standard normal, of x's shape.
            t: Noise levels, shape (B,).
            r: Noise levels below, shape (B,), from 0 on.
            label: Class indices, shape (B,), or None.
            augment: Augmentation labels, shape (B, augment_dim), or None.

        Returns:
            x_r, of x's shape.
        """
        return x0 + per_sample(r, x0) * noise

    def slope(
        self, x: Tensor, x0: Tensor, noise: Tensor, t: Tensor, label: Tensor | None, augment: Tensor | None
    ) -> Tensor:
        """The derivative of the path at x_t by the noise level.

        Args:
            x: x_t, shape (B, ...).
            x0: Clean images, of x's shape.
            noise: Standard normal, of x's shape.
            t: Noise levels, shape (B,).
            label: Class indices, shape (B,), or None.
            augment: Augmentation labels, shape (B, augment_dim), or None.

        Returns:
            dx/dt, of x's shape.
        """
        return noise

    def open(
        self,
        x_shape: tuple[int, int, int],
        num_classes: int,
        begun_from: str | None = None,
        encoder_sha256: str | None = None,
    ) -> str | None:
        """Prepares the source of the points for training.

        Args:
            x_shape: Shape (C, H, W) of what is denoised.
            num_classes: Number of the model's classes.
            begun_from: The checkpoint that the model's first weights are from; None where it drew them.
            encoder_sha256: Hash of the encoder whose latents are denoised; None where images are.

        Returns:
            The hash of the weights of a teacher; None where nothing is read.
        """
        return None


class TeacherStep(PathPoint):
    """The point that a teacher's ODE leads to from x_t, by a step of Heun's method: distillation.

    Args:
        teacher: A trained denoiser.
        cfg_scale: Classifier-free guidance of the teacher, which the student learns; 1 is none.

    Raises:
        ValueError: If the scale is no number, or not 1 for a teacher without classes.

    Source: Song et al. 2023 (arXiv 2303.01469), algorithm 2.
    """

    def __init__(self, teacher: DenoiserLike, cfg_scale: float = 1.0) -> None:
        check_number(cfg_scale=cfg_scale)
        self.teacher = ClassifierFreeGuidance(teacher, cfg_scale)

    def __call__(
        self, x: Tensor, x0: Tensor, noise: Tensor, t: Tensor, r: Tensor, label: Tensor | None, augment: Tensor | None
    ) -> Tensor:
        """The point; see `PathPoint.__call__`."""
        upper, step = per_sample(t, x), per_sample(r - t, x)
        x0_hat = self._estimate(x, t, label, augment)
        slope = (x - x0_hat) / upper
        inside = torch.where(r > 0, r, t)  # a row that ends at 0 takes x0_hat, as no network is called there
        reached = torch.where(per_sample(r > 0, x), x + step * slope, x)
        slope_there = (reached - self._estimate(reached, inside, label, augment)) / per_sample(inside, x)
        return torch.where(per_sample(r > 0, x), x + step * (slope + slope_there) / 2, x0_hat)

    def slope(
        self, x: Tensor, x0: Tensor, noise: Tensor, t: Tensor, label: Tensor | None, augment: Tensor | None
    ) -> Tensor:
        """The slope of the teacher's ODE; see `PathPoint.slope`."""
        return (x - self._estimate(x, t, label, augment)) / per_sample(t, x)

    def _estimate(self, x: Tensor, sigma: Tensor, label: Tensor | None, augment: Tensor | None) -> Tensor:
        """The teacher's estimate, guided where there are labels, and told of the augmentation if it knows such."""
        known = augment is not None and getattr(self.teacher.denoiser, "augment_dim", 0) == augment.shape[1]
        evaluate = _Augmented(self.teacher.denoiser, augment if known else None)
        return self.teacher.transform(evaluate, x, sigma, label)[0]


class _Augmented(Evaluate):
    """One evaluation of a denoiser that is told how its images are augmented."""

    def __init__(self, denoiser: DenoiserLike, augment: Tensor | None) -> None:
        super().__init__(denoiser)
        self.augment = augment

    def __call__(
        self, x: Tensor, sigma: Tensor | float, label: Tensor | None, rows: Tensor | None = None, **told: Tensor
    ) -> tuple[Tensor, ...]:
        """Evaluates; see `Evaluate.__call__`."""
        if self.augment is not None:
            told["augment"] = self.augment if rows is None else cast(Tensor, at_rows(self.augment, rows))
        return super().__call__(x, sigma, label, rows, **told)
