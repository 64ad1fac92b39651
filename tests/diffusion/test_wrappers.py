"""Wrappers of a denoiser: bound labels, clipped estimates, and what they pass on."""

import pytest
import torch
from helpers.tiny_net import TinyNet

from diffusion_lit.diffusion import (
    Autoguidance,
    ClassifierFreeGuidance,
    ClipX0,
    Conditioned,
    Denoiser,
    DenoiserWrapper,
    EDMPreconditioning,
    EpsPreconditioning,
    FlowPreconditioning,
    LearnedVarianceDenoiser,
    LinearSchedule,
)

LABEL = torch.tensor([0, 1, 2])


def noisy(scale=3.0):
    return scale * torch.randn(3, 2, 6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, 2.0, 9.0])


def test_bound_labels_make_the_callable_that_samplers_take():
    denoiser = Denoiser(TinyNet(num_classes=3), EDMPreconditioning())
    x, sigma = noisy()
    bound = Conditioned(denoiser, LABEL)
    assert torch.equal(bound(x, sigma), denoiser(x, sigma, LABEL))
    assert torch.equal(Conditioned(denoiser)(x, sigma), denoiser(x, sigma))
    assert bound.scaling is denoiser.scaling and bound.num_classes == 3
    assert "label" not in bound.state_dict()
    with pytest.raises(ValueError, match="bound already"):
        bound(x, sigma, LABEL)


def test_any_callable_can_be_wrapped():
    def halve(x, sigma):
        return x / 2

    x, sigma = noisy()
    assert torch.equal(Conditioned(halve)(x, sigma), x / 2)
    assert torch.equal(ClipX0(halve)(x, sigma), (x / 2).clamp(-1, 1))
    assert Conditioned(halve).num_classes == 0


def test_static_threshold():
    x, sigma = noisy()
    clipped = ClipX0(lambda x, sigma: x, limit=2.0)(x, sigma)
    assert torch.equal(clipped, x.clamp(-2, 2))
    assert float(clipped.abs().max()) == 2 < float(x.abs().max())


def test_dynamic_threshold_is_each_sample_s_percentile():
    x, sigma = noisy()
    x = x * torch.tensor([0.05, 1.0, 4.0])[:, None, None, None]
    clipped = ClipX0(lambda x, sigma: x, dynamic=True, percentile=0.9)(x, sigma)
    for row, result in zip(x, clipped, strict=True):
        # 60 pixels: the percentile lies between the 54th and 55th of the magnitudes in order, at 0.9 * 59 = 53.1.
        ordered = row.abs().flatten().sort().values
        extent = max(float(ordered[53] + 0.1 * (ordered[54] - ordered[53])), 1.0)
        torch.testing.assert_close(result, row.clamp(-extent, extent) / extent)
    assert torch.equal(clipped[0], x[0])  # inside [-1, 1] nothing happens
    assert float(clipped.abs().max()) == pytest.approx(1)


@pytest.mark.parametrize("dynamic", [False, True])
def test_images_in_range_pass_unchanged(dynamic):
    x, sigma = noisy(0.1)
    assert torch.equal(ClipX0(lambda x, sigma: x, dynamic=dynamic)(x, sigma), x)


def test_the_variance_is_passed_on_through_all_wrappers():
    net = TinyNet(num_classes=3, out_channels=4)
    denoiser = LearnedVarianceDenoiser(net, EpsPreconditioning(LinearSchedule()))
    x, sigma = noisy()
    wrapped = Conditioned(ClipX0(ClassifierFreeGuidance(denoiser, 2.0)), LABEL)
    x0_hat, v = wrapped.learned_variance(x, sigma, sigma / 2)
    assert len(net.calls) == 1
    torch.testing.assert_close(x0_hat, wrapped(x, sigma))
    torch.testing.assert_close(v, denoiser.learned_variance(x, sigma, sigma / 2, LABEL)[1])
    assert float(x0_hat.abs().max()) <= 1


