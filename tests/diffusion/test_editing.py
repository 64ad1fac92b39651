"""Editing: every task against exact denoisers, with every sampler; views that are none; the projections."""

import numpy as np
import pytest
import torch
from helpers.tiny_net import TinyNet
from torch.nn.functional import avg_pool2d, interpolate
from torchvision.transforms.functional import gaussian_blur as torchvision_blur

from diffusion_lit.diffusion import (
    SAMPLERS,
    Conditioned,
    EDMPreconditioning,
    EmpiricalDenoiser,
    EpsPreconditioning,
    FlowPreconditioning,
    GaussianDenoiser,
    LearnedVarianceDenoiser,
    LinearSchedule,
    Sampling,
    SeededNoise,
)
from diffusion_lit.diffusion import editing as E
from diffusion_lit.diffusion.denoiser import Denoiser
from diffusion_lit.diffusion.models import LatentModel, PixelModel

ANY_DENOISER = [name for name in SAMPLERS if not SAMPLERS[name].takes_until]
DETERMINISTIC = [name for name in ANY_DENOISER if not SAMPLERS[name].stochastic]
LOOSE = {"rk45": {"rtol": 1e-2, "atol": 1e-2}}


def settings(name="heun", **changes):
    return Sampling(sampler=name, num_steps=8, sampler_options=LOOSE.get(name, {})).replace(**changes)


class Exact(PixelModel):
    """A pixel model around a denoiser that is exact at every level."""

    def __init__(self, denoiser, shape, sampling=None):
        super().__init__()
        self.denoiser, self.shape, self.sampling, self.condition = denoiser, shape, sampling or settings(), None
        if not hasattr(denoiser, "scaling"):
            denoiser.scaling = EDMPreconditioning()

    @property
    def x_shape(self):
        return self.shape


def make_images(count, channels=1, size=8, seed=0):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def tiny(num_classes=3, channels=1, size=8, sampling=None, scaling=None):
    denoiser = Denoiser(TinyNet(channels, num_classes), scaling or EDMPreconditioning()).eval()
    return Exact(denoiser, (channels, size, size), sampling)


class TwoLevels(TinyNet):
    """A network that is told where a step ends, for the sampler meanflow."""

    takes_until = True

    def forward(self, x, noise, label=None, until=None):
        return super().forward(x, noise + (0 if until is None else noise - until), label)


def tiny_for(name, channels):
    """A model that a sampler can draw from."""
    if name in ANY_DENOISER:
        return tiny(channels=channels)
    return Exact(Denoiser(TwoLevels(channels, 3), FlowPreconditioning()).eval(), (channels, 8, 8))


def memory(images, labels=None):
    """A model that knows these images alone, by class."""
    return Exact(EmpiricalDenoiser(images, labels), tuple(images.shape[1:]))


def psnr(a, b):
    return float(10 * torch.log10(4 / (a - b).square().mean()))


# Sampling along a part of the grid


@pytest.mark.parametrize(
    ("name", "options"),
    [("heun", {"S_churn": 4.0}), ("ddpm", {"noise_until": 3}), ("ddpm", {}), ("ddim", {"eta": 0.5}), ("euler", {})],
)
def test_a_run_in_two_parts_is_the_run_in_one(name, options):
    model = tiny()
    sampling = settings(name, sampler_options=options)
    denoise = sampling.wrap(model.denoiser, torch.tensor([0, 1]))
    sigmas = sampling.sigmas(model.denoiser.scaling)
    noise = SeededNoise([0, 1])
    x = sampling.start(model.denoiser.scaling, noise(torch.empty(2, 1, 8, 8)))
    for part in (sigmas[:5], sigmas[4:]):
        x = sampling.run(denoise, x, part, noise=noise)
    whole = sampling.generate(model.denoiser, (1, 8, 8), [0, 1], torch.tensor([0, 1]))
    assert torch.equal(x, whole)


# Noise and back


