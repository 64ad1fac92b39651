"""Gradients are finite where a branch that was not chosen overflows: every t of every schedule and prediction."""

import math

import numpy as np
import pytest
import scipy.special
import torch
from torch import nn

from diffusion_lit.diffusion.degradations import Blur, Mask, Pixelate, Snow
from diffusion_lit.diffusion.denoiser import Denoiser, LearnedVarianceDenoiser
from diffusion_lit.diffusion.loss import (
    DenoisingLoss,
    HybridLoss,
    LearnedUncertainty,
    MinSNR,
    PredictionWeight,
    UnitWeight,
)
from diffusion_lit.diffusion.noise import (
    ContinuousVP,
    CosineSchedule,
    LinearSchedule,
    ScaledLinearSchedule,
    SigmoidSchedule,
)
from diffusion_lit.diffusion.normal import discretised_gaussian_nll, log_cdf, log_normal_mass
from diffusion_lit.diffusion.preconditioning import (
    EDMPreconditioning,
    EpsPreconditioning,
    FlowPreconditioning,
    VPreconditioning,
    X0Preconditioning,
)
from diffusion_lit.modules.reconstruction import DiscretisedGaussian, DiscretisedLogistic

SCHEDULES = [LinearSchedule, ScaledLinearSchedule, CosineSchedule, SigmoidSchedule, ContinuousVP]
PREDICTIONS = [EpsPreconditioning, VPreconditioning, X0Preconditioning]


