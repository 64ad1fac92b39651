"""Exact denoisers against torch's own densities, by Tweedie's formula, and against each other."""

import pytest
import torch
from torch.distributions import MultivariateNormal

from diffusion_lit.diffusion.analytic import EmpiricalDenoiser, GaussianDenoiser, GaussianMixtureDenoiser

SHAPE = (2, 2)
SIGMAS = torch.tensor([0.02, 0.3, 1.0, 5.0, 80.0], dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def covariances():
    root = randn(3, 4, 4, seed=1) / 2
    return root @ root.mT


def mixture():
    return GaussianMixtureDenoiser(WEIGHTS, randn(3, *SHAPE), covariances())


def noisy(num=5, seed=2):
    return randn(num, *SHAPE, seed=seed) * (1 + SIGMAS[:num]).view(-1, 1, 1)


def torch_log_prob(x, sigma, components=(0, 1, 2)):
    """log density of x0 + sigma n by torch.distributions."""
    logs = []
    for k in components:
        total = covariances()[k] + sigma**2 * torch.eye(4)
        normal = MultivariateNormal(randn(3, *SHAPE).flatten(1)[k], total)
        share = WEIGHTS[k] / WEIGHTS[list(components)].sum()
        logs.append(normal.log_prob(x.flatten()) + share.log())
    return torch.stack(logs).logsumexp(0)


def test_the_density_is_that_of_torch():
    x, label = noisy(), torch.tensor([0, 1, 2, 3, 1])
    got, of_class = mixture().log_prob(x, SIGMAS), mixture().log_prob(x, SIGMAS, label)
    for i, sigma in enumerate(SIGMAS):
        torch.testing.assert_close(got[i], torch_log_prob(x[i], sigma))
        components = (0, 1, 2) if label[i] == 3 else (int(label[i]),)
        torch.testing.assert_close(of_class[i], torch_log_prob(x[i], sigma, components))


def test_the_denoiser_is_tweedies_formula():
    x = noisy().requires_grad_()
    log_prob = torch.stack([torch_log_prob(row, sigma) for row, sigma in zip(x, SIGMAS, strict=True)])
    (score,) = torch.autograd.grad(log_prob.sum(), x)
    torch.testing.assert_close(mixture()(x, SIGMAS), x + SIGMAS.view(-1, 1, 1) ** 2 * score, rtol=1e-8, atol=1e-8)


def test_a_label_is_a_component_and_the_null_label_any():
    x, denoiser = noisy(), mixture()
    for k in range(3):
        alone = GaussianDenoiser(randn(3, *SHAPE)[k], covariances()[k])
        torch.testing.assert_close(denoiser(x, SIGMAS, torch.full((5,), k)), alone(x, SIGMAS))
    torch.testing.assert_close(denoiser(x, SIGMAS, torch.full((5,), 3)), denoiser(x, SIGMAS))
    mixed = denoiser(x, SIGMAS, torch.tensor([0, 3, 2, 3, 1]))
    torch.testing.assert_close(mixed[1], denoiser(x, SIGMAS)[1])
    assert denoiser.num_classes == 3
    assert alone.num_classes == 0


def test_a_gaussian_is_the_linear_filter():
    x, mean, covariance = noisy(), randn(*SHAPE, seed=4), covariances()[0]
    for i, sigma in enumerate(SIGMAS):
        gain = covariance @ torch.linalg.inv(covariance + sigma**2 * torch.eye(4))
        expected = mean.flatten() + gain @ (x[i] - mean).flatten()
        torch.testing.assert_close(GaussianDenoiser(mean, covariance)(x, SIGMAS)[i].flatten(), expected)


def test_covariances_may_be_one_number_or_one_per_pixel():
    x, mean = noisy(), randn(*SHAPE, seed=4)
    pixels = torch.tensor([0.1, 0.2, 0.3, 0.0])
    torch.testing.assert_close(
        GaussianDenoiser(mean, pixels)(x, SIGMAS), GaussianDenoiser(mean, pixels.diag())(x, SIGMAS)
    )
    torch.testing.assert_close(
        GaussianDenoiser(mean, 0.3)(x, SIGMAS), GaussianDenoiser(mean, 0.3 * torch.eye(4))(x, SIGMAS)
    )


def test_samples_have_the_moments_of_the_mixture():
    n = 100_000
    images, label = mixture().sample(n, torch.Generator().manual_seed(0))
    assert images.shape == (n, *SHAPE)
    torch.testing.assert_close(label.bincount() / n, (WEIGHTS / 6).float(), atol=0.01, rtol=0)
    for k in range(3):
        part = images[label == k].flatten(1)
        torch.testing.assert_close(part.mean(0), randn(3, 4)[k], atol=0.03, rtol=0)
        torch.testing.assert_close(part.T.cov(), covariances()[k], atol=0.05, rtol=0.05)


def test_the_denoiser_is_the_best_estimate():
    """On samples no other estimate has a smaller squared error, and the error is orthogonal to functions of x."""
    x0, _ = mixture().sample(50_000, torch.Generator().manual_seed(0))
    x = x0 + 0.5 * randn(*x0.shape, seed=5)
    error = mixture()(x, 0.5) - x0
    for function in (torch.ones_like(x), x, x**2, torch.sin(3 * x)):
        product = error * function
        assert bool((product.mean(0).abs() < 5 * product.std(0) / len(x) ** 0.5).all())


def test_the_probability_flow_carries_the_density():
    """Its end points have the covariance of the end level, and its slope is (x - D) / sigma."""
    denoiser = GaussianDenoiser(randn(*SHAPE, seed=4), covariances()[0])
    x = noisy()
    ahead = denoiser.probability_flow(x, 1.0, 1.0 + 1e-6)
    torch.testing.assert_close((ahead - x) / 1e-6, x - denoiser(x, 1.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(denoiser.probability_flow(denoiser.probability_flow(x, 0.1, 7.0), 7.0, 0.1), x)


def test_the_empirical_denoiser_is_a_mixture_without_extent():
    images, labels = randn(6, *SHAPE), torch.tensor([0, 0, 1, 1, 2, 2])
    denoiser = EmpiricalDenoiser(images, labels)
    points = GaussianMixtureDenoiser(torch.ones(6), images, torch.zeros(6))
    torch.testing.assert_close(denoiser(noisy(), SIGMAS), points(noisy(), SIGMAS))
    assert denoiser.num_classes == 3
    by_class = denoiser(noisy(), SIGMAS, torch.tensor([0, 1, 2, 3, 1]))
    for i, members in enumerate([[0, 1], [2, 3], [4, 5], [0, 1, 2, 3, 4, 5], [2, 3]]):
        alone = EmpiricalDenoiser(images[members])(noisy(), SIGMAS)
        torch.testing.assert_close(by_class[i], alone[i])


def test_the_empirical_denoiser_finds_the_nearest_image_and_the_mean():
    images = randn(10, 3, 8, 8)
    denoiser = EmpiricalDenoiser(images)
    torch.testing.assert_close(denoiser(images + 0.01 * randn(10, 3, 8, 8, seed=1), 0.002), images)
    far = denoiser(images * 0, torch.full((10,), 1e5))
    torch.testing.assert_close(far, images.mean(0).expand_as(far), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sigma", [0.7, torch.tensor(0.7), torch.full((5,), 0.7)], ids=["float", "0-d", "per sample"])
def test_dtypes_and_shapes_of_sigma(dtype, sigma):
    for denoiser in (mixture(), GaussianDenoiser(randn(*SHAPE), 0.5), EmpiricalDenoiser(randn(6, *SHAPE))):
        got = denoiser(noisy().to(dtype), sigma)
        assert got.dtype == dtype
        assert got.shape == (5, *SHAPE)
        torch.testing.assert_close(got.double(), denoiser(noisy(), 0.7), rtol=0.05, atol=0.05)
        assert denoiser(noisy(1).to(dtype), sigma if torch.as_tensor(sigma).ndim == 0 else sigma[:1]).shape[0] == 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GaussianMixtureDenoiser(torch.ones(2), randn(3, 2), torch.ones(3)), "do not fit 3 means"),
        (lambda: GaussianMixtureDenoiser(-torch.ones(3), randn(3, 2), torch.ones(3)), "one number from 0 up for each"),
        (
            lambda: GaussianMixtureDenoiser(torch.ones(3), randn(3, 2), torch.ones(3, 4)),
            r"do not fit 3 means of 2 pixels",
        ),
        (lambda: GaussianDenoiser(randn(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]])), "not symmetric"),
        (lambda: GaussianDenoiser(randn(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]])), "negative variance"),
        (lambda: GaussianDenoiser(randn(2), -1.0), "negative variance"),
        (lambda: GaussianDenoiser(randn(2), 1.0)(randn(1, 2), 1.0, torch.zeros(1, dtype=torch.long)), "has no classes"),
        (lambda: mixture()(noisy(), 1.0, torch.full((5,), 4)), "outside 0 to 3"),
        (lambda: mixture()(noisy(), 1.0, torch.full((5,), -1)), "outside 0 to 3"),
        (lambda: EmpiricalDenoiser(randn(0, 2)), "holds no image"),
        (lambda: EmpiricalDenoiser(randn(3, 2), torch.tensor([0, 1])), "do not fit 3 images"),
        (lambda: EmpiricalDenoiser(randn(3, 2))(randn(1, 2), 1.0, torch.tensor([0])), "has no labels"),
        (
            lambda: EmpiricalDenoiser(randn(2, 2), torch.tensor([0, 2]))(randn(1, 2), 1.0, torch.tensor([1])),
            "has no image in the data set",
        ),
    ],
)
def test_bad_input_is_refused_in_a_sentence(build, message):
    with pytest.raises(ValueError, match=message):
        build()