def test_the_strided_grid_is_every_thirtieth_of_a_thousand_steps():
    schedule = LinearSchedule(1000)
    scaling = EpsPreconditioning(schedule)
    sigmas = E.strided(Sampling(), scaling).sigmas(scaling)
    assert torch.allclose(sigmas[:-1], schedule.t_to_sigma(torch.arange(960, -1, -30).double()), rtol=1e-9)
    short = EpsPreconditioning(LinearSchedule(25))
    assert len(E.strided(Sampling(), short).sigmas(short)) == 26


def test_a_seed_is_one_noise_at_every_level():
    model, images = tiny(), make_images(3)
    n = SeededNoise([5, 6, 7])(images)
    for sigma in (0.0, 0.5, 20.0):
        assert torch.equal(E.forward(model, images, sigma, [5, 6, 7]), images + sigma * n)
    assert torch.equal(E.visible(model, images, 3.0), images / 10**0.5)


@pytest.mark.parametrize("name", ["heun", "ddim", "ddpm"])
def test_image_to_image_goes_from_the_input_to_any_image_of_the_class(name):
    images = make_images(6)
    model = memory(images, torch.tensor([0, 0, 0, 1, 1, 1]))
    sampling = E.strided(settings(name), model.denoiser.scaling)
    sigmas = sampling.sigmas(model.denoiser.scaling)
    given, want = images[:1], torch.tensor([0])
    assert E.start_level(sampling, model.denoiser.scaling, 4) == float(sigmas[4])
    kept = E.img2img(model, given, 30, labels=want, sampling=sampling)
    assert (kept - given).abs().max() < 1e-3  # from a level at which only one image is near
    moved = E.img2img(model, given, 1, labels=1 - want, sampling=sampling)
    distances = [(moved - image).abs().max() for image in images]
    assert min(distances[3:]) < 1e-2 < min(distances[:3])  # one of the other class


def test_image_to_image_is_forward_and_the_rest_of_the_grid():
    model, images = tiny(), make_images(2)
    sampling = settings("ddpm")
    sigmas = sampling.sigmas(model.denoiser.scaling)
    noise = SeededNoise([0, 1])
    x = images + float(sigmas[3]) * noise(images)
    by_hand = SAMPLERS["ddpm"].function(Conditioned(model.denoiser), x, sigmas[3:], noise=noise)
    assert torch.equal(E.img2img(model, images, 3, sampling=sampling), by_hand)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_inversion_is_the_exact_flow_and_comes_back(name):
    exact = GaussianDenoiser(0.3 * torch.ones(1, 8, 8), torch.linspace(0.02, 0.5, 64))
    model = Exact(exact, (1, 8, 8))
    adaptive = {"num_steps": 2, "sampler_options": {"rtol": 1e-4, "atol": 1e-4}} if name == "rk45" else {}
    sampling = settings(name, **({"num_steps": 60, "sigma_max": 20.0} | adaptive))
    images = 0.5 * make_images(2)
    x = E.invert(model, images, sampling=sampling)
    flow = exact.probability_flow(images, 0.002, 20.0)
    assert (x - flow).norm() < 0.05 * flow.norm()
    assert psnr(E.denoise(model, x, 20.0, sampling=sampling), images) > 30


def test_one_step_is_the_mean_of_what_could_be_behind_it():
    images = make_images(2)
    model = memory(images)
    x = images.mean(0, keepdim=True)
    assert torch.allclose(E.denoise_once(model, x, 50.0), x, atol=1e-3)
    assert psnr(E.denoise(model, images[:1], 0.1), images[:1]) > 60  # step by step it is one of them


@pytest.mark.parametrize("name", ["ddpm", "euler_ancestral", "dpmpp_2m_sde"])
def test_inversion_needs_a_sampler_without_noise(name):
    with pytest.raises(ValueError, match="deterministic"):
        E.invert(tiny(), make_images(1), sampling=settings(name))


# Series


