"""The true average velocity of a distribution, as a network that is told two times; formulas of their own."""

import torch
from torch import nn

from diffusion_lit.diffusion.analytic import GaussianDenoiser, GaussianMixtureDenoiser

MEANS = torch.tensor([[0.9, 0.1], [-0.6, 0.7], [-0.3, -0.8]], dtype=torch.float64)
VARIANCES = torch.tensor([0.06, 0.10, 0.04], dtype=torch.float64)
SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEAN = torch.tensor([0.3, -0.2], dtype=torch.float64)
VARIANCE = torch.tensor([0.05, 0.4], dtype=torch.float64)


def mixture():
    """Three Gaussians in the plane, as images of two channels and one pixel."""
    return GaussianMixtureDenoiser(SHARES, MEANS.view(3, 2, 1, 1), VARIANCES)


def gaussian():
    """One Gaussian in the plane."""
    return GaussianDenoiser(MEAN.view(2, 1, 1), VARIANCE)


class AverageVelocity(nn.Module):
    """(z_t - z_r) / (t - r), which is the velocity itself at t = r.

    Args:
        gives_x0: Whether it answers for the prediction z - t u in place of u.
        factor: What u is multiplied by, where it is to be wrong.
    """

    takes_until = True
    num_classes = 0

    def __init__(self, gives_x0=False, factor=1.0):
        super().__init__()
        self.gives_x0, self.factor = gives_x0, factor

    def forward(self, z, t, label=None, *, until=None):
        flat, t, r = z.flatten(1), t[:, None], (t if until is None else until)[:, None]
        u = self.factor * self.mean(flat, t, r, label)
        return (flat - t * u if self.gives_x0 else u).reshape(z.shape)


class OfGaussian(AverageVelocity):
    """In closed form: along each axis the distance to the mean goes as the standard deviation of x0 + sigma n."""

    def mean(self, z, t, r, label):
        still = t == r
        r = torch.where(still, 0.5 * t, r)  # any other, whose result is not used
        end, start = ((VARIANCE * (1 - time) ** 2 + time**2).sqrt() for time in (r, t))
        moved = (1 - r) * MEAN + end / start * (z - (1 - t) * MEAN)
        rate = -MEAN + (t - (1 - t) * VARIANCE) / start**2 * (z - (1 - t) * MEAN)
        return torch.where(still, rate, (z - moved) / (t - r))


class OfMixture(AverageVelocity):
    """By the fourth-order Runge-Kutta method on dz/dt = (z - D) / t.

    Args:
        steps: Of the method.
        cfg_scale: Guidance of the field where there is a label, 1 for none.
    """

    num_classes = 3

    def __init__(self, steps=120, cfg_scale=1.0, **options):
        super().__init__(**options)
        self.steps, self.cfg_scale = steps, cfg_scale

    def velocity(self, z, t, label):
        variance = VARIANCES * (1 - t) ** 2 + t**2  # of z, within each component; shape (B, K)
        centred = z[:, None] - (1 - t)[:, :, None] * MEANS
        share = (SHARES.log() - centred.square().sum(2) / (2 * variance) - variance.log()).softmax(1)
        rates = ((t - (1 - t) * VARIANCES) / variance)[:, :, None] * centred - MEANS
        rate = (share[:, :, None] * rates).sum(1)
        if label is None:
            return rate
        chosen = rates[torch.arange(len(z)), label.clamp(max=2)]
        return torch.where((label < 3)[:, None], rate + self.cfg_scale * (chosen - rate), rate)

    def mean(self, z, t, r, label):
        if bool((t == r).all()):
            return self.velocity(z, t, label)
        total, step = 0.0, (r - t) / self.steps
        where = z
        for number in range(self.steps):
            time = t + number * step
            first = self.velocity(where, time, label)
            second = self.velocity(where + step / 2 * first, time + step / 2, label)
            third = self.velocity(where + step / 2 * second, time + step / 2, label)
            fourth = self.velocity(where + step * third, time + step, label)
            rate = (first + 2 * second + 2 * third + fourth) / 6
            where, total = where + step * rate, total + rate / self.steps
        return total


def on_the_path(exact, sigma, label=None):
    """Noisy images of the distribution, and (x0, n) there whose difference n - x0 is the velocity of the ODE."""
    generator = torch.Generator().manual_seed(7)
    x0, _ = exact.sample(len(sigma), generator)
    level = sigma.view(-1, 1, 1, 1)
    x = x0 + level * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    clean = exact(x, sigma) if label is None else exact(x, sigma, label)
    return x, clean, (x - clean) / level
