"""Density, coverage, MIND, extrapolated and Gaussian-kernel distances, and how much figures scatter."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel
from sklearn.neighbors import NearestNeighbors
from torch_fidelity.metric_prc import prc_features_to_metric

from diffusion_lit.diffusion.rng import keyed_generator
from diffusion_lit.evaluation import monge, neighbours
from diffusion_lit.evaluation.errors import standard_errors
from diffusion_lit.evaluation.extrapolation import POINTS, FrechetTo
from diffusion_lit.evaluation.features import Features, Pixels
from diffusion_lit.evaluation.kernels import gaussian_mmd, kernel_distance_variance
from diffusion_lit.evaluation.metrics import Reference, Statistics, compute_metrics, frechet_distance, summarise
from diffusion_lit.evaluation.monge import monge_distance
from diffusion_lit.evaluation.neighbours import neighbour_figures
from diffusion_lit.report.receipt_tables import shown


def normal(seed, *shape, shift=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + shift


def test_density_and_coverage_are_those_of_a_tree_of_neighbours(monkeypatch):
    monkeypatch.setattr(neighbours, "DISTANCES", 300)  # in several parts
    k = 5
    real, made = normal(0, 120, 6), torch.cat([normal(1, 50, 6, shift=0.5), normal(0, 120, 6)[:7]])
    radii = NearestNeighbors(n_neighbors=k + 1).fit(real).kneighbors(real)[0][:, -1]
    distances = np.linalg.norm(real.double().numpy()[:, None] - made.double().numpy()[None], axis=-1)
    inside = distances < radii[:, None] * (1 - 1e-9)  # a copy of the k-th neighbour lies on the edge, which is outside
    figures = neighbour_figures(made, real)
    assert figures["density"] == pytest.approx(inside.sum(0).mean() / k, abs=1e-6)
    assert figures["coverage"] == pytest.approx(inside.any(1).mean(), abs=1e-6)


def test_density_and_coverage_of_one_distribution_are_as_the_lemmas_say():
    """Naeem 2020, lemmas 1 and 2; and a generator of one mode has little coverage, whatever its density."""
    k, n, m = 5, 150, 100
    draws = [neighbour_figures(normal(2 * seed, m, 4), normal(2 * seed + 1, n, 4)) for seed in range(40)]
    density, coverage = (np.mean([draw[name] for draw in draws]) for name in ("density", "coverage"))
    expected = 1 - math.prod((n - i) / (m + n - i) for i in range(1, k + 1))
    assert density == pytest.approx(1, abs=0.05) and coverage == pytest.approx(expected, abs=0.02)
    real = torch.cat([normal(0, 75, 4), normal(1, 75, 4, shift=9.0)])
    figures = neighbour_figures(normal(2, 100, 4), real)
    assert figures["density"] > 0.8 and figures["coverage"] < 0.55


@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_few_images_have_the_figures_for_which_they_suffice(n):
    """Precision and recall look at 3 neighbours, density and coverage at 5."""
    real, made = normal(0, n, 2), normal(1, 40, 2)
    figures = compute_metrics(Pixels(), Features(made), Reference(Features(real)))
    near = {name.removesuffix("_pixels") for name in figures} & {"precision", "recall", "density", "coverage"}
    assert near == {*(("precision", "recall") if n > 3 else ()), *(("density", "coverage") if n > 5 else ())}
    if n > 3:
        expected = prc_features_to_metric(
            made.double(), real.double(), prc_neighborhood=3, prc_batch_size=10, save_cpu_ram=True, verbose=False
        )
        assert figures["precision_pixels"] == pytest.approx(expected["precision"], abs=1e-6)
        assert figures["recall_pixels"] == pytest.approx(expected["recall"], abs=1e-6)
    alone = neighbour_figures(made[:1], normal(0, 9, 2))
    assert alone.keys() == {"density", "coverage"}


@pytest.mark.parametrize(("n", "m"), [(40, 40), (12, 30), (30, 7), (1, 5)])
def test_mind_is_the_transport_along_random_directions(monkeypatch, n, m):
    """Direction by direction, and by scipy's solution of the assignment."""
    monkeypatch.setattr(monge, "HELD", 200)  # in several parts
    made, real = normal(0, n, 6, shift=0.3).double(), normal(1, m, 6).double()
    ways = torch.randn(50, 6, generator=keyed_generator("monge"), dtype=torch.float64).numpy()
    a, b = (part.numpy() for part in monge.equal_parts(made, real))
    assert len(a) == len(b) == min(n, m) and {*map(tuple, b)} <= {*map(tuple, real.numpy())}
    squares = []
    for way in ways / np.linalg.norm(ways, axis=1, keepdims=True):
        costs = (np.subtract.outer(a @ way, b @ way)) ** 2
        squares.append(costs[linear_sum_assignment(costs)].mean())
    assert monge_distance(made, real, 50) == pytest.approx(18 * np.mean(squares), abs=1e-6)


def test_mind_of_a_shift_and_of_a_scale_is_the_closed_form():
    """3 |mean|^2 and 3 (s - 1)^2 d, as the average over directions has it."""
    x = normal(0, 4000, 8).double()
    shift = torch.arange(8.0) / 8
    assert monge_distance(x + shift, x) == pytest.approx(3 * float(shift.square().sum()), rel=0.08)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    assert monge_distance(1.5 * x, x) == pytest.approx(3 * 0.25 * 8, rel=1e-3)
    assert monge_distance(x, x[torch.randperm(4000)]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("n", "m"), [(200, 300), (9, 300), (200, 9), (9, 8)])