def test_a_great_circle_keeps_lengths_and_its_ends():
    a, b = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    b = b * a.norm() / b.norm()
    shares = torch.tensor([0.0, 0.25, 0.5, 1.0])
    way = E.slerp(a, b, shares)
    assert torch.equal(way[0], a) and torch.equal(way[-1], b)
    assert torch.allclose(way.flatten(1).norm(dim=1), a.norm().expand(4))
    halfway = (a + b) / (a + b).norm() * a.norm()
    assert torch.allclose(way[2], halfway, atol=1e-6)
    assert torch.equal(E.slerp(a, a, shares), a.expand(4, -1, -1, -1))


@pytest.mark.parametrize("name", ["heun", "ddim", "ddpm"])
def test_an_interpolation_begins_and_ends_at_the_two_samples(name):
    model, sampling = tiny(), settings(name)
    labels = torch.full((5,), 2)
    way = E.interpolate(model, 3, 8, torch.linspace(0, 1, 5), labels=labels, sampling=sampling)
    ends = sampling.generate(model.denoiser, (1, 8, 8), [3, 8], labels[:2])
    assert torch.allclose(way[[0, -1]], ends, atol=1e-5)
    steps = (way[1:] - way[:-1]).flatten(1).norm(dim=1)
    assert steps.max() < 2 * (ends[1] - ends[0]).norm() / 2  # no step jumps most of the way


def test_a_sweep_of_guidance_is_the_samples_of_each_scale():
    model = tiny()
    drawn = E.guidance_sweep(model, torch.tensor([0, 2]), [1.0, 4.0], seeds=[5, 6])
    assert drawn.shape == (2, 2, 1, 8, 8)
    for column, scale in enumerate((1.0, 4.0)):
        alone = model.sampling.replace(cfg_scale=scale).generate(
            model.denoiser, (1, 8, 8), [5, 6], torch.tensor([0, 2])
        )
        assert torch.equal(drawn[:, column], alone)
    with pytest.raises(ValueError, match="unconditional"):
        E.guidance_sweep(tiny(num_classes=0), torch.tensor([0]))


# Views


@pytest.mark.parametrize("name", list(E.VIEWS))
def test_views_undo_themselves_bit_for_bit(name):
    view = E.make_view(name, (3, 8, 8))
    images = make_images(2, channels=3)
    assert torch.equal(view.inverse(view.apply(images)), images)
    assert torch.equal(view.apply(view.inverse(images)), images)
    assert torch.equal(view.apply(images).abs().flatten().sort().values, images.abs().flatten().sort().values)


def test_views_are_what_their_names_say():
    images = make_images(1, channels=3)
    array = images[0].permute(1, 2, 0).numpy()
    expected = {
        "identity": array,
        "flip_horizontal": np.fliplr(array),
        "flip_vertical": np.flipud(array),
        "rotate_90": np.rot90(array),
        "rotate_180": np.rot90(array, 2),
        "rotate_270": np.rot90(array, 3),
        "negative": -array,
    }
    for name, want in expected.items():
        made = E.make_view(name, (3, 8, 8)).apply(images)[0].permute(1, 2, 0).numpy()
        assert (made == want).all(), name
    jigsaw = E.make_view("jigsaw", (3, 8, 8)).apply(images)
    pieces = [p.sort().values for x in (images, jigsaw) for p in [x.unfold(2, 2, 2).unfold(3, 2, 2)]]
    before, after = (
        {tuple(piece.flatten().tolist()) for piece in p[0, 0].flatten(0, 1).flatten(1).sort().values} for p in pieces
    )
    assert before == after  # the same sixteen pieces
    assert not torch.equal(jigsaw, images)


def blurred(x):
    return E.gaussian_blur(x, 1.0)


