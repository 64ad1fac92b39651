"""Parity with the schedulers of diffusers on the same network, noise and noise levels, in float32.

The largest difference of the final images, relative to their range, is at most 1e-4; a table of it is printed. Where it
is near 6e-5, what differs is 1 - alpha_bar of their first step, which they take from a float32 alpha_bar near 1.
Conventions that differ, and what is done about them:

- DDPM there adds noise to its last step, from t to clean images, unless t is 0. Under trailing spacing it is not, and
  with the variance beta that noise is not small. Here no step to level 0 adds noise; the pair is compared before it.
- DDIM there takes its previous step to be t - T / N, which is the next of its grid under leading and trailing spacing
  only; under linspace spacing its steps and its grid disagree, so that there is nothing to compare.
- DDIM there keeps with clip_sample the noise of the unclipped estimate, unless use_clipped_model_output is set. Here
  that is the default, so it is set; test_pretrained.py compares the other way.
- UniPC and DPM-Solver there take N of N + 1 evenly spaced steps under linspace spacing. They get trailing spacing.
- UniPC there gives nan with bh1 and a last level of 0. It gets final_sigmas_type "sigma_min", for which it takes lower
  orders in its last steps by default, and here it does not; so lower_order_final is off.
- Flow matching there starts its grid at t = 1, an infinite noise level here. It gets our t = sigma / (1 + sigma).
"""

import itertools

import pytest
import torch
from helpers.exact import PREDICTIONS, SIGMA_DATA, NetOf

from diffusion_lit.diffusion.denoiser import Denoiser
from diffusion_lit.diffusion.grids import GRIDS
from diffusion_lit.diffusion.samplers import SAMPLERS
from diffusion_lit.diffusion.wrappers import ClipX0

diffusers = pytest.importorskip("diffusers")

LIMIT = 1e-4
SHAPE = (2, 3, 8, 8)
NUM_STEPS = 20
KERNEL = torch.randn(3, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) / 4
BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
TYPES = {"epsilon": "eps, linear", "v_prediction": "v, linear", "sample": "x0, linear"}
SCHEDULERS = ("ddpm", "euler_ancestral_discrete", "edm_dpmsolver_multistep", "dpmsolver_multistep")


def smooth(x, s):
    """Like a denoiser: trusts x less at high noise, stays near [-1.3, 1.3], far from linear."""
    mixed = torch.nn.functional.conv2d(x, KERNEL, padding=1)
    return 1.2 * torch.tanh((x + mixed) / (1 + s * s) ** 0.5) + 0.1 * torch.cos(x / (1 + s))


@pytest.fixture(scope="module")
def table(request):
    rows = []
    yield rows
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n\nlargest difference from diffusers", diffusers.__version__, "relative to the image's range, float32")
        for name, settings, difference in rows:
            print(f"  {name:34} {settings:58} {difference:.1e}")


@pytest.fixture
def draws(monkeypatch):
    """One sequence of noise for both: `draws()` rewinds it for the package; schedulers find it in place of theirs."""
    start = torch.Generator().manual_seed(7)
    noise = torch.randn(NUM_STEPS + 1, *SHAPE, generator=start)

    def rewind():
        remaining = iter(noise[1:])
        for module in SCHEDULERS:
            path = f"diffusers.schedulers.scheduling_{module}.randn_tensor"
            monkeypatch.setattr(path, lambda *args, **kwargs: next(remaining))
        return lambda x: next(remaining)

    rewind.start = noise[0]
    return rewind


def model(prediction):
    scaling = PREDICTIONS[prediction][0]()
    return NetOf(prediction, smooth), scaling


def ours(name, denoiser, start, sigmas, noise, **options):
    return SAMPLERS[name].function(denoiser, start, sigmas, noise=noise, **options)


def peer(scheduler, net, sample, stop=None, learned=None, **options):
    """Runs a scheduler over its timesteps."""
    for t in scheduler.timesteps[:stop]:
        output = net(scheduler.scale_model_input(sample, t), t.expand(len(sample)).float())
        if learned is not None:
            output = torch.cat([output, learned(sample)], dim=1)
        sample = scheduler.step(output, t, sample, return_dict=False, **options)[0]
    return sample


def compare(table, name, settings, got, expected):
    assert got.dtype == torch.float32
    difference = float((got - expected).abs().max() / (expected.max() - expected.min()))
    table.append((name, settings, difference))
    assert difference <= LIMIT, f"{name}, {settings}: {difference:.1e}"


def vp_start(draws, sigmas):
    """x_T standard normal, as the package's x and as theirs."""
    return draws.start * float(torch.sqrt(1 + sigmas[0] ** 2)), draws.start


