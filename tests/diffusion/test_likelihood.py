"""Likelihood by the probability-flow ODE against closed forms."""

import math

import pytest
import torch

from diffusion_lit.diffusion.analytic import GaussianDenoiser, GaussianMixtureDenoiser
from diffusion_lit.diffusion.likelihood import Likelihood, denoise_and_trace
from diffusion_lit.diffusion.rng import SeededNoise

BITS = 1e-3
SIZE = 6


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def full_gaussian():
    root = randn(SIZE, SIZE, seed=1) * 0.3
    return GaussianDenoiser(torch.zeros(1, 2, 3), root @ root.T + 0.02 * torch.eye(SIZE))


def diagonal_gaussian():
    return GaussianDenoiser(torch.zeros(1, 2, 3), torch.linspace(0.02, 1.0, SIZE))


def bits(nats):
    return nats / SIZE / math.log(2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_exact_trace_gives_the_density_of_a_gaussian(dtype):
    denoiser = full_gaussian()
    x = denoiser.sample(8, torch.Generator().manual_seed(0))[0].to(dtype)
    got = Likelihood(exact=True).log_prob(denoiser, x)
    assert got.dtype == dtype
    assert float(bits(got - denoiser.log_prob(x, 0.0)).abs().max()) < BITS


def test_hutchinsons_estimate_is_exact_where_the_jacobian_is_diagonal():
    denoiser = diagonal_gaussian()
    x = denoiser.sample(8, torch.Generator().manual_seed(0))[0]
    got = Likelihood().log_prob(denoiser, x)
    assert float(bits(got - denoiser.log_prob(x, 0.0)).abs().max()) < BITS


def test_hutchinsons_estimate_is_unbiased():
    denoiser = full_gaussian()
    x = denoiser.sample(1, torch.Generator().manual_seed(0))[0].expand(1000, -1, -1, -1)
    generator = torch.Generator().manual_seed(3)
    got = Likelihood(rtol=1e-4, atol=1e-4).log_prob(
        denoiser, x, noise=lambda x: torch.randn(x.shape, dtype=x.dtype, generator=generator)
    )
    error = float(got.std()) / len(got) ** 0.5
    assert float(got.std()) > 0.1
    assert abs(float(got.mean() - denoiser.log_prob(x[:1], 0.0)[0])) < 4 * error


def test_a_variance_preserving_prior():
    """On a short range the data's own variance counts at the end, and the prior has to hold it."""
    denoiser = GaussianDenoiser(torch.zeros(4), 1.0)
    x = denoiser.sample(4, torch.Generator().manual_seed(0))[0]
    expected = denoiser.log_prob(x, 0.002)
    vp = Likelihood(sigma_max=10.0, prior_std=math.sqrt(101), exact=True).log_prob(denoiser, x)
    assert float((vp - expected).abs().max()) < 1e-3
    ve = Likelihood(sigma_max=10.0, exact=True).log_prob(denoiser, x)
    assert float((ve - expected).abs().max()) > 1e-3


def test_a_mixture_whose_flow_is_not_linear():
    means = torch.tensor([[0.5, 0.3], [-0.6, 0.1], [0.1, -0.4]], dtype=torch.float64)
    means = means - torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64) @ means
    denoiser = GaussianMixtureDenoiser(torch.tensor([0.2, 0.3, 0.5]), means, torch.tensor([0.05, 0.02, 0.1]))
    x = denoiser.sample(16, torch.Generator().manual_seed(0))[0]
    got = Likelihood(sigma_max=200.0, exact=True).log_prob(denoiser, x)
    assert float((got - denoiser.log_prob(x, 0.0)).abs().max()) / 2 / math.log(2) < BITS