def test_fast_frechet_distances_are_torch_fidelitys(n, m):
    made, real = normal(0, n, 12, shift=0.3) * torch.linspace(0.5, 2, 12), normal(1, m, 12)
    statistics = Statistics.of(real)
    expected = frechet_distance(Statistics.of(made), statistics)
    assert FrechetTo.of(real)(made) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert FrechetTo(statistics.mu, statistics.sigma)(made) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_the_extrapolated_distance_is_the_intercept_and_nearer_to_the_truth():
    d = 64
    exact = FrechetTo(np.zeros(d), np.eye(d))
    made = normal(0, 1000, d, shift=0.05)
    truth, biased, infinite = d * 0.05**2, exact(made), exact.infinity(made)
    assert abs(infinite - truth) < 0.3 * abs(biased - truth)
    generator = keyed_generator("extrapolation")
    sizes = np.array([1000 * (10 + 90 * i // (POINTS - 1)) // 100 for i in range(POINTS)])
    parts = [made[torch.randperm(1000, generator=generator)[:size]] for size in sizes]
    values = [frechet_distance(Statistics.of(part), Statistics(np.zeros(d), np.eye(d))) for part in parts]
    design = np.stack([np.ones(POINTS), 1 / sizes], 1)
    assert infinite == pytest.approx(np.linalg.lstsq(design, np.array(values), rcond=None)[0][0], abs=1e-6)


def test_the_gaussian_kernel_distance_is_scikit_learns():
    made, real = normal(0, 70, 5, shift=0.4).double(), normal(1, 90, 5).double()
    x, y = (one.numpy() / np.linalg.norm(one.numpy(), axis=1, keepdims=True) for one in (made, real))
    kernel = [rbf_kernel(a, b, gamma=1 / 200).mean() for a, b in ((x, x), (y, y), (x, y))]
    assert gaussian_mmd(made, real, 10.0) == pytest.approx(1000 * (kernel[0] + kernel[1] - 2 * kernel[2]), abs=1e-6)
    assert gaussian_mmd(made, made, 10.0) == pytest.approx(0, abs=1e-9)


def unbiased(x, y):
    """The kernel distance of whole sets, from scikit-learn's kernel."""
    d = x.shape[1]
    xx, yy, xy = (polynomial_kernel(a, b, 3, 1 / d, 1) for a, b in ((x, x), (y, y), (x, y)))
    n, m = len(x), len(y)
    return (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1)) - 2 * xy.mean()


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_the_known_variance_of_the_kernel_distance(shift):
    n, m, draws = 60, 90, 250
    pairs = [(normal(2 * i, n, 8, shift=shift), normal(2 * i + 1, m, 8)) for i in range(draws)]
    scatter = np.std([unbiased(x.numpy(), y.numpy()) for x, y in pairs], ddof=1)
    predicted = [kernel_distance_variance(x, y, 90, 100) for x, y in pairs[:40]]
    assert np.sqrt(np.mean(predicted)) == pytest.approx(scatter, rel=0.3)


def test_errors_are_the_scatter_over_draws_of_both_sides():
    """Figures of unlike distributions; those of nearest neighbours and of the Fréchet distance by subsampling."""
    extractor = Pixels()
    extractor.mmd_sigma = 10.0
    pairs = [
        (Features(normal(2 * i, 120, 6, shift=0.4)), Reference(Features(normal(2 * i + 1, 150, 6)))) for i in range(40)
    ]
    figures = [compute_metrics(extractor, made, real) for made, real in pairs]
    errors = [standard_errors(extractor, made, real) for made, real in pairs[:6]]
    assert (
        errors[0].keys()
        == figures[0].keys()
        == {
            *("fd_pixels", "fd_pixels_infinity", "kd_pixels", "precision_pixels", "recall_pixels"),
            *("density_pixels", "coverage_pixels", "mmd_pixels", "mind_pixels"),
        }
    )
    for name in errors[0]:
        scatter = np.std([one[name] for one in figures], ddof=1)
        assert 0.6 < np.mean([one[name] for one in errors]) / scatter < 1.7, name


def test_an_error_counts_the_reference_where_blocks_do_not():
    """Many samples against few real images: the blocks agree, and the figure is no better known for it."""
    real = Reference(Features(normal(1, 40, 6)))
    blocks = [Features(normal(seed, 400, 6)) for seed in range(2, 6)]
    figures = [compute_metrics(Pixels(), block, real) for block in blocks]
    summary = summarise(figures, standard_errors(Pixels(), blocks[0], real))
    distance = summary["kd_pixels"]
    assert distance["error"] > 2 * distance["std"]
    assert shown(distance, "kd_pixels").split(" (")[0].endswith(f"± {distance['error']:.2g}")
    assert standard_errors(Pixels(), blocks[0][:3], real) == {}
    alone = standard_errors(Pixels(), blocks[0], Reference(None, real.statistics))
    assert alone.keys() == {"fd_pixels", "fd_pixels_infinity"}
