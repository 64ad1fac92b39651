"""MeanFlow: a denoiser that is given the end of a step learns to take it in one call, from data alone.

On the straight path z_t = (1 - t) x0 + t n the average of the velocity v over the way from t down to r,

    u(z_t, r, t) = (z_t - z_r) / (t - r),    obeys    u = v - (t - r) du/dt,    du/dt = v . grad_z u + d_t u,

which needs no integral. With the denoiser's average D = z - t u (`Denoiser.average`) and the clean image x0 = z - t v
the same identity reads

    D = (r / t) x0 + (1 - r / t) D - (t - r) dD/dt

The right-hand side, held fixed, is the target. At r = t it is x0, the denoising loss; at r = 0 it says that D is the
same along the path. In expectation over x0 given z the clean image becomes the plain estimate, and v the velocity of
the probability-flow ODE. The derivative is a forward-mode one along (v, 1), without a graph.

Source: Geng et al. 2025 (arXiv 2505.13447), equations 3, 6 and 8 to 11.
"""

import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion_lit.checks import check_number, check_numbers, check_share
from diffusion_lit.diffusion.conversions import sigma_to_flow_time
from diffusion_lit.diffusion.denoiser import Denoiser, per_sample
from diffusion_lit.diffusion.loss import DenoisingLoss, LossWeight
from diffusion_lit.diffusion.noise import LogitNormal, NoiseLevels
from diffusion_lit.diffusion.preconditioning import Preconditioning
from diffusion_lit.diffusion.rng import network_draws, repeating

DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class LevelPairs(NoiseLevels):
    """Two noise levels for each sample: where a step begins and where it ends, the larger and the smaller of two draws.

    Args:
        levels: Distribution of each of the two; by default a logit-normal flow time of mean -0.4 and deviation 1.
        equal: Probability in [0, 1] that the step ends where it begins, which is plain denoising.

    Raises:
        ValueError: If `equal` is no probability.

    Source: Geng et al. 2025 (arXiv 2505.13447), section 4.3 and table 1 (a and c).
    """

    def __init__(self, levels: NoiseLevels | None = None, equal: float = 0.75) -> None:
        check_share(equal=equal, hint="; 0.75 is the source's")
        self.levels = LogitNormal(-0.4, 1.0) if levels is None else levels
        self.equal = equal

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws n pairs (sigma, until), shape (n, 2), with until <= sigma; see `NoiseLevels.sample`."""
        one, other = self.levels.sample(n, generator), self.levels.sample(n, generator)
        sigma, until = torch.maximum(one, other), torch.minimum(one, other)
        equal = torch.rand(n, generator=generator, device=generator.device) < self.equal
        return torch.stack([sigma, torch.where(equal, sigma, until)], dim=1)


class AdaptiveWeight(LossWeight):
    """The gradient of 1 / (e + c)^p times the error e of the network's own prediction, the factor held fixed.

    Large errors count less, as under a p-norm; with p 0 it is `PredictionWeight`. The value stays e itself, so that
    losses can be compared between steps and runs. The minimum is no longer the conditional mean: see docs/concepts.md.

    Args:
        power: p, 0 or more; 1 is the source's, 0.5 is like pseudo-Huber.
        floor: c, positive, in units of the mean squared error of a pixel.

    Raises:
        ValueError: If `power` is negative, or `floor` not positive.

    Source: Geng et al. 2025 (arXiv 2505.13447), equation 22; Geng et al. 2024 (arXiv 2406.14548).
    """

    def __init__(self, power: float = 1.0, floor: float = 1e-3) -> None:
        super().__init__()
        check_number(least=0, power=power, hint="; 1 is the usual one")
        check_number(above=0, floor=floor, hint="; 0.001 is the usual one")
        self.power, self.floor = power, floor

    def forward(self, error: Tensor, sigma: Tensor, scaling: Preconditioning) -> Tensor:
        """Weighs errors; see `LossWeight.forward`."""
        error = error / scaling.coefficients(sigma)[1] ** 2
        weight = (error.detach() + self.floor) ** -self.power
        return weight * error + ((1 - weight) * error).detach()


class TrainingGuidance:
    """Classifier-free guidance built into the map, so that sampling pays one call of the network per step.

    The clean image of a labelled sample gives way to that of the guided velocity field,

        (1 - mix) (D(null) + cfg_scale (x0 - D(null))) + mix D(label),

    whose expectation, where the label's estimate has arrived, is D(null) + cfg_scale (D(label, unguided) - D(null)).
    Samples without a label keep x0. The scale cannot be changed when sampling.

    Args:
        cfg_scale: Scale of the guided field, above 0; 1 is no guidance.
        mix: Share in [0, 1) of the network's own guided estimate, which lowers the variance.
        interval: (low, high] of sigma where guidance acts; none means everywhere.

    Raises:
        ValueError: If an argument is out of range.

    Source: Geng et al. 2025 (arXiv 2505.13447), equations 13 to 16 and 19 to 21, with omega = cfg_scale (1 - mix),
    kappa = mix.
    """

    def __init__(self, cfg_scale: float, mix: float = 0.0, interval: tuple[float, float] | None = None) -> None:
        check_number(above=0, cfg_scale=cfg_scale, hint="; 1 is no guidance, 2 a usual one")
        check_number(least=0, below=1, mix=mix, hint="; 0.5 is a usual one")
        check_numbers("interval", interval, least=0, infinite=True)
        self.cfg_scale, self.mix, self.interval = cfg_scale, mix, interval

    @torch.no_grad()
    def clean(
        self, denoiser: Denoiser, x: Tensor, sigma: Tensor, x0: Tensor, label: Tensor | None, augment: Tensor | None
    ) -> Tensor:
        """The clean image of the guided field.

        Args:
            denoiser: What is trained.
            x: Noisy images, shape (B, C, H, W).
            sigma: Noise levels, shape (B,).
            x0: Clean images, shape (B, C, H, W).
            label: Class indices, shape (B,), num_classes for none.
            augment: Augmentation labels, shape (B, augment_dim), or none.

        Returns:
            Shape (B, C, H, W).

        Raises:
            ValueError: If there are no labels.
        """
        if label is None:
            raise ValueError("Guidance in training needs a model with classes; leave guidance out of the loss.")
        acts = label != denoiser.num_classes
        if self.interval is not None:
            acts = acts & (sigma > self.interval[0]) & (sigma <= self.interval[1])
        without = denoiser(x, sigma, torch.full_like(label, denoiser.num_classes), augment)
        guided = without + self.cfg_scale * (x0 - without)
        if self.mix:
            guided = (1 - self.mix) * guided + self.mix * denoiser(x, sigma, label, augment)
        return torch.where(per_sample(acts, x0), guided, x0)


class MeanFlowLoss(DenoisingLoss):
    """The squared distance of the denoiser's average estimate from the right-hand side of the MeanFlow identity.

    Args:
        weight: The weight on the squared error; none means `AdaptiveWeight`.
        guidance: Classifier-free guidance that the map learns; none means the plain conditional field.
    """

    def __init__(self, weight: LossWeight | None = None, guidance: TrainingGuidance | None = None) -> None:
        super().__init__(AdaptiveWeight() if weight is None else weight)
        self.guidance = guidance

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

        Here `sigma` holds pairs of noise levels (sigma, until), shape (B, 2), as `LevelPairs` draws them; one level for
        each, shape (B,), is plain denoising. The network takes a second noise level.

        Raises:
            ValueError: If there is a condition image.
        """
        if condition is not None:
            raise ValueError("MeanFlowLoss trains no model that is given an image; leave `condition` out.")
        levels = denoiser.scaling.clamp(sigma)
        sigma, until = (levels, levels) if levels.ndim == 1 else levels.unbind(1)
        x = x0 + per_sample(sigma, x0) * noise
        clean = x0
        if self.guidance is not None:
            clean = self.guidance.clean(denoiser, x, sigma, x0, label, augment)
        target = mean_flow_target(denoiser, x, sigma, until, clean, label, augment)
        x0_hat = denoiser.average(x, sigma, until, label, augment)
        return self.weigh(x0_hat, target, sigma, denoiser.scaling)


