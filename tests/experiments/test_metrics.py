"""The study of figures: right answers counted on features whose order is known."""

from types import SimpleNamespace

import torch

from diffusion_lit.evaluation.features import Features, Pixels
from diffusion_lit.evaluation.metrics import Reference
from experiments.metrics import needed, right_answers


def normal(seed, count, shift=0.0, scale=1.0):
    return Features(shift + scale * torch.randn(count, 4, generator=torch.Generator().manual_seed(seed)))


def test_figures_are_right_where_the_difference_is_theirs_and_even_where_there_is_none():
    evaluator = SimpleNamespace(extractor=Pixels(), reference=Reference(normal(0, 300)))
    features = {
        "better": normal(1, 150),
        "as good": normal(2, 150),
        "shifted": normal(3, 150, shift=2.0),
        "narrow": normal(4, 150, scale=0.3),  # precise, without variety
    }
    shares = right_answers(features, evaluator, [10, 100], 6)
    for name in ("fd_pixels", "kd_pixels", "precision_pixels", "density_pixels", "coverage_pixels"):
        assert shares[name]["shifted"][100] == 1, name
    assert shares["recall_pixels"]["narrow"][100] == 1 and shares["precision_pixels"]["narrow"][100] < 0.5
    assert 0 < shares["fd_pixels"]["as good"][100] < 1
    assert shares["fd_pixels_infinity"]["shifted"] == {10: 0.5, 100: 1.0}  # of ten samples there is none


def test_how_many_samples_are_needed():
    assert needed({50: 0.5, 100: 0.96, 200: 1.0}, [50, 100, 200]) == "100"
    assert needed({50: 1.0, 100: 0.9, 200: 1.0}, [50, 100, 200]) == "200"
    assert needed({50: 1.0, 100: 0.9}, [50, 100]) == "more than 100"