@pytest.mark.parametrize(
    ("apply", "inverse", "why"),
    [
        (lambda x: 2 * x, lambda x: x / 2, "not orthogonal"),
        (lambda x: x + 0.1 * x.flip(-1), lambda x: (x - 0.1 * x.flip(-1)) / 0.99, "not orthogonal"),
        (blurred, lambda x: x, "not undone"),
        (lambda x: x + 1, lambda x: x - 1, "not linear"),
        (lambda x: x.sign() * x.abs().sqrt(), lambda x: x.sign() * x**2, "not linear"),
        (lambda x: x.rot90(1, (-2, -1)), lambda x: x.rot90(1, (-2, -1)), "not undone"),
        (lambda x: x[..., ::2], lambda x: x.repeat_interleave(2, -1), "turns images"),
        (lambda x: x.reshape(7, -1), lambda x: x, "cannot be applied"),
    ],
)
def test_what_is_no_view_is_refused(apply, inverse, why):
    with pytest.raises(ValueError, match=f"The view mine .*{why}"):
        E.ImageView("mine", apply, inverse, (1, 8, 8))


def test_views_of_ones_own_are_welcome():
    swap = E.ImageView("red for blue", lambda x: x.flip(1), lambda x: x.flip(1), (3, 8, 8))
    assert torch.equal(swap.apply(make_images(1, 3))[:, 0], make_images(1, 3)[:, 2])
    with pytest.raises(ValueError, match="not undone"):
        E.permutation("mine", torch.zeros(64, dtype=torch.int64), (1, 8, 8))
    with pytest.raises(ValueError, match="no view 'spin'; choose among identity"):
        E.make_view("spin", (1, 8, 8))
    with pytest.raises(ValueError, match="rotate_90 turns images"):
        E.make_view("rotate_90", (1, 8, 6))
    with pytest.raises(ValueError, match="4x4 pieces, which 10x10 is not"):
        E.make_view("jigsaw", (1, 10, 10))


# Anagrams and hybrids


def test_an_anagrams_noise_estimate_is_the_mean_over_its_views():
    denoiser = Denoiser(TinyNet(1, 3), EDMPreconditioning())
    views = [E.make_view(name, (1, 8, 8)) for name in ("identity", "rotate_90", "negative")]
    x, labels = 3 * make_images(2), torch.tensor([[0, 1, 2], [2, 3, 0]])
    for sigma in (torch.tensor(1.5), torch.tensor([0.3, 1.5])):
        eps = torch.stack(
            [
                view.inverse(
                    (view.apply(x) - denoiser(view.apply(x), sigma, labels[:, k])) / sigma.reshape(-1, 1, 1, 1)
                )
                for k, view in enumerate(views)
            ]
        ).mean(0)
        made = E.Anagram(denoiser, views)(x, sigma, labels)
        assert torch.allclose(made, x - sigma.reshape(-1, 1, 1, 1) * eps, atol=1e-5)


@pytest.mark.parametrize("name", ANY_DENOISER)
def test_every_sampler_finds_the_image_that_suits_both_views(name):
    images = make_images(3)
    other = E.make_view("rotate_180", (1, 8, 8)).apply(images[:1])
    model = memory(torch.cat([images[:2], other, images[2:]]), torch.tensor([0, 0, 1, 1]))
    views = [E.make_view("identity", (1, 8, 8)), E.make_view("rotate_180", (1, 8, 8))]
    # Only the first image is one of class 0 and, turned round, one of class 1.
    drawn = E.anagram(model, views, torch.tensor([[0, 1]] * 4), sampling=settings(name, num_steps=12))
    found = (drawn - images[0]).abs().flatten(1).amax(1) < 0.05
    assert found.any()
    hybrid = E.hybrid(
        memory(images[:2], torch.tensor([0, 1])), torch.tensor([[0, 1]]), blur_sigma=1.5, sampling=settings(name)
    )
    wanted = blur_by_torchvision(images[:1], 1.5, 13) + images[1:2] - blur_by_torchvision(images[1:2], 1.5, 13)
    assert torch.allclose(hybrid, wanted, atol=1e-3)


def blur_by_torchvision(images, sigma, size):
    return torchvision_blur(images, [size, size], [sigma, sigma])