class Outputs(nn.Module):
    """A network whose output is its parameter: the gradient of each row is the loss's alone."""

    def __init__(self, rows, channels, dtype, spread=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        output = spread * torch.randn(rows, channels, 2, 2, generator=generator, dtype=torch.float64)
        self.output = nn.Parameter(output.to(dtype))

    def forward(self, x, noise, label=None):
        return self.output + 0 * x.mean().to(self.output.dtype)


def make_images(rows):
    """Images and noise (rows, 1, 2, 2), the outermost of the 256 values among them."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(0, 256, (rows, 1, 2, 2), generator=generator) / 127.5 - 1
    x0[:, 0, 0, 0], x0[:, 0, 0, 1] = -1.0, 1.0
    return x0, torch.randn(rows, 1, 2, 2, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_steps", [50, 1000])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_hybrid_loss_has_finite_gradients_at_every_step(schedule, prediction, num_steps, dtype):
    """Against float64, in which each term is computed by itself at the steps that it belongs to."""
    table = schedule(num_steps=num_steps)
    x0, noise = make_images(num_steps)
    sigma = table.sigmas.float()
    net = Outputs(num_steps, 2, dtype)
    loss = HybridLoss(vlb_weight=1.0)(LearnedVarianceDenoiser(net, prediction(table)), x0, sigma, noise)
    loss.sum().backward()
    assert bool(loss.isfinite().all())
    gradient = net.output.grad.double()
    assert bool(gradient.isfinite().all())

    wide = net.output.detach().double()
    v = ((wide[:, 1:] + 1) / 2).requires_grad_()
    before = torch.cat([torch.zeros(1, dtype=torch.float64), table.sigmas[:-1]])
    beta, bar, bar_before = table.betas, 1 / (1 + table.sigmas**2), 1 / (1 + before**2)
    posterior = beta * (1 - bar_before) / (1 - bar)
    posterior[0] = posterior[1]
    c_skip, c_out, _, _ = (c[:, None, None, None] for c in prediction(table)(table.sigmas))
    x0, noise = x0.double(), noise.double()
    x0_hat = c_skip * (x0 + table.sigmas[:, None, None, None] * noise) + c_out * wide[:, :1]
    share = (bar_before.sqrt() * beta / (1 - bar))[:, None, None, None]
    beta, posterior = beta[:, None, None, None], posterior[:, None, None, None]
    log_variance = v * beta.log() + (1 - v) * posterior.log()
    model = torch.distributions.Normal(share * x0_hat, (log_variance / 2).exp())
    terms = torch.distributions.kl_divergence(torch.distributions.Normal(share * x0, posterior.sqrt()), model)[1:].sum()
    (terms / 4 * num_steps / math.log(2)).backward()
    expected = v.grad[1:] / 2  # the loss's v is (output + 1) / 2
    tolerance = {torch.float32: 2e-3, torch.bfloat16: 1e-2}[dtype]
    near = (gradient[1:, 1:] - expected).abs() <= tolerance * expected.abs() + 1e-3 * expected.abs().mean()
    assert near.double().mean() > 0.99  # a difference of x0_hat and x0 may cancel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [PredictionWeight, UnitWeight, MinSNR, LearnedUncertainty])
@pytest.mark.parametrize("prediction", [*PREDICTIONS, FlowPreconditioning, EDMPreconditioning])
def test_every_weight_has_finite_gradients_at_every_step(prediction, weight, dtype):
    for schedule in SCHEDULES:
        table = schedule()
        scaling = prediction(table) if prediction in PREDICTIONS else prediction()
        x0, noise = make_images(1000)
        net = Outputs(1000, 1, dtype)
        loss = DenoisingLoss(weight())(Denoiser(net, scaling), x0, table.sigmas.float(), noise)
        loss.sum().backward()
        assert bool(loss.isfinite().all())
        assert bool(net.output.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_probability_of_a_bin_and_its_gradient_are_finite_everywhere(dtype):
    """Bins from far thinner to far wider than the distribution, at its middle and 10^6 standard deviations away."""
    log_variance = torch.linspace(-30, 30, 61, dtype=dtype)[:, None]
    mean = torch.tensor([-1e6, -1e4, -30, -2, -1, 0, 0.3, 1, 5, 1e3, 1e6], dtype=dtype)
    for pixel in (-1.0, 0.0, 1.0):
        leaves = [t.clone().requires_grad_() for t in torch.broadcast_tensors(mean, log_variance)]
        nll = discretised_gaussian_nll(torch.full_like(leaves[0], pixel), *leaves)
        nll.sum().backward()
        assert bool(nll.isfinite().all())
        assert all(bool(leaf.grad.isfinite().all()) for leaf in leaves)


def test_the_logarithm_of_the_distribution_function_has_its_own_slope_far_in_the_tail():
    for dtype, rtol in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        u = torch.cat([-torch.logspace(6, -2, 40), torch.linspace(0, 5, 9)]).to(dtype).requires_grad_()
        value = log_cdf(u)
        value.sum().backward()
        points = u.detach().double().numpy()
        np.testing.assert_allclose(value.detach().double(), scipy.special.log_ndtr(points), rtol=rtol)
        slope = np.sqrt(2 / np.pi) / scipy.special.erfcx(-points / np.sqrt(2))
        np.testing.assert_allclose(u.grad.double(), slope, rtol=rtol)


def test_the_probability_of_a_thin_bin_in_float32_is_that_of_float64():
    half_width = torch.logspace(-7, 1, 60)[:, None]
    centre = torch.linspace(-50, 50, 41)
    exact = log_normal_mass(centre.double(), half_width.double())
    torch.testing.assert_close(log_normal_mass(centre, half_width).double(), exact, rtol=2e-5, atol=2e-5)
    thin = (0.5 * (-centre.double().square()) - 0.5 * math.log(2 * math.pi)) + (2 * half_width.double()).log()
    torch.testing.assert_close(exact[0], thin[0], rtol=1e-6, atol=1e-6)  # density times width


@pytest.mark.parametrize("kind", [DiscretisedGaussian, DiscretisedLogistic])
def test_likelihoods_of_images_have_finite_gradients(kind):
    x = torch.linspace(-1, 1, 256).expand(4, 1, 1, 256)
    for scale in (1e-6, 0.01, 1.0, 100.0, 1e6):
        for offset in (0.0, 1.0, 1e3):
            likelihood = kind(scale=scale)
            x_hat = (x.flip(-1) + offset).requires_grad_()
            likelihood(x_hat, x).sum().backward()
            assert bool(x_hat.grad.isfinite().all())
            assert bool(likelihood.log_scale.grad.isfinite().all())


@pytest.mark.parametrize("degradation", [Blur, Mask, Pixelate, Snow])
def test_degradations_have_finite_gradients_at_every_step(degradation):
    degrade = degradation(num_steps=3)
    x0 = make_images(4)[0].repeat(1, 1, 8, 8).requires_grad_()
    degrade(x0, torch.arange(4), torch.randn(4, 1, 16, 16)).square().sum().backward()
    assert bool(x0.grad.isfinite().all())
