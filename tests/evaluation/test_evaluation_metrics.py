"""Distances against closed forms, torch-fidelity's own command on PNG files, and torchmetrics."""

import math

import numpy as np
import pytest
import torch
import torch_fidelity
from helpers.evaluation_tools import Tiny, make_images, tiny_weights
from torch import nn
from torch_fidelity.metric_prc import prc_features_to_metric

from diffusion_lit.evaluation import neighbours
from diffusion_lit.evaluation.features import Features, Pixels
from diffusion_lit.evaluation.generation import save_pngs
from diffusion_lit.evaluation.metrics import (
    Reference,
    Statistics,
    compute_metrics,
    frechet_distance,
    inception_score,
    mean_and_deviation,
    too_few,
)
from diffusion_lit.evaluation.neighbours import neighbour_figures
from diffusion_lit.words import short_count
from experiments.benchmarks.parity import random_inception

NAMES = {
    "fid": "frechet_inception_distance",
    "kid": "kernel_inception_distance_mean",
    "precision": "precision",
    "recall": "recall",
    "isc": "inception_score_mean",
}


def gaussian(mu, sigma):
    return Statistics(np.asarray(mu, dtype=np.float64), np.asarray(sigma, dtype=np.float64))


def root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag(np.sqrt(values)) @ vectors.T


def test_frechet_distance_of_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    first, second = (rng.normal(size=(6, 6)) for _ in range(2))
    first, second = first @ first.T, second @ second.T
    mu = rng.normal(size=(2, 6))
    half = root(first)
    expected = np.sum((mu[0] - mu[1]) ** 2) + np.trace(first + second - 2 * root(half @ second @ half))
    assert frechet_distance(gaussian(mu[0], first), gaussian(mu[1], second)) == pytest.approx(expected, rel=1e-10)
    # two scalars: (m1 - m2)^2 + (s1 - s2)^2
    assert frechet_distance(gaussian([1.0], [[4.0]]), gaussian([3.0], [[25.0]])) == pytest.approx(4 + 9)


def test_statistics_of_samples_find_the_closed_form_in_float64():
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    draws = torch.randn(200_000, 3, generator=generator, dtype=torch.float64)
    made = Statistics.of((draws * scale + 1000).float())  # far from 0: float32 sums would lose the covariance
    assert made.mu.dtype == made.sigma.dtype == np.float64
    expected = 3 * 1.0 + float(((scale - 2) ** 2).sum())
    assert frechet_distance(made, gaussian([1001.0] * 3, np.eye(3) * 4)) == pytest.approx(expected, rel=0.02)


def test_statistics_refuse_what_gives_none():
    with pytest.raises(ValueError, match="at least 2 images"):
        Statistics.of(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="not finite"):
        Statistics.of(torch.tensor([[1.0], [float("nan")], [2.0]]))
    with pytest.raises(ValueError, match="same extractor"):
        frechet_distance(gaussian([0.0], [[1.0]]), gaussian([0.0] * 2, np.eye(2)))


def test_precision_is_of_the_generated_and_recall_of_the_reference():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(300, 2, generator=generator)
    narrow = reference[:100] * 0.01  # within the reference, covering little of it
    figures = neighbour_figures(narrow, reference)
    assert figures["precision"] == 1
    assert figures["recall"] < 0.2


@pytest.mark.parametrize(("count", "scale"), [(60, 0.5), (200, 1.0), (300, 1.5)])
def test_precision_and_recall_are_torch_fidelitys(count, scale):
    generator = torch.Generator().manual_seed(count)
    reference = torch.randn(250, 4, generator=generator)
    generated = torch.cat([torch.randn(count, 4, generator=generator) * scale, reference[:5]])  # copies lie in balls
    expected = prc_features_to_metric(
        generated.double(), reference.double(), prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=True, verbose=False
    )
    figures = neighbour_figures(generated, reference)
    assert {name: figures[name] for name in ("precision", "recall")} == pytest.approx(
        {name: expected[name] for name in ("precision", "recall")}, abs=1e-6
    )


def test_the_neighbours_of_a_reference_are_looked_for_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rows, blocks = torch.randn(300, 4, generator=generator), torch.randn(3, 50, 4, generator=generator)
    real = Reference(Features(rows))
    alone = [compute_metrics(Pixels(), Features(block), Reference(Features(rows))) for block in blocks]
    pairs, cdist = [], torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda *sides: pairs.append(tuple(map(len, sides))) or cdist(*sides))
    assert [compute_metrics(Pixels(), Features(block), real) for block in blocks] == alone
    assert pairs.count((300, 300)) == 1
    assert pairs.count((300, 50)) == 3  # all four figures from the same distances