def test_bits_per_dim_of_a_gaussian_with_uniform_dequantisation():
    denoiser = full_gaussian()
    levels = torch.randint(60, 200, (5, 1, 2, 3), generator=torch.Generator().manual_seed(0))
    images = levels.double() / 127.5 - 1
    noise = randn(5, 1, 2, 3, seed=4)
    uniform = torch.distributions.Normal(0.0, 1.0).cdf(noise)
    continuous = (levels + uniform) / 128 - 1
    expected = -denoiser.log_prob(continuous, 0.0) / SIZE / math.log(2) + 7
    got = Likelihood(exact=True).bits_per_dim(denoiser, images, noise=lambda x: noise)
    torch.testing.assert_close(got, expected, rtol=0, atol=BITS)


def test_bits_per_dim_of_uniform_noise_is_eight():
    """A density that is flat over [-1, 1] codes each value in 8 bits; a wide Gaussian costs its excess."""
    std = 40.0
    denoiser = GaussianDenoiser(torch.zeros(SIZE), std**2)
    images = torch.randint(0, 256, (4, SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    got = Likelihood(sigma_max=20000.0).bits_per_dim(denoiser, images)
    excess = math.log2(math.sqrt(2 * math.pi) * std / 2)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.full((4,), 8 + excess), rtol=0, atol=0.002)


def test_an_image_does_not_depend_on_its_batch():
    denoiser = full_gaussian()
    images = torch.randint(0, 256, (4, 1, 2, 3), generator=torch.Generator().manual_seed(0)).double() / 127.5 - 1
    together = Likelihood().bits_per_dim(denoiser, images, noise=SeededNoise(range(4)))
    alone = Likelihood().bits_per_dim(denoiser, images[2:3], noise=SeededNoise([2]))
    torch.testing.assert_close(alone[0], together[2], rtol=1e-9, atol=1e-9)


def test_the_trace():
    matrix = randn(SIZE, SIZE)
    x, signs = randn(3, SIZE, seed=1), randn(3, SIZE, seed=2).sign()
    x0_hat, trace = denoise_and_trace(lambda x, sigma: x @ matrix.T, x, torch.tensor(1.0), None)
    torch.testing.assert_close(x0_hat, x @ matrix.T)
    torch.testing.assert_close(trace, matrix.trace().expand(3))
    _, estimate = denoise_and_trace(lambda x, sigma: x @ matrix.T, x, torch.tensor(1.0), signs)
    torch.testing.assert_close(estimate, torch.einsum("bi,ij,bj->b", signs, matrix, signs))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_works_where_evaluation_runs(mode, exact):
    net = torch.nn.Linear(SIZE, SIZE)

    def denoise(x, sigma):
        return torch.tanh(net(x / (1 + sigma[:, None])))

    x = randn(2, SIZE).float()
    with mode():
        got = Likelihood(exact=exact, rtol=1e-3, atol=1e-3).log_prob(denoise, x, noise=torch.ones_like)
    assert not got.requires_grad
    assert bool(got.isfinite().all())
    outside = Likelihood(exact=exact, rtol=1e-3, atol=1e-3).log_prob(denoise, x, noise=torch.ones_like)
    torch.testing.assert_close(got.clone(), outside)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: Likelihood(sigma_min=1.0, sigma_max=0.5), "give 0 < sigma_min < sigma_max"),
        (lambda: Likelihood(sigma_min=0.0), "give 0 < sigma_min < sigma_max"),
        (lambda: Likelihood(prior_std=0.0), "prior_std is 0.0; give a finite number above 0"),
        (lambda: Likelihood(rtol=0.0).log_prob(diagonal_gaussian(), randn(1, 1, 2, 3)), "rtol is 0.0; give"),
        (lambda: Likelihood().log_prob(diagonal_gaussian(), randn(1, 1, 2, 3).bfloat16()), "convert them first"),
        (lambda: Likelihood().bits_per_dim(diagonal_gaussian(), randn(1, 1, 2, 3)), "not 8-bit ones"),
        (
            lambda: Likelihood().log_prob(torch.no_grad()(diagonal_gaussian()), randn(1, 1, 2, 3)),
            "gives no gradient; call it without torch.no_grad",
        ),
    ],
)
def test_bad_input_is_refused_in_a_sentence(run, message):
    with pytest.raises(ValueError, match=message):
        run()