def check_levels(scheduler, sigmas):
    """The scheduler's noise levels are the package's."""
    torch.testing.assert_close(scheduler.sigmas.double(), sigmas, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clip", [False, True], ids=["plain", "clip_sample"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize("kind", TYPES)
def test_ddpm(table, draws, kind, variance, spacing, clip):
    net, scaling = model(TYPES[kind])
    scheduler = diffusers.DDPMScheduler(
        1000,
        **BETAS,
        prediction_type=kind,
        variance_type={"posterior": "fixed_small", "beta": "fixed_large"}[variance],
        clip_sample=clip,
        timestep_spacing=spacing,
    )
    scheduler.set_timesteps(NUM_STEPS)
    sigmas = GRIDS[spacing](NUM_STEPS, scaling)
    torch.testing.assert_close(scaling.schedule.sigma_to_t(sigmas[:-1]), scheduler.timesteps.double())
    x, x_T = vp_start(draws, sigmas)
    denoiser = Denoiser(net, scaling)
    stop = -1 if (variance, spacing) == ("beta", "trailing") else None
    sigmas = sigmas[:stop]
    got = ours("ddpm", ClipX0(denoiser) if clip else denoiser, x, sigmas, draws(), variance=variance)
    draws()
    expected = peer(scheduler, net, x_T, stop) * float(torch.sqrt(1 + sigmas[-1] ** 2))
    compare(table, "DDPM", f"{kind}, {variance}, {spacing}, clip_sample={clip}", got, expected)


def test_ddpm_with_a_learned_variance(table, draws):
    net, scaling = model("eps, linear")
    scheduler = diffusers.DDPMScheduler(
        1000, **BETAS, variance_type="learned_range", clip_sample=False, timestep_spacing="leading"
    )
    scheduler.set_timesteps(NUM_STEPS)
    sigmas = GRIDS["leading"](NUM_STEPS, scaling)
    denoiser = Denoiser(net, scaling)

    class Learned:
        def __call__(self, x, sigma):
            return denoiser(x, sigma)

        def learned_variance(self, x, sigma, sigma_next):
            x_t = x / torch.sqrt(1 + sigma**2)
            return denoiser(x, sigma), (torch.sin(3 * x_t) + 1) / 2

    x, x_T = vp_start(draws, sigmas)
    got = ours("ddpm", Learned(), x, sigmas, draws(), variance="learned")
    draws()
    expected = peer(scheduler, net, x_T, learned=lambda x_t: torch.sin(3 * x_t))
    compare(table, "DDPM", "epsilon, learned, leading, clip_sample=False", got, expected)


@pytest.mark.parametrize("clip", [False, True], ids=["plain", "clip_sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", TYPES)
def test_ddim(table, draws, kind, eta, spacing, clip):
    net, scaling = model(TYPES[kind])
    scheduler = diffusers.DDIMScheduler(
        1000, **BETAS, prediction_type=kind, clip_sample=clip, set_alpha_to_one=True, timestep_spacing=spacing
    )
    scheduler.set_timesteps(NUM_STEPS)
    sigmas = GRIDS[spacing](NUM_STEPS, scaling)
    x, x_T = vp_start(draws, sigmas)
    denoiser = Denoiser(net, scaling)
    got = ours("ddim", ClipX0(denoiser) if clip else denoiser, x, sigmas, draws(), eta=eta)
    noise = draws()
    expected = x_T
    for t in scheduler.timesteps:
        output = net(expected, t.expand(len(x_T)).float())
        extra = {"variance_noise": noise(x_T)} if eta and t != scheduler.timesteps[-1] else {}
        if eta and not extra:
            extra = {"variance_noise": torch.zeros_like(x_T)}
        expected = scheduler.step(
            output, t, expected, eta=eta, use_clipped_model_output=clip, return_dict=False, **extra
        )[0]
    compare(table, "DDIM", f"{kind}, eta {eta}, {spacing}, clip_sample={clip}", got, expected)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize(
    ("name", "cls", "kind"),
    [
        *(("euler", "EulerDiscreteScheduler", kind) for kind in TYPES),
        *(("euler_ancestral", "EulerAncestralDiscreteScheduler", kind) for kind in ("epsilon", "v_prediction")),
    ],
)
def test_euler(table, draws, name, cls, kind, spacing):
    net, scaling = model(TYPES[kind])
    scheduler = getattr(diffusers, cls)(1000, **BETAS, prediction_type=kind, timestep_spacing=spacing)
    scheduler.set_timesteps(NUM_STEPS)
    sigmas = GRIDS[spacing](NUM_STEPS, scaling)
    check_levels(scheduler, sigmas)
    x, _ = vp_start(draws, sigmas)
    got = ours(name, Denoiser(net, scaling), x, sigmas, draws())
    draws()
    compare(table, cls.removesuffix("Scheduler"), f"{kind}, {spacing}", got, peer(scheduler, net, x))


@pytest.mark.parametrize("karras", [False, True], ids=["trailing", "karras"])
@pytest.mark.parametrize("kind", TYPES)
def test_heun(table, draws, kind, karras):
    net, scaling = model(TYPES[kind])
    scheduler = diffusers.HeunDiscreteScheduler(
        1000, **BETAS, prediction_type=kind, timestep_spacing="trailing", use_karras_sigmas=karras
    )
    scheduler.set_timesteps(NUM_STEPS)
    levels = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]]).double()
    sigmas = GRIDS["trailing"](NUM_STEPS, scaling)
    if karras:
        low, high = sigmas[-2].item(), sigmas[0].item()
        sigmas = GRIDS["karras"](NUM_STEPS, scaling, sigma_min=low, sigma_max=high)
    torch.testing.assert_close(levels, sigmas, rtol=1e-4, atol=1e-6)
    x, _ = vp_start(draws, sigmas)
    got = ours("heun", Denoiser(net, scaling), x, sigmas, draws())
    settings = f"{kind}, {'karras' if karras else 'trailing'}"
    compare(table, "HeunDiscrete", settings, got, peer(scheduler, net, x))


