"""Distances of images; the likelihoods against their definition in double precision, and as distributions."""

import pytest
import torch

from diffusion_lit.modules import L1, L2, DiscretisedGaussian, DiscretisedLogistic

LEVELS = (torch.arange(256) / 127.5 - 1)[:, None, None, None]
CDF = {DiscretisedLogistic: torch.sigmoid, DiscretisedGaussian: lambda u: torch.special.ndtr(u)}
KINDS = list(CDF)


def test_sums_of_errors():
    x_hat, x = torch.tensor([[0.5, -1.0]]).reshape(1, 1, 1, 2), torch.tensor([[0.0, 1.0]]).reshape(1, 1, 1, 2)
    assert L1()(x_hat, x).tolist() == [2.5]
    assert L2()(x_hat, x).tolist() == [4.25]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.001, 0.05, 1.0])
@pytest.mark.parametrize("centre", [-1.3, 0.013, 0.9])
def test_the_256_levels_have_probability_one(kind, scale, centre):
    nll = kind(1, scale)(torch.full_like(LEVELS, centre), LEVELS)
    assert bool(torch.isfinite(nll).all())
    assert float((-nll.detach()).exp().sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_level_has_the_probability_of_its_bin(kind):
    scale, centre = 0.2, 0.1
    edges = (torch.arange(257).double() - 128) / 127.5  # halfway between levels
    below = CDF[kind]((edges - centre) / scale)
    below[0], below[-1] = 0, 1
    expected = -(below[1:] - below[:-1]).log()
    torch.testing.assert_close(
        kind(1, scale)(torch.full_like(LEVELS, centre), LEVELS).double(), expected, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.001, 0.3])
def test_gradients_stay_finite_where_probabilities_vanish(kind, scale):
    likelihood = kind(1, scale)
    x_hat = torch.full_like(LEVELS, 0.7).requires_grad_()
    likelihood(x_hat, LEVELS).sum().backward()
    assert bool(torch.isfinite(x_hat.grad).all())
    assert bool(torch.isfinite(likelihood.log_scale.grad).all())


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_that_is_learned_is_that_of_the_errors(kind):
    likelihood = kind(2, 0.5)
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.05, 0.2]).reshape(2, 1, 1)
    errors = torch.randn(64, 2, 16, 16, generator=generator)
    if kind is DiscretisedLogistic:
        errors = torch.logit(torch.rand(64, 2, 16, 16, generator=generator))
    x = (errors * spread * 127.5).round() / 127.5
    x = x.clamp(-0.99, 0.99)
    optimizer = torch.optim.Adam(likelihood.parameters(), 0.1)
    for _ in range(60):
        optimizer.zero_grad()
        likelihood(torch.zeros_like(x), x).mean().backward()
        optimizer.step()
    torch.testing.assert_close(likelihood.log_scale.exp().detach(), spread, rtol=0.06, atol=0)


def test_an_impossible_scale_is_named():
    with pytest.raises(ValueError, match="scale is 0"):
        DiscretisedGaussian(1, 0.0)
