"""Series of samples: interpolation between seeds, and a sweep of guidance scales.

Every draw, of the start and of a stochastic sampler's steps, is interpolated on the great circle between the draws of
the two seeds, where normal noise stays normal, so that a series is smooth for every sampler.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_lit.checks import check_count
from diffusion_lit.diffusion.denoiser import per_sample
from diffusion_lit.diffusion.editing.common import check_seeds, device_of, labels_for, settings
from diffusion_lit.diffusion.generate import Sampling, StepCallback
from diffusion_lit.diffusion.models import PixelModel
from diffusion_lit.diffusion.rng import SeededNoise


def slerp(first: Tensor, last: Tensor, shares: Tensor) -> Tensor:
    """Points on the great circle between two tensors.

    Args:
        first: Any shape (...), where the way begins.
        last: Of the same shape, where it ends.
        shares: Places on the way, shape (S,): 0 gives `first` and 1 gives `last`, exactly.

    Returns:
        Shape (S, ...). Of normal noise each point is normal noise again, but for the two lengths, which are blended. In
        one direction, where there is no circle, it is the straight line.

    Source: Shoemake 1985, "Animating rotation with quaternion curves", section 3.3.
    """
    a, b = first.cpu().double(), last.cpu().double()  # not every accelerator has float64
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = cosine.clamp(-1, 1).acos()
    shares = per_sample(shares.to(a), a[None])
    if angle.sin() < 1e-6:
        return torch.lerp(a[None], b[None], shares).to(first)
    way: Tensor = ((1 - shares) * angle).sin() / angle.sin() * a + (shares * angle).sin() / angle.sin() * b
    return way.to(first)


class NoiseBetween:
    """Noise between two seeds: every draw lies on the great circle between theirs.

    Args:
        first: Seed at share 0.
        last: Seed at share 1.
        shares: Places on the way, shape (S,), one for each sample.
    """

    def __init__(self, first: int, last: int, shares: Tensor) -> None:
        check_count(0, first=first, last=last)
        self.first, self.last, self.shares = SeededNoise([first]), SeededNoise([last]), shares

    def __call__(self, x: Tensor) -> Tensor:
        """The next noise like x, shape (S, ...)."""
        return slerp(self.first(x[:1])[0], self.last(x[:1])[0], self.shares)


@torch.no_grad()
def interpolate(
    model: PixelModel,
    first: int,
    last: int,
    shares: Tensor,
    *,
    labels: Tensor | None = None,
    sampling: Sampling | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Draws what lies between the samples of two seeds, with any sampler.

    Args:
        model: The model.
        first: Seed of the image at share 0, which is `generate`'s of that seed.
        last: Seed of the image at share 1.
        shares: Places on the way, shape (S,).
        labels: Class indices (S,), or None.
        sampling: Sampler, grid and guidance; the model's own by default.
        callback: Called as `callback(step, x, x0_hat, sigma)` at each step.

    Returns:
        Images (S, C, H, W).

    Raises:
        ValueError: If labels do not fit.

    Source: DDIM, arXiv 2010.02502, section 5.3.
    """
    sampling = settings(model, sampling)
    noise = NoiseBetween(first, last, shares)
    start = noise(torch.empty(len(shares), *model.x_shape, device=device_of(model)))
    denoiser = sampling.wrap(model.denoiser, labels_for(model, labels, len(shares)))
    x = sampling.start(model.denoiser.scaling, start)
    x = sampling.run(denoiser, x, noise=noise, callback=callback)
    return model.decode(sampling.finish(denoiser.scaling, x))


@torch.no_grad()
def guidance_sweep(
    model: PixelModel,
    labels: Tensor,
    cfg_scales: Sequence[float] = (1.0, 2.5, 5.0, 7.0),
    *,
    seeds: Sequence[int] | None = None,
    sampling: Sampling | None = None,
) -> Tensor:
    """Draws the same seeds under several strengths of guidance.

    Args:
        model: A class-conditional model, or one of text.
        labels: Class indices (B,).
        cfg_scales: The strengths, S of them.
        seeds: One seed per label, 0, 1, ... by default.
        sampling: Sampler and grid; the model's own by default.

    Returns:
        Images (B, S, C, H, W).

    Raises:
        ValueError: If the model has no classes, or labels or seeds do not fit.

    Source: arXiv 2207.12598.
    """
    sampling = settings(model, sampling)
    seeds = check_seeds(seeds, len(labels))
    drawn = [
        model.decode(sampling.replace(cfg_scale=scale).generate(model.denoiser, model.x_shape, seeds, labels))
        for scale in cfg_scales
    ]
    return torch.stack(drawn, 1)
