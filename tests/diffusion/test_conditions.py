"""What an image-conditioned denoiser is given, how it is guided by it, and that editing gives it the same."""

import pytest
import torch
from helpers.tiny_net import TinyNet
from torch.nn.functional import avg_pool2d

from diffusion_lit.diffusion import (
    Blur,
    Box,
    DegradedImage,
    Denoiser,
    EDMPreconditioning,
    EpsPreconditioning,
    GivenImage,
    Grey,
    LearnedVarianceDenoiser,
    LinearSchedule,
    Mask,
    PairedImage,
    Pixelate,
    Sampling,
)
from diffusion_lit.diffusion import editing as E
from diffusion_lit.diffusion.conditions import ConditionDraws, join
from diffusion_lit.diffusion.models import PixelModel


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_images(count=4, channels=3, size=16, seed=1):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def draws(count=4, size=16):
    return ConditionDraws(torch.linspace(0, 0.999, count), draw(count, 1, size, size))


class GivenNet(TinyNet):
    """A tiny network that depends on its condition."""

    def __init__(self, channels=3, condition_channels=4, **options):
        super().__init__(channels, **options)
        self.condition_channels, self.in_channels, self.image_size = condition_channels, channels, 16

    def forward(self, x, noise, label=None, condition=None):
        out = super().forward(x, noise, label, **({} if condition is None else {"condition": condition}))
        told = torch.zeros(len(x), 1, 1, 1) if condition is None else condition.mean((1, 2, 3), keepdim=True)
        return out + torch.tanh(3 * told) * x


def test_a_degraded_image_stands_beside_what_is_known_of_it():
    images = make_images()
    for degradation in (Pixelate(2), Grey(5), Blur(4), Box(8), Mask(6)):
        condition = DegradedImage(degradation)
        assert condition.channels(3) == 4
        made = condition(images, None, draws())
        last = degradation.num_steps
        assert torch.equal(made[:, :3], degradation(images, last, draws().map))
        known = made[:, 3:]
        assert torch.equal(known, degradation.known(images, torch.full((4,), last), draws().map))
        if isinstance(degradation, Box | Mask):
            torch.testing.assert_close(made[:, :3], images * known)
            assert 0 < float(known.mean()) < 1
        else:
            assert torch.equal(known, torch.ones_like(known))


def test_each_image_draws_its_step_of_the_range():
    condition = DegradedImage(Pixelate(3), steps=(1, 3))
    images = make_images(3)
    made = condition(images, None, ConditionDraws(torch.tensor([0.0, 0.5, 0.99]), draw(3, 1, 16, 16)))
    for row, step in enumerate((1, 2, 3)):
        assert torch.equal(made[row, :3], Pixelate(3)(images, step, draws(3).map)[row])
    for steps, words in (((0, 4), "has 3; end there"), ((-1, 2), "steps is -1"), ((3, 1), "steps is 1")):
        with pytest.raises(ValueError, match=words):
            DegradedImage(Pixelate(3), steps=steps)
    with pytest.raises(ValueError, match="dropout is 1.5"):
        DegradedImage(Pixelate(3), dropout=1.5)


def test_a_box_is_a_rectangle_of_any_place_and_size():
    box, noise = Box(8, last=0.5), draw(2000, 1, 16, 16)
    hidden = 1 - box.known(torch.zeros(2000, 3, 16, 16), torch.full((2000,), 8), noise)[:, 0]
    rows, columns = hidden.amax(2), hidden.amax(1)
    assert torch.equal(hidden, rows[:, :, None] * columns[:, None, :]), "a rectangle"
    inside = [axis.sum(1)[(axis[:, 0] == 0) & (axis[:, -1] == 0)] for axis in (rows, columns)]
    for sides in inside:
        assert sides.min() >= 4 and sides.max() <= 14 and len(sides.unique()) > 3
        assert float(sides.mean()) == pytest.approx(8, abs=1)
    assert hidden.mean(0).min() > 0.05, "each pixel is hidden at times"
    with pytest.raises(ValueError, match="last is 3"):
        Box(last=3)
    with pytest.raises(ValueError, match="have 1 channel"):
        Grey()(make_images(channels=1), 1, draws().map)


def test_a_pair_is_given_as_it_is_and_must_be_there():
    condition, other = PairedImage(channels=2), make_images(4, 2)
    assert condition.channels(1) == 3
    assert torch.equal(condition(make_images(channels=1), other, draws()), join(other, torch.ones(1)))
    with pytest.raises(ValueError, match=r"use datamodules\.PairedFolder"):
        condition(make_images(), None, draws())
    for wrong in (make_images(4, 3), make_images(4, 2)[:, :, :, :8]):
        with pytest.raises(ValueError, match=r"pairs each image with one of shape .*make the condition's channels"):
            condition(make_images(channels=1), wrong, draws())


