"""Figures of reconstructions: exact where the reconstruction is known, and the floor where it is perfect."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers.evaluation_tools import Source

from diffusion_lit.evaluation.features import Pixels
from diffusion_lit.evaluation.measure import Evaluation, ReportedReference
from diffusion_lit.evaluation.metrics import Statistics, frechet_distance
from diffusion_lit.evaluation.reconstruction import measure_reconstructions
from diffusion_lit.evaluation.reference import reference_of
from diffusion_lit.report.reconstructions import difference, differences_image

PLAN = SimpleNamespace(num_samples=20, num_blocks=3)


def measured(reconstruct, monkeypatch, tmp_path, labels=False):
    monkeypatch.setenv("DIFFUSION_LIT_CACHE", str(tmp_path))
    data = Source(train=80, test=70, labels=labels)
    reference = reference_of(data, "train", Pixels())
    evaluation = Evaluation(PLAN, SimpleNamespace(reconstruct=reconstruct), data, Pixels(), torch.device("cpu"))
    return data, reference, *measure_reconstructions(evaluation, reference, "test")


def test_a_perfect_autoencoder_gets_the_floor(monkeypatch, tmp_path):
    _, _, entry, _ = measured(lambda x: x, monkeypatch, tmp_path)
    assert entry["reconstructions"] == entry["floor"] != entry["unrelated"]
    assert entry["floor"]["psnr"]["mean"] == pytest.approx(100) and entry["floor"]["ssim"]["mean"] == pytest.approx(1)
    assert (entry["count"], entry["blocks"]) == (20, 3)
    assert "perceptual_classifier" not in entry["floor"]  # no labels, no classifier


def test_a_known_error_gets_its_decibels_and_its_distance(monkeypatch, tmp_path):
    """Four grey levels of 255 everywhere: 20 log10(255 / 4) dB, and the Fréchet distance of the shifted images."""
    data, reference, entry, panel = measured(lambda x: x + 4 * 2 / 255, monkeypatch, tmp_path)
    assert entry["reconstructions"]["psnr"]["mean"] == pytest.approx(20 * math.log10(255 / 4), abs=1e-3)
    assert entry["reconstructions"]["psnr"]["std"] == pytest.approx(0, abs=1e-4)
    block = data.reference_images("test")[:60:3].flatten(1).float() + 4
    expected = frechet_distance(Statistics.of(block / 255), reference.statistics)
    assert entry["reconstructions"]["rfd_pixels"]["blocks"][0] == pytest.approx(expected, rel=1e-4)
    images, made = panel.unbind(1)
    torch.testing.assert_close(made - images, torch.full_like(images, 8 / 255), rtol=0, atol=1e-5)
    grey = difference(made, images)
    torch.testing.assert_close(grey, torch.full_like(grey, 12 / 255), rtol=0, atol=1e-5)
    assert torch.equal(difference(images, images), torch.zeros_like(images))
    image = differences_image(panel)
    assert image.width > image.height


def test_too_few_held_out_images_are_told(monkeypatch, tmp_path):
    from diffusion_lit.evaluation.reconstruction import add_reconstructions, reconstructs

    monkeypatch.setenv("DIFFUSION_LIT_CACHE", str(tmp_path))
    data, report = Source(train=80, test=5, labels=False), {"warnings": []}
    references = {"train": ReportedReference(reference_of(data, "train", Pixels()), {})}
    plan = SimpleNamespace(num_samples=20, num_blocks=3, reconstruction=None)
    evaluation = Evaluation(plan, None, data, Pixels(), torch.device("cpu"))
    assert add_reconstructions(report, evaluation, references) is None
    assert "5 images are held out" in report["warnings"][0] and "at least 6" in report["warnings"][0]
    plan.reconstruction = True
    with pytest.raises(ValueError, match="5 images are held out"):
        add_reconstructions(report, evaluation, references)
    with pytest.raises(ValueError, match="gives no images back"):
        reconstructs(plan, SimpleNamespace())
