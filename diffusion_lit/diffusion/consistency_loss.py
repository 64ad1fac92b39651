"""Consistency models: a denoiser whose estimate is the end of the ODE's path, so that one call draws an image.

    loss = weight(t, r) * distance(D(x_t; t), stop D(x_r; r)),        x_t = x0 + t n,        0 <= r < t

Both points lie on one path, so that the true map from x_t to the end of the path makes the loss vanish as r -> t, and
D(x; 0) = x, which preconditioning grants, leaves no other solution. Gradients reach the first estimate alone, and the
network draws the same dropout in both. `consistency_parts` has the choices: how r follows t, where x_r comes from, the
distance and the weight. `ContinuousConsistencyLoss` is the limit of r -> t, with a derivative along the path.

Sources: Song et al. 2023 (arXiv 2303.01469); Song and Dhariwal 2023 (arXiv 2310.14189); Geng et al. 2024 (arXiv
2406.14548); Lu and Song 2024 (arXiv 2410.11081).
"""

import torch
from torch import Tensor, nn

from diffusion_lit.checks import check_number
from diffusion_lit.diffusion.consistency_parts import (
    Distance,
    Gap,
    InverseGap,
    PairWeight,
    PathPoint,
    PseudoHuber,
    ShrinkingRatio,
)
from diffusion_lit.diffusion.denoiser import Denoiser, per_sample
from diffusion_lit.diffusion.meanflow_loss import directional_derivative
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


class ContinuousConsistencyLoss(nn.Module):
    """The limit of the consistency loss as r -> t: the estimate must not change along the path.

        loss = mean |F - stop(F - v)|^2,    v = u / (rms(u) + c),    u = (t / c_out) dD/dt,    D = c_skip x + c_out F

    dD/dt is the derivative along the path, in forward mode and without gradients. u is its size as the network's output
    has it, so that every noise level counts alike, and rms(u) is over an image's pixels; the loss is below 1, and its
    gradient is that of F . v. Forward mode costs about as much as a further call of the network, and computes attention
    as plain products, since fused ones have no derivative of this kind.

    Args:
        point: Whose slope the path has; by default the same draw's.
        c: Where large derivatives are cut down to size, positive.

    Raises:
        ValueError: If `c` is not positive.

    Source: Lu and Song 2024 (arXiv 2410.11081), section 4.1, tangent normalisation; their TrigFlow network is this one
        under EDM's preconditioning.
    """

    def __init__(self, point: PathPoint | None = None, c: float = 0.1) -> None:
        super().__init__()
        check_number(above=0, c=c)
        self.point = point or PathPoint()
        self.c = c

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
        """The loss of each sample; see `ConsistencyLoss.forward`. It is the same all through the training."""
        t = denoiser.scaling.clamp(sigma)
        x = x0 + per_sample(t, x0) * noise
        slope = self.point.slope(x, x0, noise, t, label, augment).detach()
        _, change = directional_derivative(
            lambda x, t: denoiser(x, t, label, augment=augment), (x, t), (slope, torch.ones_like(t))
        )
        estimate = denoiser(x, t, label, augment=augment)  # with the dropout that the derivative saw
        c_out = denoiser.scaling.coefficients(t)[1]
        u = per_sample(t / c_out, x) * change
        v = u / (per_sample(u.square().flatten(1).mean(1).sqrt(), u) + self.c)
        target = (estimate - per_sample(c_out, x) * v).detach()
        loss: Tensor = ((estimate - target) / per_sample(c_out, x)).square().flatten(1).mean(1)
        return loss