@pytest.mark.parametrize(("sigma", "size"), [(0.7, 3), (1.5, 5), (2.0, 13)])
def test_the_blur_is_torchvisions(sigma, size):
    images = make_images(2, channels=3)
    made = E.gaussian_blur(images, sigma, size)
    assert torch.allclose(made, blur_by_torchvision(images, sigma, size), atol=1e-6)
    for bad in (0, 4, 17):
        with pytest.raises(ValueError, match="kernel_size"):
            E.gaussian_blur(images, sigma, bad)
    with pytest.raises(ValueError, match="above 0"):
        E.gaussian_blur(images, 0.0)


def test_a_learned_variance_is_averaged_without_signs():
    denoiser = LearnedVarianceDenoiser(TinyNet(1, 2, out_channels=2), EpsPreconditioning(LinearSchedule()))
    views = [E.make_view(name, (1, 8, 8)) for name in ("identity", "negative")]
    x, labels = make_images(1), torch.tensor([[0, 1]])
    v = E.Anagram(denoiser, views).learned_variance(x, 1.0, 0.5, labels)[1]
    each = [denoiser.learned_variance(sign * x, 1.0, 0.5, torch.tensor([k]))[1] for k, sign in enumerate((1, -1))]
    assert torch.allclose(v, (each[0].abs() + each[1].abs()) / 2)
    model = Exact(denoiser, (1, 8, 8), Sampling("ddpm", 4, "trailing", sampler_options={"variance": "learned"}))
    assert E.anagram(model, views, labels).isfinite().all()
    assert E.hybrid(model, labels).isfinite().all()


