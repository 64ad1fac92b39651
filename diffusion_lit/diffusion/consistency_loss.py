"""Consistency models: a denoiser whose estimate is the end of the ODE's path, so that one call draws an image.

    loss = weight(t, r) * distance(D(x_t; t), stop D(x_r; r)),        x_t = x0 + t n,        0 <= r < t

Both points lie on one path, so that the true map from x_t to the end of the path makes the loss vanish as r -> t, and
D(x; 0) = x, which preconditioning grants, leaves no other solution. Four choices are objects: how r follows t (`Gap`),
where x_r comes from (`PathPoint`), the distance and the weight. Gradients reach the first estimate alone, and the
network draws the same dropout in both.

Sources: Song et al. 2023 (arXiv 2303.01469); Song and Dhariwal 2023 (arXiv 2310.14189); Geng et al. 2024 (arXiv
2406.14548).
"""

import math

import torch
from torch import Tensor, nn

from diffusion_lit.checks import check_count, check_number
from diffusion_lit.diffusion.denoiser import Denoiser, DenoiserLike, per_sample
from diffusion_lit.diffusion.guidance import ClassifierFreeGuidance
from diffusion_lit.diffusion.preconditioning import Preconditioning
from diffusion_lit.diffusion.rng import network_draws, repeating


def check_boundary(scaling: Preconditioning) -> None:
    """Refuses a prediction type by which D(x; 0) is not x, so that nothing ties the map to the image.

    Args:
        scaling: The prediction type.

    Raises:
        ValueError: If c_skip(0) is not 1 or c_out(0) is not 0.
    """
    c_skip, c_out = (float(c) for c in scaling.coefficients(torch.zeros((), dtype=torch.float64))[:2])
    if c_skip != 1 or c_out != 0:
        raise ValueError(
            "A consistency model must give the image itself at noise level 0, D(x; 0) = x, but "
            f"{type(scaling).__name__} has c_skip(0) = {c_skip:g} and c_out(0) = {c_out:g} instead of 1 and 0, so that "
            "a constant image would solve the loss; use EDMPreconditioning, or the prediction of eps, v or flow."
        )


class Gap:
    """How far below t the second noise level r lies, and how that shrinks in training."""

    def __call__(self, t: Tensor, progress: float) -> Tensor:
        """The second noise level.

        Args:
            t: Noise levels, shape (B,), positive.
            progress: Share of the training that is done, in [0, 1].

        Returns:
            r of shape (B,), 0 <= r < t.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say where r lies.")


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


class Distance:
    """How far two estimates lie apart."""

    def __call__(self, difference: Tensor) -> Tensor:
        """The distance.

        Args:
            difference: One estimate minus the other, shape (B, ...).

        Returns:
            Shape (B,).
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how far estimates lie apart.")


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

    def open(self, x_shape: tuple[int, int, int], num_classes: int) -> str | None:
        """Makes ready for training whatever the points come from.

        Args:
            x_shape: Shape (C, H, W) of what is denoised.
            num_classes: Number of the model's classes.

        Returns:
            The hash of the weights of a teacher; None where nothing is read.
        """
        return None


class TeacherStep(PathPoint):
    """The point that a teacher's ODE leads to from x_t, by a step of Heun's method: distillation.

    Args:
        teacher: A trained denoiser.
        cfg_scale: Classifier-free guidance of the teacher, which the student so learns; 1 is none.

    Raises:
        ValueError: If the scale is no number.

    Source: Song et al. 2023 (arXiv 2303.01469), algorithm 2.
    """

    def __init__(self, teacher: DenoiserLike, cfg_scale: float = 1.0) -> None:
        check_number(cfg_scale=cfg_scale)
        self.teacher, self.cfg_scale = teacher, cfg_scale

    def __call__(
        self, x: Tensor, x0: Tensor, noise: Tensor, t: Tensor, r: Tensor, label: Tensor | None, augment: Tensor | None
    ) -> Tensor:
        """The point; see `PathPoint.__call__`."""
        teacher = ClassifierFreeGuidance(self.teacher, self.cfg_scale) if label is not None else self.teacher
        upper, step = per_sample(t, x), per_sample(r - t, x)
        x0_hat = teacher(x, t, label)
        slope = (x - x0_hat) / upper
        inside = torch.where(r > 0, r, t)  # a row that ends at 0 takes x0_hat, as no network is called there
        reached = torch.where(per_sample(r > 0, x), x + step * slope, x)
        slope_there = (reached - teacher(reached, inside, label)) / per_sample(inside, x)
        return torch.where(per_sample(r > 0, x), x + step * (slope + slope_there) / 2, x0_hat)


class ConsistencyLoss(nn.Module):
    """The distance between a denoiser's estimates at two points of one path.

    Args:
        gap: How r follows t; by default it shrinks in 8 stages to 1 / 256 of t and more.
        point: Where x_r comes from; by default the same draw.
        distance: By default pseudo-Huber.
        weight: By default 1 / (t - r).
    """

    def __init__(
        self,
        gap: Gap | None = None,
        point: PathPoint | None = None,
        distance: Distance | None = None,
        weight: PairWeight | None = None,
    ) -> None:
        super().__init__()
        self.gap = gap or ShrinkingRatio()
        self.point = point or PathPoint()
        self.distance = distance or PseudoHuber()
        self.weight = weight or InverseGap()

    def forward(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        sigma: Tensor,
        noise: Tensor,
        label: Tensor | None = None,
        augment: Tensor | None = None,
        progress: float = 1.0,
    ) -> Tensor:
        """The loss of each sample.

        Args:
            denoiser: What is trained.
            x0: Clean images, shape (B, C, H, W).
            sigma: The upper noise levels t, shape (B,); those outside the support of the scaling are moved to its edge.
            noise: Standard normal, shape (B, C, H, W).
            label: Class indices, shape (B,), or none.
            augment: Augmentation labels, shape (B, augment_dim), or none.
            progress: Share of the training that is done, in [0, 1]; 1 is the smallest gap, by which validation
                compares.

        Returns:
            Shape (B,).
        """
        scaling = denoiser.scaling
        t = scaling.clamp(sigma)
        r = self.gap(t, progress)
        r = torch.where(r < scaling.sigma_min, 0.0, r)  # where no network is trained
        x = x0 + per_sample(t, x0) * noise
        draws = network_draws(x.device)
        # First with gradients: autocast keeps the weights that it casts, and those cast without would get none.
        estimate = denoiser(x, t, label, augment=augment)
        with torch.no_grad():
            point = self.point(x, x0, noise, t, r, label, augment)
            with repeating(draws, x.device):
                target = denoiser(point, torch.where(r > 0, r, t), label, augment=augment)
            target = torch.where(per_sample(r > 0, point), target, point)
        loss: Tensor = self.weight(t, r, scaling) * self.distance(estimate - target)
        return loss
