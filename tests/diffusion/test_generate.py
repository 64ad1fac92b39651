"""Sampling from end to end: seeds decide, settings are checked, the start has the right variance."""

import math

import pytest
import torch
from torch import nn

from diffusion_lit.diffusion import (
    Denoiser,
    EDMPreconditioning,
    EpsPreconditioning,
    FlowPreconditioning,
    LinearSchedule,
    Sampling,
)


class Net(nn.Module):
    """A tiny network that uses its noise level and its label, and counts its calls."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.num_classes = num_classes
        torch.manual_seed(0)
        self.mix = nn.Conv2d(1, 1, 3, padding=1)
        self.shift = nn.Embedding(num_classes + 1, 1)
        self.calls = 0

    def forward(self, x, noise, label=None):
        self.calls += 1
        label = torch.full((len(x),), self.num_classes) if label is None else label
        return self.mix(x) + self.shift(label)[:, :, None, None] + noise.reshape(-1, 1, 1, 1).sin() * 0.1


def model(scaling=None, num_classes=3):
    return Denoiser(Net(num_classes), scaling or EDMPreconditioning())


SETTINGS = [
    Sampling(sampler="heun", num_steps=5, sampler_options={"S_churn": 3.0}),
    Sampling(sampler="ddpm", num_steps=6),
    Sampling(sampler="ddim", num_steps=6, sampler_options={"eta": 0.7}),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s.sampler)
@pytest.mark.parametrize("scaling", [EDMPreconditioning(), EpsPreconditioning(LinearSchedule(100))], ids=["edm", "eps"])
def test_a_sample_is_a_function_of_its_seed_whatever_the_batch(settings, scaling):
    denoiser = model(scaling)
    labels = torch.arange(7) % 3
    together = settings.generate(denoiser, (1, 5, 5), range(7), labels)
    for size in (1, 2, 4):
        parts = [
            settings.generate(denoiser, (1, 5, 5), range(7)[start : start + size], labels[start : start + size])
            for start in range(0, 7, size)
        ]
        assert (torch.cat(parts) - together).abs().max() < 1e-5 * together.abs().max()
    other = settings.generate(denoiser, (1, 5, 5), range(100, 107), labels)
    assert (other - together).abs().max() > 0.1


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (EDMPreconditioning(), 80.0),
        (FlowPreconditioning(), 999.0),
        (
            EpsPreconditioning(LinearSchedule(1000)),
            math.sqrt(1 / math.prod(1 - (1e-4 + i * (0.02 - 1e-4) / 999) for i in range(1000))),
        ),
    ],
    ids=["edm", "flow", "ddpm"],
)
def test_the_start_has_the_variance_of_the_path(scaling, expected):
    start = []
    Sampling(sampler="euler", num_steps=1).generate(
        model(scaling), (1, 32, 32), range(20), callback=lambda step, x, x0_hat, sigma: start.append(x.clone())
    )
    assert start[0].std() == pytest.approx(expected, rel=0.02)


def test_guidance_scales_one_and_zero_are_the_branches_alone():
    denoiser = model()
    labels = torch.tensor([0, 1, 2])
    plain = Sampling(num_steps=3)
    conditional = plain.generate(denoiser, (1, 4, 4), range(3), labels)
    calls = denoiser.net.calls
    assert calls == plain.nfe
    unconditional = plain.replace(cfg_scale=0.0).generate(denoiser, (1, 4, 4), range(3), labels)
    assert torch.equal(unconditional, plain.generate(denoiser, (1, 4, 4), range(3)))
    guided = plain.replace(cfg_scale=3.0).generate(denoiser, (1, 4, 4), range(3), labels)
    assert not torch.allclose(guided, conditional)


def test_but_drops_the_options_of_another_sampler():
    churned = Sampling(sampler="heun", sampler_options={"S_churn": 3.0}, grid_options={"rho": 5.0})
    assert churned.replace(sampler="euler").sampler_options == {}
    assert churned.replace(sampler="euler").grid_options == {"rho": 5.0}
    assert churned.replace(num_steps=4).sampler_options == {"S_churn": 3.0}
    assert churned.replace(num_steps=None) == churned
    assert Sampling(**churned.record()) == churned


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "huen"}, "no sampler 'huen'; choose one of .*heun"),
        ({"grid": "karas"}, "no grid 'karas'; choose one of .*karras"),
        ({"clip_x0": "hard"}, "no clip_x0 'hard'"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_min 2.0 is not below sigma_max 1.0"),
        ({"sampler": "euler", "sampler_options": {"eta": 1.0}}, "no option 'eta'"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**change)


def test_labels_that_the_model_does_not_know_are_refused():
    with pytest.raises(ValueError, match="Label 3 is outside the model's classes 0 to 2"):
        Sampling(num_steps=1).generate(model(), (1, 4, 4), [0], torch.tensor([3]))
    with pytest.raises(ValueError, match="unconditional"):
        Sampling(num_steps=1).generate(model(num_classes=0), (1, 4, 4), [0], torch.tensor([0]))
    with pytest.raises(ValueError, match="2 samples need 2 labels"):
        Sampling(num_steps=1).generate(model(), (1, 4, 4), [0, 1], torch.tensor([0]))


def test_options_of_the_threshold_reach_it_and_unknown_ones_are_refused():
    sampling = Sampling(clip_x0="dynamic", clip_options={"percentile": 0.9, "ceiling": 1.5})
    clip = sampling.guide(torch.nn.Identity(), labelled=False)
    assert (clip.dynamic, clip.percentile, clip.ceiling) == (True, 0.9, 1.5)
    assert sampling.replace(clip_x0="static").clip_options == {}
    with pytest.raises(ValueError, match="threshold 'static' has no option 'ceiling'; it takes limit"):
        Sampling(clip_x0="static", clip_options={"ceiling": 2})


def test_a_grid_that_ends_above_0_gives_the_image_of_the_variance_preserving_path():
    scaling = EpsPreconditioning(LinearSchedule())
    sampling = Sampling("ddim", 10, "trailing", grid_options={"to_zero": False})
    x = torch.ones(1, 1, 2, 2)
    torch.testing.assert_close(sampling.finish(scaling, x), x * float(LinearSchedule().alpha_bar[0]) ** 0.5)
    assert torch.equal(Sampling("ddim", 10, "trailing").finish(scaling, x), x)