def test_an_anagram_of_a_model_without_classes():
    model = tiny(num_classes=0)
    views = [E.make_view(name, (1, 8, 8)) for name in ("identity", "flip_vertical")]
    drawn = E.anagram(model, views, None, seeds=[3, 4])
    assert drawn.shape == (2, 1, 8, 8)
    for labels in (torch.tensor([[0, 1, 2]]), torch.tensor([0, 1])):
        with pytest.raises(ValueError, match=r"need labels of shape"):
            E.anagram(tiny(), views, labels)
    with pytest.raises(ValueError, match="at least one view"):
        E.anagram(tiny(), [], torch.empty(1, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match="outside the model's classes"):
        E.anagram(tiny(), views, torch.tensor([[0, 9]]))
    with pytest.raises(ValueError, match="made for images"):
        E.anagram(tiny(), [E.make_view("identity", (3, 8, 8))], torch.tensor([[0]]))


# What is known of an image


def half_known(size=8):
    known = torch.zeros(1, 1, size, size)
    known[..., : size // 2] = 1
    return known


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_known_pixels_are_the_images_own_bit_for_bit(name):
    model, images, known = tiny_for(name, 3), make_images(2, channels=3), half_known()
    for resamplings in (1,) if name == "rk45" else (1, 2):
        options = {"labels": torch.tensor([0, 1]), "sampling": settings(name), "resamplings": resamplings, "jump": 3}
        made = E.inpaint(model, images, known, **options)
        assert torch.equal(made[..., :4], images[..., :4])
        assert not torch.equal(made[..., 4:], images[..., 4:])
        hidden = torch.where(known != 0, images, 0.7)
        assert torch.equal(E.inpaint(model, hidden, known, **options), made)  # what is under the mask has no say


@pytest.mark.parametrize("name", ["heun", "ddim", "ddpm"])
def test_the_known_region_is_at_the_noise_level_of_each_step(name):
    model, images, known = tiny(size=32), make_images(4, size=32), half_known(32)
    ratios, noises = [], []

    def watch(step, x, x0_hat, sigma):
        n = (x - images)[..., :16] / sigma
        ratios.append(float(n.std()))
        noises.append(n)

    E.inpaint(model, images, known, sampling=settings(name), callback=watch)
    assert len(ratios) == 8
    assert all(abs(ratio - 1) < 0.05 for ratio in ratios)
    renewed = float((noises[0] - noises[-1]).abs().max()) > 1
    assert renewed == (name == "ddpm")


def test_what_is_known_decides_the_rest_where_it_can():
    # All pixels are one random number, so that one of them tells the others.
    exact = GaussianDenoiser(torch.zeros(1, 4, 4), 0.25 * torch.ones(16, 16))
    model = Exact(exact, (1, 4, 4))
    images = torch.tensor([0.4, -0.8]).reshape(2, 1, 1, 1).expand(2, 1, 4, 4).contiguous()
    for name in ("heun", "ddim", "ddpm"):
        made = E.inpaint(model, images, half_known(4), sampling=settings(name, num_steps=40))
        assert (made - images).abs().max() < 0.06


def test_resampling_draws_from_the_conditional_distribution():
    correlation, y, count = 0.8, 1.0, 600
    covariance = 0.25 * torch.tensor([[1.0, correlation], [correlation, 1.0]])
    model = Exact(GaussianDenoiser(torch.zeros(1, 1, 2), covariance), (1, 1, 2))
    images, known = torch.full((count, 1, 1, 2), y), torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2)
    mean, std = correlation * y, 0.5 * (1 - correlation**2) ** 0.5
    sampling = settings("ddpm", num_steps=30, sigma_max=10.0)
    made = {r: E.inpaint(model, images, known, sampling=sampling, resamplings=r)[..., 1].flatten() for r in (1, 10)}
    assert abs(float(made[10].mean()) - mean) < 0.05
    assert abs(float(made[10].std()) - std) < 0.05
    assert abs(float(made[1].mean()) - mean) > 0.1  # without it the unknown pixel hears of the known one too late


def test_colours_have_the_grey_and_details_the_means_that_were_given():
    from PIL import Image

    images = make_images(2, channels=3)
    grey = E.to_grey(images)
    by_pil = Image.fromarray(((images[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).convert("L")
    assert abs(np.asarray(by_pil) - ((grey[0, 0] + 1) * 127.5).numpy()).max() < 1.01
    small = avg_pool2d(images, 4)
    for name in SAMPLERS:
        model = tiny_for(name, 3)
        options = {"labels": torch.tensor([0, 1]), "sampling": settings(name), "resamplings": 1 + (name == "heun")}
        coloured = E.colorize(model, grey, **options)
        scale = max(1, float(coloured.abs().max()))
        assert (E.to_grey(coloured) - grey).abs().max() < 1e-6 * scale
        assert (coloured[:, 0] - coloured[:, 1]).abs().max() > 0.01
        large = E.super_resolve(model, small, **options)
        assert (avg_pool2d(large, 4) - small).abs().max() < 1e-6 * max(1, float(large.abs().max()))
        assert (large - interpolate(small, scale_factor=4)).abs().max() > 0.01


def test_a_memory_completes_what_it_knows():
    grey = interpolate(make_images(5, size=2), size=(8, 8), mode="bilinear")
    images = grey + 0.1 * make_images(5, channels=3, seed=1)  # so that little of an image tells which it is
    model = memory(images)
    sampling = settings("ddpm", num_steps=20)
    known = half_known()
    assert psnr(E.inpaint(model, images, known, sampling=sampling, resamplings=5), images) > 40
    assert psnr(E.colorize(model, E.to_grey(images), sampling=sampling, resamplings=5), images) > 40
    assert psnr(E.super_resolve(model, avg_pool2d(images, 2), sampling=sampling, resamplings=5), images) > 40


def test_restoring_draws_noise_unless_told_otherwise():
    from diffusion_lit.diffusion.editing.restoration import revising

    assert revising(settings("heun")).sampler == "ddpm"
    assert revising(settings("heun", sampler_options={"S_churn": 5.0})).sampler == "heun"
    assert revising(settings("ddim", sampler_options={"eta": 1.0})).sampler == "ddim"
    assert revising(settings("dpmpp_2m_sde")).sampler == "dpmpp_2m_sde"


def test_masks_and_sizes_that_do_not_fit():
    model, images = tiny(), make_images(2)
    cases = [
        (torch.ones(1, 1, 8, 8), "nothing to fill in"),
        (torch.zeros(1, 1, 8, 8), "covers the whole image"),
        (torch.ones(1, 1, 6, 8), r"The mask has shape \(1, 1, 6, 8\)"),
        (torch.ones(8, 8), "The mask has shape"),
    ]
    for known, why in cases:
        with pytest.raises(ValueError, match=why):
            E.inpaint(model, images, known)
    with pytest.raises(ValueError, match="RGB"):
        E.colorize(model, images)
    with pytest.raises(ValueError, match="were given to a model of images"):
        E.colorize(tiny(channels=3), make_images(1, channels=3))
    for small in (make_images(1), make_images(1, size=3), make_images(1, channels=3, size=4), make_images(1, size=16)):
        with pytest.raises(ValueError, match="cannot become"):
            E.super_resolve(model, small)
    with pytest.raises(ValueError, match="resamplings is 0"):
        E.inpaint(model, images, half_known(), resamplings=0)
    with pytest.raises(ValueError, match="were given to a model of images"):
        E.forward(model, make_images(1, channels=3), 1.0)
    with pytest.raises(ValueError, match="sigma is -1"):
        E.forward(model, images, -1.0)
    with pytest.raises(ValueError, match="2 images need 2 seeds"):
        E.forward(model, images, 1.0, [0])
    with pytest.raises(ValueError, match="start 8 is no index"):
        E.img2img(model, images, 8, sampling=settings())
    with pytest.raises(ValueError, match="at least 2"):
        E.invert(model, images, sampling=settings(num_steps=1))


# Latents


class Latents(LatentModel, Exact):
    """Latents are means of 2x2 pixels; the encoder looks a pixel further, as real ones do."""

    image_shape = (1, 8, 8)

    def encode(self, images):
        return avg_pool2d(images, 4, 2, 1)

    def decode(self, x):
        return interpolate(x, scale_factor=2)


def latent_model():
    return Latents(Denoiser(TinyNet(1, 3), EDMPreconditioning(1.0)).eval(), (1, 4, 4))


@pytest.mark.parametrize("name", ["heun", "ddim", "ddpm"])
def test_tasks_on_latents(name):
    model, images, known = latent_model(), make_images(2), half_known()
    sampling = settings(name)
    made = E.inpaint(model, images, known, sampling=sampling)
    assert torch.equal(made[..., :4], images[..., :4])
    assert torch.equal(E.inpaint(model, torch.where(known != 0, images, -9.0), known, sampling=sampling), made)
    small = avg_pool2d(images, 4)
    large = E.super_resolve(model, small, sampling=sampling)
    assert (avg_pool2d(large, 4) - small).abs().max() < 1e-5
    assert E.img2img(model, images, 3, sampling=sampling).shape == images.shape
    assert E.forward(model, images, 2.0).shape == (2, 1, 4, 4)
    assert E.interpolate(model, 0, 1, torch.linspace(0, 1, 3), sampling=sampling).shape == (3, 1, 8, 8)


def test_what_latents_cannot_do_is_said():
    model, images = latent_model(), make_images(1)
    views = [E.make_view("identity", (1, 8, 8))]
    with pytest.raises(ValueError, match="An anagram needs a model of pixels"):
        E.anagram(model, views, torch.tensor([[0]]))
    with pytest.raises(ValueError, match="A hybrid needs a model of pixels"):
        E.hybrid(model, torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="bounds pixels"):
        E.img2img(model, images, 1, sampling=settings(clip_x0="static"))
    checker = torch.zeros(1, 1, 8, 8)
    checker[..., ::2, ::2] = 1
    with pytest.raises(ValueError, match="leaves no latent known"):
        E.inpaint(model, images, checker)
