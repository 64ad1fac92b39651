"""Guidance: the formulas, the cost in network forwards, the exact branches, classifiers against exact posteriors."""

import pytest
import torch
from helpers.tiny_net import TinyNet
from torch import nn

from diffusion_lit.diffusion import (
    Autoguidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    ClipX0,
    Denoiser,
    EDMPreconditioning,
    EpsPreconditioning,
    LearnedVarianceDenoiser,
    LinearSchedule,
)

LABEL = torch.tensor([0, 1, 2, 1, 0])
NULL = torch.full((5,), 3)
SIGMA = torch.tensor([0.1, 0.5, 1.0, 4.0, 30.0])


def noisy(dtype=torch.float32):
    return 2 * torch.randn(5, 2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def model(seed=0, num_classes=3):
    return Denoiser(TinyNet(num_classes=num_classes, seed=seed), EDMPreconditioning())


def branches(denoiser, x, sigma):
    """The conditional and the unconditional estimate, and the network's record emptied."""
    both = denoiser(x, sigma, LABEL), denoiser(x, sigma, NULL)
    denoiser.net.calls.clear()
    return both


def rows(values):
    return torch.as_tensor(values)[:, None, None, None]


@pytest.mark.parametrize("sigma", [torch.tensor(2.0), SIGMA], ids=["one sigma", "sigma per sample"])
def test_classifier_free_guidance_in_one_forward(sigma):
    denoiser, x = model(), noisy()
    cond, uncond = branches(denoiser, x, sigma)
    guided = ClassifierFreeGuidance(denoiser, 2.5)(x, sigma, LABEL)
    torch.testing.assert_close(guided, uncond + 2.5 * (cond - uncond))
    assert len(denoiser.net.calls) == 1 and denoiser.net.rows == 10


@pytest.mark.parametrize("scale", [1, 1.0, torch.tensor(1.0), torch.ones(5)])
def test_scale_one_is_the_conditional_model_bit_for_bit(scale):
    denoiser, x = model(), noisy()
    cond, _ = branches(denoiser, x, SIGMA)
    assert torch.equal(ClassifierFreeGuidance(denoiser, scale)(x, SIGMA, LABEL), cond)
    assert len(denoiser.net.calls) == 1 and denoiser.net.rows == 5


@pytest.mark.parametrize("scale", [0, 0.0, torch.tensor(0.0), torch.zeros(5)])
def test_scale_zero_is_the_unconditional_model_bit_for_bit(scale):
    denoiser, x = model(), noisy()
    _, uncond = branches(denoiser, x, SIGMA)
    assert torch.equal(ClassifierFreeGuidance(denoiser, scale)(x, SIGMA, LABEL), uncond)
    assert torch.equal(uncond, denoiser(x, SIGMA))
    assert [len(call["x"]) for call in denoiser.net.calls] == [5, 5]


def test_without_labels_it_is_the_plain_model():
    denoiser, x = model(), noisy()
    expected = denoiser(x, SIGMA)
    denoiser.net.calls.clear()
    assert torch.equal(ClassifierFreeGuidance(denoiser, 3.0)(x, SIGMA), expected)
    assert denoiser.net.rows == 5
    unconditional = model(num_classes=0)
    assert torch.equal(ClassifierFreeGuidance(unconditional)(x, SIGMA), unconditional(x, SIGMA))


def test_a_scale_for_each_sample_costs_only_the_branches_it_needs():
    denoiser, x = model(), noisy()
    cond, uncond = branches(denoiser, x, SIGMA)
    scale = torch.tensor([0.0, 1.0, 3.0, -1.0, 1.0])
    guided = ClassifierFreeGuidance(denoiser, scale)(x, SIGMA, LABEL)
    torch.testing.assert_close(guided, uncond + rows(scale) * (cond - uncond))
    assert len(denoiser.net.calls) == 1 and denoiser.net.rows == 4 + 3


def test_a_scale_for_each_class():
    denoiser, x = model(), noisy()
    cond, uncond = branches(denoiser, x, SIGMA)
    guided = ClassifierFreeGuidance(denoiser, torch.tensor([1.5, 2.0, 4.0]), per_class=True)(x, SIGMA, LABEL)
    torch.testing.assert_close(guided, uncond + rows([1.5, 2.0, 4.0, 2.0, 1.5]) * (cond - uncond))
    null = ClassifierFreeGuidance(denoiser, torch.tensor([1.5, 2.0, 4.0]), per_class=True)(x, SIGMA, NULL)
    torch.testing.assert_close(null, uncond)


@pytest.mark.parametrize("interval", [(2.0, 2.0), (50.0, 80.0), (0.0, 0.05)])
@pytest.mark.parametrize("sigma", [torch.tensor(2.0), SIGMA], ids=["one sigma", "sigma per sample"])
def test_an_interval_without_the_sigma_changes_nothing_and_costs_nothing(interval, sigma):
    denoiser, x = model(), noisy()
    cond, _ = branches(denoiser, x, sigma)
    assert torch.equal(ClassifierFreeGuidance(denoiser, 3.0, interval=interval)(x, sigma, LABEL), cond)
    assert denoiser.net.rows == 5


def test_an_interval_guides_above_its_low_end_and_up_to_its_high_end():
    denoiser, x = model(), noisy()
    cond, uncond = branches(denoiser, x, SIGMA)
    guided = ClassifierFreeGuidance(denoiser, 3.0, interval=(0.5, 4.0))(x, SIGMA, LABEL)
    inside = rows([False, False, True, True, False])
    torch.testing.assert_close(guided, torch.where(inside, uncond + 3 * (cond - uncond), cond))
    assert len(denoiser.net.calls) == 1 and denoiser.net.rows == 5 + 2
    # At scale 0 the outside is still conditional.
    none = ClassifierFreeGuidance(denoiser, 0.0, interval=(0.5, 4.0))(x, SIGMA, LABEL)
    torch.testing.assert_close(none, torch.where(inside, uncond, cond))


def test_a_whole_interval_is_no_interval():
    denoiser, x = model(), noisy()
    everywhere = ClassifierFreeGuidance(denoiser, 3.0)(x, SIGMA, LABEL)
    assert torch.equal(ClassifierFreeGuidance(denoiser, 3.0, interval=(0.0, 80.0))(x, SIGMA, LABEL), everywhere)


def test_rescale_moves_the_standard_deviation_to_the_conditional_one():
    denoiser, x = model(), noisy()
    cond, uncond = branches(denoiser, x, SIGMA)
    plain = uncond + 5 * (cond - uncond)
    spread = cond.flatten(1).std(1) / plain.flatten(1).std(1)
    full = ClassifierFreeGuidance(denoiser, 5.0, rescale=1.0)(x, SIGMA, LABEL)
    torch.testing.assert_close(full.flatten(1).std(1), cond.flatten(1).std(1))
    torch.testing.assert_close(full, plain * rows(spread))
    partly = ClassifierFreeGuidance(denoiser, 5.0, rescale=0.7)(x, SIGMA, LABEL)
    torch.testing.assert_close(partly, 0.7 * plain * rows(spread) + 0.3 * plain)
    # Where there is no guidance there is no rescaling.
    mixed = ClassifierFreeGuidance(denoiser, torch.tensor([5.0, 1, 0, 5, 1]), rescale=1.0)(x, SIGMA, LABEL)
    torch.testing.assert_close(mixed[[1, 4]], cond[[1, 4]])
    torch.testing.assert_close(mixed[2], uncond[2])
    torch.testing.assert_close(mixed[[0, 3]], full[[0, 3]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    denoiser = model().double() if dtype == torch.float64 else model()
    x, sigma = noisy(dtype), SIGMA.to(dtype)
    guided = ClassifierFreeGuidance(denoiser, torch.tensor([2.0, 1, 0, 3, 1]))(x, sigma, LABEL)
    assert guided.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    cond, uncond = branches(denoiser, x, sigma)
    torch.testing.assert_close(guided, uncond + rows([2.0, 1, 0, 3, 1]).to(guided) * (cond - uncond))


def test_the_variance_is_the_conditional_one():
    net = TinyNet(num_classes=3, out_channels=4)
    denoiser = LearnedVarianceDenoiser(net, EpsPreconditioning(LinearSchedule()))
    x = noisy()
    scale = torch.tensor([0.0, 1.0, 3.0, 2.0, 0.0])
    x0_hat, v = ClassifierFreeGuidance(denoiser, scale).learned_variance(x, SIGMA, SIGMA / 2, LABEL)
    assert len(net.calls) == 1
    _, cond = denoiser.learned_variance(x, SIGMA, SIGMA / 2, LABEL)
    _, uncond = denoiser.learned_variance(x, SIGMA, SIGMA / 2, NULL)
    torch.testing.assert_close(v, torch.where(rows(scale) == 0, uncond, cond))
    torch.testing.assert_close(x0_hat, ClassifierFreeGuidance(denoiser, scale)(x, SIGMA, LABEL))


def test_wrappers_stack():
    denoiser, x = model(), noisy()
    guided = ClassifierFreeGuidance(denoiser, 4.0)(x, SIGMA, LABEL)
    assert torch.equal(ClipX0(ClassifierFreeGuidance(denoiser, 4.0))(x, SIGMA, LABEL), guided.clamp(-1, 1))
    assert ClipX0(ClassifierFreeGuidance(denoiser, 4.0)).scaling is denoiser.scaling


def test_autoguidance_leads_away_from_the_worse_model():
    good, worse, x = model(0), model(1), noisy()
    for label in (LABEL, None):
        expected = worse(x, SIGMA, label) + 2.0 * (good(x, SIGMA, label) - worse(x, SIGMA, label))
        torch.testing.assert_close(Autoguidance(good, worse, 2.0)(x, SIGMA, label), expected)
    torch.testing.assert_close(Autoguidance(good, worse, 0.0)(x, SIGMA, LABEL), worse(x, SIGMA, LABEL))


def test_autoguidance_asks_the_guide_only_where_it_acts():
    good, worse, x = model(0), model(1), noisy()
    plain, guide = good(x, SIGMA, LABEL), worse(x, SIGMA, LABEL)
    worse.net.calls.clear()
    assert torch.equal(Autoguidance(good, worse, 1.0)(x, SIGMA, LABEL), plain)
    assert torch.equal(Autoguidance(good, worse, 3.0, interval=(2.0, 2.0))(x, SIGMA, LABEL), plain)
    assert not worse.net.calls
    guided = Autoguidance(good, worse, torch.tensor([3.0, 3, 1, 3, 3]), interval=(0.2, 10.0))(x, SIGMA, LABEL)
    inside = rows([False, True, False, True, False])
    torch.testing.assert_close(guided, torch.where(inside, guide + 3 * (plain - guide), plain))
    assert worse.net.rows == 2


def test_autoguidance_by_an_unconditional_guide_and_a_plain_function():
    good, worse, x = model(0), model(1, num_classes=0), noisy()
    plain = good(x, SIGMA, LABEL)
    expected = worse(x, SIGMA) + 2 * (plain - worse(x, SIGMA))
    torch.testing.assert_close(Autoguidance(good, worse, 2.0)(x, SIGMA, LABEL), expected)
    zero = Autoguidance(good, lambda x, sigma, label: torch.zeros_like(x), 2.0)(x, SIGMA, LABEL)
    torch.testing.assert_close(zero, 2 * plain)


def test_autoguidance_keeps_the_variance_of_the_good_model():
    denoiser = LearnedVarianceDenoiser(TinyNet(out_channels=4), EpsPreconditioning(LinearSchedule()))
    guided = Autoguidance(denoiser, model(1, num_classes=0), 2.0)
    x = noisy()
    x0_hat, v = guided.learned_variance(x, SIGMA, SIGMA / 2)
    torch.testing.assert_close(v, denoiser.learned_variance(x, SIGMA, SIGMA / 2)[1])
    torch.testing.assert_close(x0_hat, guided(x, SIGMA))


# Classifier guidance on two classes, each a Gaussian: everything is known.

MEANS, STDS, SHARES = torch.tensor([-0.8, 0.5]).double(), torch.tensor([0.3, 0.6]).double(), torch.tensor([0.3, 0.7])


def logits(x, sigma):
    """Logarithms of share * density of x for each class, all pixels of an image being of one class; shape (B, 2)."""
    std = (STDS**2 + sigma.reshape(-1, 1) ** 2).sqrt()
    density = torch.distributions.Normal(MEANS, std[..., None, :]).log_prob(x.flatten(1)[..., None])
    return density.sum(1) + SHARES.log()


def exact(x, sigma, label=None):
    """E[x0 | x], of one class or of the mixture."""
    sigma = sigma.reshape(-1, 1, 1, 1, 1)
    means = MEANS + STDS**2 / (STDS**2 + sigma**2) * (x[..., None] - MEANS)
    if label is not None:
        return means.gather(-1, label.reshape(-1, 1, 1, 1, 1).expand(*x.shape, 1))[..., 0]
    posterior = logits(x, sigma.flatten()).softmax(1)
    return (posterior[:, None, None, None] * means).sum(-1)


def test_a_perfect_noisy_classifier_makes_the_mixture_its_class():
    """The exact identity behind the method: at scale 1 the guided unconditional denoiser is the conditional one."""
    x, sigma = noisy(torch.float64) / 4, torch.tensor([0.2, 0.5, 1.0, 4.0, 30.0]).double()
    label = torch.tensor([0, 1, 1, 0, 1])
    guided = ClassifierGuidance(lambda x, sigma: exact(x, sigma), logits, noisy=True)
    torch.testing.assert_close(guided(x, sigma, label), exact(x, sigma, label))
    torch.testing.assert_close(guided(x, sigma[2], label), exact(x, sigma[2].expand(5), label))
    half = ClassifierGuidance(lambda x, sigma: exact(x, sigma), logits, scale=0.5, noisy=True)(x, sigma, label)
    torch.testing.assert_close(half, (exact(x, sigma) + exact(x, sigma, label)) / 2)


def test_a_classifier_of_clean_images_is_followed_through_the_denoiser():
    """With D(x) = a x and logits W x0 the gradient has a closed form."""
    x, sigma, label = noisy(torch.float64), torch.tensor([0.3, 0.5, 1.0, 2.0, 3.0]).double(), torch.arange(5) % 3
    weight = torch.randn(3, x[0].numel(), generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 10

    def share(sigma):
        return 0.25 / (0.25 + sigma.reshape(-1, 1, 1, 1) ** 2)

    def classifier(image):
        return image.flatten(1) @ weight.T

    guided = ClassifierGuidance(lambda x, sigma: share(sigma) * x, classifier, scale=2.0)(x, sigma, label)
    x0_hat = share(sigma) * x
    residual = nn.functional.one_hot(label, 3) - classifier(x0_hat).softmax(1)
    slope = share(sigma) * (residual @ weight).reshape(x.shape)
    torch.testing.assert_close(guided, x0_hat + 2 * rows(sigma) ** 2 * slope)


def test_classifier_guidance_acts_where_it_is_told_to():
    calls = []

    def classifier(image):
        calls.append(len(image))
        return image.flatten(1)[:, :3]

    denoiser, x = model(num_classes=0), noisy()
    plain = denoiser(x, SIGMA)
    assert torch.equal(ClassifierGuidance(denoiser, classifier, 0.0)(x, SIGMA, LABEL), plain)
    assert torch.equal(ClassifierGuidance(denoiser, classifier, 2.0, interval=(2.0, 2.0))(x, SIGMA, LABEL), plain)
    assert torch.equal(ClassifierGuidance(denoiser, classifier, 2.0)(x, SIGMA), plain)
    assert not calls
    whole = ClassifierGuidance(denoiser, classifier, 2.0)(x, SIGMA, LABEL)
    part = ClassifierGuidance(denoiser, classifier, 2.0, interval=(0.5, 4.0))(x, SIGMA, LABEL)
    inside = rows([False, False, True, True, False])
    torch.testing.assert_close(part, torch.where(inside, whole, plain))
    assert not torch.allclose(whole, plain)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_classifier_guidance_finds_its_gradient_in_every_mode(mode):
    denoiser = model()
    guided = ClassifierGuidance(denoiser, lambda image: image.flatten(1)[:, :3], 1.5)
    expected = guided(noisy(), SIGMA, LABEL)
    with mode():
        result = guided(noisy(), SIGMA.clone(), LABEL.clone())
    torch.testing.assert_close(result, expected)
    assert not result.requires_grad
    assert torch.equal(denoiser.net.calls[0]["label"], LABEL)  # a conditional denoiser is told the class too
    assert all(parameter.grad is None for parameter in denoiser.parameters())


def test_classifier_guidance_keeps_the_variance():
    denoiser = LearnedVarianceDenoiser(TinyNet(out_channels=4), EpsPreconditioning(LinearSchedule()))
    guided = ClassifierGuidance(denoiser, lambda image: image.flatten(1)[:, :3])
    x0_hat, v = guided.learned_variance(noisy(), SIGMA, SIGMA / 2, LABEL)
    torch.testing.assert_close(v, denoiser.learned_variance(noisy(), SIGMA, SIGMA / 2)[1])
    torch.testing.assert_close(x0_hat, guided(noisy(), SIGMA, LABEL))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ClassifierFreeGuidance(model(), 2.0, interval=(3.0, 1.0)), r"interval is \(3.0, 1.0\)"),
        (lambda: ClassifierFreeGuidance(model(), 2.0, interval=(-1.0, 1.0)), "0 <= low <= high"),
        (lambda: Autoguidance(model(), model(), interval=(3.0, 1.0)), "interval"),
        (lambda: ClassifierGuidance(model(), model(), interval=(3.0, 1.0)), "interval"),
        (lambda: ClassifierFreeGuidance(model(), 2.0, rescale=1.5), "rescale is 1.5"),
        (lambda: ClassifierFreeGuidance(model(num_classes=0), 2.0), "no classes to guide by"),
        (lambda: ClassifierFreeGuidance(model(), torch.ones(4), per_class=True), "needs 3 numbers"),
        (lambda: ClassifierFreeGuidance(model(), torch.ones(4))(noisy(), SIGMA, LABEL), r"shape \(4,\) for 5 images"),
        (lambda: Autoguidance(model(), model(1), torch.ones(4))(noisy(), SIGMA, LABEL), r"shape \(4,\) for 5 images"),
        (lambda: ClassifierFreeGuidance(model(), 2.0)(noisy(), SIGMA, LABEL + 9), "Label 9 is outside the classes"),
        (lambda: ClassifierFreeGuidance(model(num_classes=0))(noisy(), SIGMA, LABEL), "unconditional model"),
    ],
)
def test_bad_input_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