def test_a_wrapper_has_a_variance_only_where_the_denoiser_has():
    plain = Denoiser(TinyNet(num_classes=3), EpsPreconditioning(LinearSchedule()))
    for wrapped in (Conditioned(plain, LABEL), ClipX0(plain), ClassifierFreeGuidance(Conditioned(plain))):
        assert not hasattr(wrapped, "learned_variance")
    learned = LearnedVarianceDenoiser(TinyNet(out_channels=4), EpsPreconditioning(LinearSchedule()))
    assert hasattr(ClipX0(Conditioned(learned)), "learned_variance")


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"percentile is 1\.5"):
        ClipX0(torch.zeros_like, percentile=1.5)
    with pytest.raises(ValueError, match="limit is 0"):
        ClipX0(torch.zeros_like, limit=0)
    with pytest.raises(NotImplementedError):
        DenoiserWrapper(torch.zeros_like)(*noisy())


def test_a_dynamic_threshold_has_a_ceiling():
    x, sigma = noisy(9.0)
    clipped = ClipX0(lambda x, sigma: x, dynamic=True, ceiling=1.5)(x, sigma)
    torch.testing.assert_close(clipped, x.clamp(-1.5, 1.5) / 1.5)
    with pytest.raises(ValueError, match=r"ceiling is 0\.5"):
        ClipX0(torch.zeros_like, dynamic=True, ceiling=0.5)


def test_the_estimate_before_the_threshold_is_told_through_bound_labels():
    net = TinyNet(num_classes=3)
    guided = ClassifierFreeGuidance(Denoiser(net, EDMPreconditioning()), 4.0)
    x, sigma = noisy()
    clipped, free = Conditioned(ClipX0(guided), LABEL).unclipped(x, sigma)
    assert len(net.calls) == 1
    torch.testing.assert_close(free, guided(x, sigma, LABEL))
    assert torch.equal(clipped, free.clamp(-1, 1)) and float(free.abs().max()) > 1
    first, second = Conditioned(guided, LABEL).unclipped(x, sigma)
    assert torch.equal(first, second)


class Averaged(TinyNet):
    """A network that is told a second noise level and depends on it."""

    takes_until = True

    def forward(self, x, noise, label=None, *, until=None):
        return super().forward(x, noise, label) + torch.cos(3 * until)[:, None, None, None].to(x)


@pytest.mark.parametrize("each", [True, False])
def test_what_a_wrapper_does_to_estimates_it_does_to_the_map(each):
    """x_until = (until/sigma) x + (1 - until/sigma) D with D changed as the wrapper says, a level per sample or one."""
    denoiser = Denoiser(Averaged(num_classes=3), FlowPreconditioning()).double()
    x, sigma = noisy()
    x, sigma = x.double(), sigma.double()
    until = torch.tensor([0.0, 0.7, 8.5]).double() if each else torch.tensor(0.2).double()
    ratio = (until / sigma)[:, None, None, None]
    conditional, unconditional = (denoiser.average(x, sigma, until, label) for label in (LABEL, None))
    scale = torch.tensor([2.0, 1.0, 0.0])  # both branches, the first alone, the second alone
    guided = unconditional + scale[:, None, None, None] * (conditional - unconditional)
    for wrapped, x0_hat in (
        (Conditioned(denoiser, LABEL), conditional),
        (Conditioned(ClassifierFreeGuidance(denoiser, scale), LABEL), guided),
        (Conditioned(ClipX0(ClassifierFreeGuidance(denoiser, scale)), LABEL), guided.clamp(-1, 1)),
        (Conditioned(Autoguidance(denoiser, denoiser, 3.0), LABEL), conditional),
    ):
        assert wrapped.takes_until
        torch.testing.assert_close(wrapped(x, sigma, until=until), ratio * x + (1 - ratio) * x0_hat)
    assert not Conditioned(Denoiser(TinyNet(), FlowPreconditioning())).takes_until