# Guidance


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, torch.tensor([0.0, 1.0, 2.5, -1.0])], ids=str)
def test_guidance_leads_from_the_null_condition_to_the_image(scale):
    net = GivenNet(num_classes=3)
    denoiser, x, label = Denoiser(net, EDMPreconditioning()), draw(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    condition, sigma = draw(4, 4, 16, 16, seed=2), torch.tensor([0.1, 0.5, 2.0, 9.0])
    conditional, unconditional = denoiser(x, sigma, label, condition=condition), denoiser(x, sigma, label)
    before = net.rows
    found = GivenImage(denoiser, condition, scale)(x, sigma, label)
    weights = torch.as_tensor(scale).expand(4)[:, None, None, None]
    torch.testing.assert_close(found, unconditional + weights * (conditional - unconditional))
    forwards = {0.0: 4, 1.0: 4, 3.0: 8}.get(scale, 6) if isinstance(scale, float) else 6
    assert net.rows - before == forwards, "only the branches that matter"


def test_guidance_by_an_image_stops_outside_its_interval_and_keeps_a_learned_variance():
    net = GivenNet(out_channels=6)
    denoiser = LearnedVarianceDenoiser(net, EpsPreconditioning(LinearSchedule()))
    x, condition = draw(2, 3, 16, 16), draw(2, 4, 16, 16, seed=2)
    net.forward = lambda x, noise, label=None, condition=None: torch.cat(
        [x * (0 if condition is None else condition.mean()), x], 1
    )
    plain = denoiser.learned_variance(x, 1.0, 0.5, condition=condition)
    guided = GivenImage(denoiser, condition, 4.0, interval=(2.0, 5.0)).learned_variance(x, 1.0, 0.5)
    assert all(torch.equal(one, other) for one, other in zip(plain, guided, strict=True))


def test_samples_depend_on_their_condition_and_on_nothing_else_of_the_batch():
    denoiser, sampling = Denoiser(GivenNet(), EDMPreconditioning()).eval(), Sampling(num_steps=3, cfg_scale=2.0)
    condition = draw(3, 4, 16, 16, seed=2)
    together = sampling.generate(denoiser, (3, 16, 16), [4, 5, 6], condition=condition)
    alone = [
        sampling.generate(denoiser, (3, 16, 16), [seed], condition=row[None])
        for seed, row in zip((4, 5, 6), condition, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    other = sampling.generate(denoiser, (3, 16, 16), [4, 5, 6], condition=condition.flip(0))
    assert (together[0] - other[0]).abs().max() > 1e-3


# Editing


class Given(PixelModel):
    """A model that is given an image."""

    def __init__(self, condition):
        super().__init__()
        self.denoiser, self.sampling = Denoiser(GivenNet(), EDMPreconditioning()).eval(), Sampling(num_steps=2)
        self.condition = condition


def test_editing_gives_a_model_what_training_gave_it():
    images, dice = make_images(2), draws(2)
    known = Box(8).known(images, torch.full((2,), 8), dice.map)
    for degradation, measurement in (
        (Pixelate(2), E.small_of(4)),
        (Grey(7), E.grey_of()),
        (Blur(1, 0.1, 0.1), E.blurred(1.6, 16, 16)),
        (Box(8), E.known_pixels(known)),
    ):
        condition = DegradedImage(degradation)
        found = measurement.condition_for(Given(condition), measurement.apply(images))
        torch.testing.assert_close(found, condition(images, None, dice), rtol=1e-5, atol=1e-5)
    for condition in (DegradedImage(Pixelate(1)), DegradedImage(Grey()), PairedImage()):
        assert E.small_of(4).condition_for(Given(condition), avg_pool2d(images, 4)) is None
    blur = DegradedImage(Blur(5, 0.05, 0.2), steps=(2, 5))
    assert blur.fits("deblur", 2.0, 16) and not blur.fits("deblur", 0.8, 16) and not blur.fits("inpaint", 2.0, 16)


def test_a_model_that_is_given_the_image_restores_by_it_and_keeps_what_is_known():
    model, images = Given(DegradedImage(Pixelate(2))), make_images(2)
    small = avg_pool2d(images, 4)
    made = E.super_resolve(model, small, resamplings=1)
    torch.testing.assert_close(avg_pool2d(made, 4), small, rtol=1e-4, atol=1e-4)
    calls = model.denoiser.net.calls
    expected = Pixelate(2)(images, 2, draws(2).map)
    assert calls and all(torch.allclose(call["condition"][:, :3], expected, atol=1e-5) for call in calls)
    calls.clear()
    E.colorize(model, E.to_grey(images))
    assert calls and all("condition" not in call for call in calls), "another measurement than it was trained on"