def test_figures_of_neighbours_hold_few_distances_at_a_time(monkeypatch):
    """All distances of 55,000 reference images at once are 24 GB; in parts the figures are the same."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(700, 3, generator=generator)
    generated = torch.randn(40, 3, generator=generator) * 0.8
    whole = neighbour_figures(generated, reference)
    held, cdist = [], torch.cdist

    def watched(*sides):
        held.append(len(sides[0]) * len(sides[1]))
        return cdist(*sides)

    monkeypatch.setattr(neighbours, "DISTANCES", 5000)
    monkeypatch.setattr(torch, "cdist", watched)
    assert neighbour_figures(generated, reference) == pytest.approx(whole, abs=1e-6)
    assert len(held) > 100 and max(held) <= 5000


def test_inception_score_of_known_predictions():
    certain = torch.full((4000, 4), -1e3).scatter(1, (torch.arange(4000) % 4)[:, None], 1e3)
    assert inception_score(torch.zeros(40, 4)) == pytest.approx(1)
    assert inception_score(certain) == pytest.approx(4, rel=0.02)  # 4 were each split's classes quite even


@pytest.fixture
def weights(tmp_path):
    return tiny_weights(tmp_path / "tiny.pth")


def test_figures_are_those_of_torch_fidelity_on_the_same_png_files(tmp_path, weights):
    generated, real = make_images(70, seed=5)[0], (make_images(90, seed=6)[0] * 0.97).byte()
    for name, images in (("generated", generated), ("real", real)):
        save_pngs(images, range(len(images)), tmp_path / name)
    extractor = Tiny(str(weights))
    extractor.load()
    ours = compute_metrics(extractor, extractor.extract(generated, 32), Reference(extractor.extract(real, 64)))
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "generated"),
        input2=str(tmp_path / "real"),
        **{"fid": True, "kid": True, "prc": True, "isc": True, "cuda": False, "verbose": False, "save_cpu_ram": True},
        **{"feature_extractor": "tiny", "feature_extractor_weights_path": str(weights), "kid_subset_size": 70},
    )
    names = {"fid": "fd_tiny", "kid": "kd_tiny", "precision": "precision_tiny", "recall": "recall_tiny"}
    for short, name in {**names, "isc": "isc_tiny"}.items():
        assert ours[name] == pytest.approx(theirs[NAMES[short]], rel=1e-4), name
    assert 0 < ours["precision_tiny"] < 1
    assert 0 < ours["recall_tiny"] < 1


class Brightness(nn.Module):
    """A feature network that torchmetrics takes."""

    num_features = 6

    def forward(self, images):
        return images.float().div(255).unflatten(-1, (2, -1)).mean((-1, -3)).flatten(1)


def test_frechet_distance_is_that_of_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    generated, real = make_images(70, seed=5)[0], (make_images(90, seed=6)[0] * 0.97).byte()
    metric = FrechetInceptionDistance(feature=Brightness(), normalize=False, antialias=False)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    ours = frechet_distance(*(Statistics.of(Brightness()(images)) for images in (generated, real)))
    assert ours == pytest.approx(float(metric.compute()), rel=1e-4)


def test_figures_carry_the_name_of_the_extractor_and_only_what_there_is():
    images = make_images(20)[0]
    features = Pixels().extract(images)
    full = compute_metrics(Pixels(), features, Reference(features))
    others = {f"{name}_pixels" for name in ("precision", "recall", "density", "coverage", "mind")}
    assert set(full) == {"fd_pixels", "kd_pixels", *others}
    assert abs(full["fd_pixels"]) < 1e-4
    alone = Reference(None, Statistics.of(features.features))
    assert set(compute_metrics(Pixels(), features, alone)) == {"fd_pixels"}
    logits = Features(features.features, torch.zeros(20, 3))
    assert set(compute_metrics(Pixels(), logits, alone)) == {"fd_pixels", "isc_pixels"}
    with pytest.raises(ValueError, match="features or its statistics"):
        compute_metrics(Pixels(), features, Reference(None))


def test_small_numbers_are_told():
    assert too_few(65, 64) is None
    assert "rank 63" in too_few(64, 64)
    assert [short_count(count) for count in (360, 1000, 1500, 50_000, 2_000_000)] == ["360", "1k", "1500", "50k", "2m"]
    assert mean_and_deviation([1.0]) == (1.0, None)
    mean, deviation = mean_and_deviation([1.0, 2.0, 3.0])
    assert (mean, deviation) == (2.0, math.sqrt(1.0))


@pytest.mark.slow
def test_inception_parity_with_torch_fidelity_and_torchmetrics(tmp_path):
    """The real architecture with seeded random weights: 96 images through Inception, and its 2,048 features."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    from diffusion_lit.evaluation.fidelity import Inception

    path = random_inception(tmp_path / "inception.pth")
    generated, real = make_images(16, (3, 32, 32), seed=5)[0], (make_images(16, (3, 32, 32), seed=6)[0] * 0.97).byte()
    for name, images in (("generated", generated), ("real", real)):
        save_pngs(images, range(len(images)), tmp_path / name)
    extractor = Inception(str(path))
    extractor.load()
    ours = compute_metrics(extractor, extractor.extract(generated, 7), Reference(extractor.extract(real, 16)))
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "generated"),
        input2=str(tmp_path / "real"),
        **{"fid": True, "kid": True, "prc": True, "isc": True, "cuda": False, "verbose": False, "save_cpu_ram": True},
        **{"feature_extractor": "inception-v3-compat", "feature_extractor_weights_path": str(path)},
        **{"kid_subset_size": 16, "batch_size": 16},
    )
    names = {"fid": "fid_inception", "kid": "kid_inception", "precision": "precision_inception"}
    for short, name in {**names, "recall": "recall_inception", "isc": "isc_inception"}.items():
        assert ours[name] == pytest.approx(theirs[NAMES[short]], rel=1e-4), name
    metric = FrechetInceptionDistance(normalize=False, antialias=False, feature_extractor_weights_path=str(path))
    metric.update(real, real=True)
    metric.update(generated, real=False)
    assert ours["fid_inception"] == pytest.approx(float(metric.compute()), rel=1e-4)