def mean_flow_target(
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor,
    until: Tensor,
    clean: Tensor,
    label: Tensor | None = None,
    augment: Tensor | None = None,
) -> Tensor:
    """The right-hand side of the MeanFlow identity.

    The network runs only on the samples whose step has a length, unless it has dropout: its masks must be those of the
    pass that is trained, and a part of a batch draws others. The random state is afterwards as it was before.

    Args:
        denoiser: With a network that takes a second noise level.
        x: The state at sigma, shape (B, C, H, W).
        sigma: Noise levels, shape (B,).
        until: Where the steps end, shape (B,), at most sigma.
        clean: The clean images, or what stands for them, shape (B, C, H, W).
        label: Class indices, shape (B,), or none.
        augment: Augmentation labels, shape (B, augment_dim), or none.

    Returns:
        The target of `Denoiser.average(x, sigma, until)`, shape (B, C, H, W).
    """
    drops = any(isinstance(part, DROPOUT) and part.training and part.p > 0 for part in denoiser.modules())
    rows = (until < sigma).nonzero()[:, 0] if not drops else torch.arange(len(x), device=x.device)
    if len(rows) == 0:
        return clean
    x, sigma, until, part = (value[rows] for value in (x, sigma, until, clean))
    label, augment = (None if value is None else value[rows] for value in (label, augment))
    # In x = z / (1 - t) and sigma = t / (1 - t), along the path: dz/dt = v = (z - clean) / t and dt/dt = 1.
    time, end = (per_sample(sigma_to_flow_time(level), x) for level in (sigma, until))
    rate = 1 + per_sample(sigma, x)
    x_rate = rate * (x + (x - part) / per_sample(sigma, x) - part)
    x0_hat, slope = directional_derivative(
        lambda x, sigma: denoiser.average(x, sigma, until, label, augment), (x, sigma), (x_rate, (1 + sigma) ** 2)
    )
    share = end / time
    target = share * part + (1 - share) * x0_hat - (time - end) * slope
    return clean.index_copy(0, rows, target.to(clean.dtype))


def directional_derivative(
    function: Callable[..., Tensor], points: tuple[Tensor, ...], directions: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """A function's value and its derivative in a direction, in one forward pass and without a graph (a JVP).

    Fused attention has no forward-mode derivative: attention is computed as plain products, whose memory grows with the
    square of the positions. On a core of an AMD EPYC a forward pass of a DiT on 256 positions takes 1.6 times as long
    by them, and its derivative 5 times; with `LevelPairs` as it is, a training step takes 1.5 times as long as one of
    denoising, with guidance 2.2 times. Autocast is off: under it a normalisation gives its value in bfloat16 and its
    derivative in float32, which the next convolution refuses. A compiled network runs uncompiled here. No random state
    is used up.

    Args:
        function: Takes as many tensors as there are points.
        points: Where.
        directions: Of the points' shapes.

    Returns:
        The value and the derivative, both detached.
    """
    device = points[0].device
    with (
        warnings.catch_warnings(),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        repeating(network_draws(device), device),
        sdpa_kernel(SDPBackend.MATH),
        torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext(),
        forward_ad.dual_level(),
    ):
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)  # torch's own use of it
        dual = [
            forward_ad.make_dual(point.clone(), direction.to(point))  # type: ignore[no-untyped-call]
            for point, direction in zip(points, directions, strict=True)
        ]
        value, derivative = forward_ad.unpack_dual(function(*dual))  # type: ignore[no-untyped-call]
        return value, torch.zeros_like(value) if derivative is None else derivative