@pytest.mark.parametrize("grid", ["karras", "exponential"])
@pytest.mark.parametrize(
    ("name", "cls", "options"),
    [
        ("euler", "EDMEulerScheduler", {}),
        ("dpmpp_2m", "EDMDPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
        ("dpmpp_2m_sde", "EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_edm(table, draws, name, cls, options, grid):
    net, scaling = model("edm")
    scheduler = getattr(diffusers, cls)(0.002, 80.0, SIGMA_DATA, sigma_schedule=grid, **options)
    scheduler.set_timesteps(NUM_STEPS)
    sigmas = GRIDS[grid](NUM_STEPS, scaling)
    check_levels(scheduler, sigmas)
    x = draws.start * 80
    got = ours(name, Denoiser(net, scaling), x, sigmas, draws())
    draws()
    compare(table, cls.removesuffix("Scheduler"), f"{name}, {grid}", got, peer(scheduler, net, x))


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_sde"])
@pytest.mark.parametrize("kind", TYPES)
def test_dpm_solver(table, draws, kind, name):
    net, scaling = model(TYPES[kind])
    scheduler = diffusers.DPMSolverMultistepScheduler(
        1000,
        **BETAS,
        prediction_type=kind,
        algorithm_type="dpmsolver++" if name == "dpmpp_2m" else "sde-dpmsolver++",
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(NUM_STEPS)
    sigmas = GRIDS["trailing"](NUM_STEPS, scaling)
    check_levels(scheduler, sigmas)
    x, x_T = vp_start(draws, sigmas)
    got = ours(name, Denoiser(net, scaling), x, sigmas, draws())
    draws()
    compare(table, "DPMSolverMultistep", f"{name}, {kind}, trailing", got, peer(scheduler, net, x_T))


@pytest.mark.parametrize(("order", "variant"), list(itertools.product([1, 2, 3], ["bh1", "bh2"])))
@pytest.mark.parametrize("kind", TYPES)
def test_unipc(table, draws, kind, order, variant):
    net, scaling = model(TYPES[kind])
    scheduler = diffusers.UniPCMultistepScheduler(
        1000,
        **BETAS,
        prediction_type=kind,
        solver_order=order,
        solver_type=variant,
        timestep_spacing="trailing",
        final_sigmas_type="zero" if variant == "bh2" else "sigma_min",
        lower_order_final=variant == "bh2",
    )
    scheduler.set_timesteps(NUM_STEPS)
    sigmas = GRIDS["trailing"](NUM_STEPS, scaling)
    if variant == "bh1":
        sigmas[-1] = scaling.sigma_min
    check_levels(scheduler, sigmas)
    x, x_T = vp_start(draws, sigmas)
    got = ours("unipc", Denoiser(net, scaling), x, sigmas, draws(), order=order, variant=variant)
    expected = peer(scheduler, net, x_T) * float(torch.sqrt(1 + sigmas[-1] ** 2))
    compare(table, "UniPCMultistep", f"order {order}, {variant}, {kind}, trailing", got, expected)


@pytest.mark.parametrize("grid", ["uniform_t", "karras"])
def test_flow_matching(table, draws, grid):
    net, scaling = model("flow")
    sigmas = GRIDS[grid](NUM_STEPS, scaling)
    times = sigmas[:-1] / (1 + sigmas[:-1])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(1000)
    scheduler.set_timesteps(sigmas=times.tolist())
    x = draws.start * float(sigmas[0])
    got = ours("euler", Denoiser(net, scaling), x, sigmas, draws())
    expected = x * float(1 - times[0])
    for t, time in zip(scheduler.timesteps, times, strict=True):
        output = net(expected, time.expand(len(x)).float())
        expected = scheduler.step(output, t, expected, return_dict=False)[0]
    compare(table, "FlowMatchEulerDiscrete", f"velocity, {grid}", got, expected)
