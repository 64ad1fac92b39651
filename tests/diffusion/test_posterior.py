"""Posterior sampling against the exact posterior of Gaussian data, which linear algebra gives without any sampler."""

import pytest
import torch

from diffusion_lit.diffusion import GaussianDenoiser, heun
from diffusion_lit.diffusion.posterior import DPS, MMPS, PiGDM, conjugate_gradients

SIZE = 6
SIGMA_Y = 0.3


def matrix(rows, columns, seed):
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


MEAN = 0.4 * matrix(1, SIZE, 0)[0]
COVARIANCE = matrix(SIZE, SIZE, 1) @ matrix(SIZE, SIZE, 1).T / SIZE + 0.05 * torch.eye(SIZE, dtype=torch.float64)
A = matrix(3, SIZE, 2)
Y = torch.tensor([0.7, -0.4, 0.2], dtype=torch.float64)


def measure(x):
    return x.flatten(1) @ A.T


def images(rows):
    return rows.reshape(len(rows), 1, 2, SIZE // 2)


def gaussian(covariance):
    return GaussianDenoiser(images(MEAN[None])[0], covariance)


def exact(covariance, sigma=None, x=None, sigma_y=SIGMA_Y):
    """Mean and covariance of x0 given y = A x0 + sigma_y n, and x = x0 + sigma n where sigma is given."""
    precision, shift = torch.linalg.inv(covariance), torch.linalg.solve(covariance, MEAN)
    precision, shift = precision + A.T @ A / sigma_y**2, shift + A.T @ Y / sigma_y**2
    if sigma is not None:
        precision, shift = precision + torch.eye(SIZE).double() / sigma**2, shift + x / sigma**2
    posterior = torch.linalg.inv(precision)
    return shift @ posterior, posterior


def estimate(kind, covariance, sigma, x, sigma_y=SIGMA_Y, **options):
    wrapped = kind(gaussian(covariance), measure, Y.expand(len(x), -1), sigma_y, **options)
    return wrapped(images(x), sigma).flatten(1)


CLAIMS = {  # where each method claims to be exact
    "mmps": (MMPS, COVARIANCE, {"iterations": 3}),  # as many as there are measurements
    "pigdm": (PiGDM, 0.49 * torch.eye(SIZE, dtype=torch.float64), {"sigma_data": 0.7}),
}


@pytest.mark.parametrize("name", CLAIMS)
@pytest.mark.parametrize("sigma", [0.02, 0.3, 1.0, 20.0])
def test_the_estimate_is_the_exact_mean_given_image_and_measurement(name, sigma):
    kind, covariance, options = CLAIMS[name]
    x = MEAN + sigma * matrix(4, SIZE, 3)
    expected = exact(covariance, sigma, x)[0]
    torch.testing.assert_close(estimate(kind, covariance, sigma, x, **options), expected, rtol=1e-6, atol=1e-6)
    wrapped, inputs = kind(gaussian(covariance), measure, Y.expand(4, -1), SIGMA_Y, **options), images(x)
    with torch.inference_mode():  # as a sampler may run; and one level for each image
        found = wrapped(inputs.clone(), torch.full((4,), sigma, dtype=torch.float64)).flatten(1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CLAIMS)
def test_samples_have_the_exact_posterior_mean_and_covariance(name):
    kind, covariance, options = CLAIMS[name]
    # A sampler takes the start to the end by an affine map, which the corners of a simplex show.
    start = 80 * torch.cat([torch.zeros(1, SIZE), torch.eye(SIZE)]).double()
    denoise = kind(gaussian(covariance), measure, Y.expand(len(start), -1), SIGMA_Y, **options)
    sigmas = torch.cat([torch.logspace(torch.tensor(80.0).log10(), -3, 120).double(), torch.zeros(1).double()])
    end = heun(denoise, images(start), sigmas).flatten(1)
    mean, factor = end[0], end[1:] - end[0]
    expected_mean, expected = exact(covariance)
    torch.testing.assert_close(mean, expected_mean, rtol=0, atol=0.005)
    torch.testing.assert_close(factor.T @ factor, expected, rtol=0, atol=0.005 * float(expected.diagonal().max()))
    prior = heun(gaussian(covariance), images(start), sigmas).flatten(1)
    assert (prior[0] - expected_mean).abs().max() > 0.1, "the measurement says something"


def test_pigdm_is_not_exact_for_data_of_several_variances_and_mmps_is():
    x = MEAN + matrix(4, SIZE, 3)
    expected = exact(COVARIANCE, 1.0, x)[0]
    assert (estimate(PiGDM, COVARIANCE, 1.0, x) - expected).abs().max() > 0.05
    assert (estimate(MMPS, COVARIANCE, 1.0, x, iterations=3) - expected).abs().max() < 1e-6
    few = [(estimate(MMPS, COVARIANCE, 1.0, x, iterations=n) - expected).abs().max() for n in (1, 2, 3)]
    assert few[0] > few[1] > few[2]


@pytest.mark.parametrize("normalised", [False, True])
def test_dps_is_its_formula(normalised):
    sigma = 0.8
    x = MEAN + sigma * matrix(4, SIZE, 3)
    jacobian = COVARIANCE @ torch.linalg.inv(COVARIANCE + sigma**2 * torch.eye(SIZE).double())
    x0_hat = MEAN + (x - MEAN) @ jacobian.T
    residual = Y - x0_hat @ A.T
    variance = SIGMA_Y**2
    if normalised:
        variance = SIGMA_Y * residual.norm(dim=1, keepdim=True) / len(Y) ** 0.5
    expected = x0_hat + 0.5 * sigma**2 * (residual / variance) @ A @ jacobian
    found = estimate(DPS, COVARIANCE, sigma, x, scale=0.5, normalised=normalised)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_dps_is_exact_where_the_measurement_is_vaguer_than_the_image():
    x = MEAN + matrix(4, SIZE, 3)
    errors = []
    for sigma_y in (10.0, 100.0):
        expected = exact(COVARIANCE, 1.0, x, sigma_y)[0]
        moved = (expected - gaussian(COVARIANCE)(images(x), 1.0).flatten(1)).abs().max()
        found = estimate(DPS, COVARIANCE, 1.0, x, sigma_y, normalised=False)
        errors.append(float((found - expected).abs().max() / moved))
    assert errors[0] < 0.1 and errors[1] == pytest.approx(errors[0] / 100, rel=0.2), "its error goes as V / sigma_y^2"


@pytest.mark.parametrize("kind", [DPS, PiGDM, MMPS])
def test_each_sample_is_a_function_of_its_own_measurement(kind):
    x, levels = images(matrix(3, SIZE, 5)), torch.tensor([0.1, 1.0, 9.0], dtype=torch.float64)
    y = matrix(3, 3, 6)
    together = kind(gaussian(COVARIANCE), measure, y, SIGMA_Y)(x, levels)
    alone = [kind(gaussian(COVARIANCE), measure, y[i : i + 1], SIGMA_Y)(x[i : i + 1], levels[i]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-9, atol=1e-9)


def test_conjugate_gradients_solve_what_needs_other_iterations_and_stop_where_it_is_solved():
    full = matrix(5, 5, 7) @ matrix(5, 5, 7).T + torch.eye(5)
    matrices = torch.stack([2 * torch.eye(5).double(), full, torch.zeros(5, 5)])
    right = matrix(3, 5, 8)
    found = conjugate_gradients(lambda v: torch.einsum("bij,bj->bi", matrices, v), right, 40, 1e-12)
    torch.testing.assert_close(found[:2], torch.linalg.solve(matrices[:2], right[:2]), rtol=1e-8, atol=1e-8)
    assert torch.equal(found[2], torch.zeros(5).double()), "a matrix that is not positive is left alone"


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="sigma_y is 0"):
        MMPS(gaussian(COVARIANCE), measure, Y[None], 0.0)
    with pytest.raises(ValueError, match="iterations"):
        MMPS(gaussian(COVARIANCE), measure, Y[None], 0.1, iterations=0)
    with pytest.raises(ValueError, match="scale"):
        DPS(gaussian(COVARIANCE), measure, Y[None], 0.1, scale=-1)
    with pytest.raises(ValueError, match=r"shape \(1, 3\).*\(2, 3\)"):
        PiGDM(gaussian(COVARIANCE), measure, Y[None], 0.1)(images(matrix(2, SIZE, 1)), 1.0)
