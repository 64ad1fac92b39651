"""Networks that answer exactly for Gaussian data, in each prediction type's own words, for the tests of the samplers.

Each undoes what its paper does to the image and to the noise level, and gives the conditional expectation of what its
paper trains on. Nothing is taken from the package's coefficients, so that a wrong one there shows.
"""

import numpy as np
import torch

from diffusion_lit.diffusion.denoiser import Denoiser
from diffusion_lit.diffusion.noise import ContinuousVP, CosineSchedule, LinearSchedule, ScaledLinearSchedule
from diffusion_lit.diffusion.preconditioning import (
    EDMPreconditioning,
    EpsPreconditioning,
    FlowPreconditioning,
    VPreconditioning,
    X0Preconditioning,
)

SIGMA_DATA = 0.6


def linear_betas(T=1000):
    return np.linspace(1e-4, 0.02, T) * (1000 / T)


def scaled_linear_betas(T=1000):
    return np.linspace(0.00085**0.5, 0.012**0.5, T) ** 2 * (1000 / T)


def cosine_betas(T):
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


def sigmas_of(betas):
    alpha_bar = np.cumprod(1 - betas)
    return np.sqrt((1 - alpha_bar) / alpha_bar)


def vp_sigma(tau):
    return np.sqrt(np.expm1(0.5 * 19.9 * tau**2 + 0.1 * tau))


def of_steps(betas):
    """c_noise -> sigma for a chain: log sigma interpolated between whole steps."""
    log_sigmas = np.log(sigmas_of(betas))
    return lambda t: torch.from_numpy(np.exp(np.interp(t.numpy(), np.arange(len(log_sigmas)), log_sigmas)))


def of_continuous_vp(t):
    return torch.from_numpy(vp_sigma(1e-5 + (1 - 1e-5) * t.numpy() / 999))


def of_flow(t):
    return t / (1 - t)


def of_edm(c_noise):
    return (4 * c_noise).exp()


def vp_input(s):
    return 1 / (1 + s**2).sqrt()


def flow_input(s):
    return 1 / (1 + s)


def edm_input(s):
    return 1 / (SIGMA_DATA**2 + s**2).sqrt()


def eps_target(x, x0, s):
    return (x - x0) / s


def x0_target(x, x0, s):
    return x0


def v_target(x, x0, s):
    alpha, sigma = 1 / (1 + s**2).sqrt(), s / (1 + s**2).sqrt()
    return alpha * (x - x0) / s - sigma * x0


def velocity_target(x, x0, s):
    return (x - x0) / s - x0


def edm_target(x, x0, s):
    """Karras 2022, eq. 8: the effective target (x0 - c_skip x) / c_out, with table 1's c_skip and c_out."""
    total = SIGMA_DATA**2 + s**2
    return (x0 - SIGMA_DATA**2 / total * x) / (s * SIGMA_DATA / total.sqrt())


PREDICTIONS = {
    "eps, linear": (lambda: EpsPreconditioning(LinearSchedule(1000)), of_steps(linear_betas()), vp_input, eps_target),
    "eps, continuous VP": (lambda: EpsPreconditioning(ContinuousVP()), of_continuous_vp, vp_input, eps_target),
    "x0, linear": (lambda: X0Preconditioning(LinearSchedule(1000)), of_steps(linear_betas()), vp_input, x0_target),
    "x0, flow": (lambda: X0Preconditioning(), of_flow, flow_input, x0_target),
    "v, linear": (lambda: VPreconditioning(LinearSchedule(1000)), of_steps(linear_betas()), vp_input, v_target),
    "v, cosine": (lambda: VPreconditioning(CosineSchedule(300)), of_steps(cosine_betas(300)), vp_input, v_target),
    "v, scaled linear": (
        lambda: VPreconditioning(ScaledLinearSchedule(1000)),
        of_steps(scaled_linear_betas()),
        vp_input,
        v_target,
    ),
    "flow": (lambda: FlowPreconditioning(), of_flow, flow_input, velocity_target),
    "edm": (lambda: EDMPreconditioning(SIGMA_DATA), of_edm, edm_input, edm_target),
}


class ExactNet(torch.nn.Module):
    """The network of a prediction type that has learned a Gaussian of mean m and covariance Q diag(v) Q^T perfectly."""

    def __init__(self, level, scale_input, target, mean, variances, axes):
        super().__init__()
        self.level, self.scale_input, self.target = level, scale_input, target
        self.mean, self.variances, self.axes = mean, variances, axes

    def forward(self, x, noise, label=None):
        s = self.level(noise)[:, None]
        flat = x.flatten(1) / self.scale_input(s)
        along = (flat - self.mean) @ self.axes
        x0 = self.mean + (along * self.variances / (self.variances + s**2)) @ self.axes.T
        return self.target(flat, x0, s).reshape(x.shape)


def gaussian(size=3, seed=0):
    """Mean, variances and axes of a Gaussian in float64, far from isotropic."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(size, dtype=torch.float64, generator=generator) * 0.4
    variances = torch.tensor([0.01, 0.3, 1.1, 0.09], dtype=torch.float64)[:size]
    axes = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]
    return mean, variances, axes


def exact_denoiser(prediction, size=3):
    """The package's denoiser around the exact network of a prediction type."""
    scaling, level, scale_input, target = PREDICTIONS[prediction]
    return Denoiser(ExactNet(level, scale_input, target, *gaussian(size)), scaling())


class NetOf(torch.nn.Module):
    """The network of a prediction type whose denoiser is a given function of (x, s) with s of shape (B, 1, 1, 1)."""

    def __init__(self, prediction, denoise):
        super().__init__()
        _, self.level, self.scale_input, self.target = PREDICTIONS[prediction]
        self.denoise = denoise

    def forward(self, x, noise, label=None):
        s = self.level(noise.double())[:, None, None, None]
        noisy = x.double() / self.scale_input(s)
        return self.target(noisy, self.denoise(noisy, s), s).to(x.dtype)
