"""The samplers, step by step, against the papers' formulas on one network and the same noise, in float64."""

import numpy as np
import pytest
import torch
from helpers.exact import linear_betas, sigmas_of
from helpers.textbook import ddim, ddpm, dpmpp_2m, dpmpp_2s, edm, flow_euler, unipc

from diffusion_lit.diffusion.denoiser import Denoiser
from diffusion_lit.diffusion.grids import GRIDS
from diffusion_lit.diffusion.noise import LinearSchedule
from diffusion_lit.diffusion.preconditioning import EpsPreconditioning
from diffusion_lit.diffusion.samplers import SAMPLERS

SHAPE = (2, 3, 5, 5)
KERNEL = torch.randn(3, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) / 5


def denoise(x, sigma):
    """A smooth denoiser that is far from linear: a convolution, squashed, that trusts x less the higher sigma is."""
    s = float(sigma)
    mixed = torch.nn.functional.conv2d(x, KERNEL, padding=1)
    return torch.tanh((x + 0.7 * mixed) / (1 + s * s) ** 0.5) + 0.1 * torch.cos(x / (1 + s))


class Learned:
    """The same with a learned variance."""

    def __call__(self, x, sigma):
        return denoise(x, sigma)

    def v(self, x, sigma):
        return torch.sigmoid(x / (1 + float(sigma)))

    def learned_variance(self, x, sigma, sigma_next):
        return denoise(x, sigma), self.v(x, sigma)


class Clipped:
    """The same with its estimates clipped far inside their range, which tells what they were before."""

    limit = 0.5

    def __call__(self, x, sigma):
        return denoise(x, sigma).clamp(-self.limit, self.limit)

    def unclipped(self, x, sigma):
        return self(x, sigma), denoise(x, sigma)


def noise_queue(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, dtype=x.dtype, generator=generator)


def endless(noise, like):
    while True:
        yield noise(like)


def karras_levels(num_steps, low, high):
    return [
        *((high ** (1 / 7) + i / (num_steps - 1) * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for i in range(num_steps)),
        0,
    ]


LEARNED = {"variance": "learned", "v": Learned().v}
CHURN = {"S_churn": 4.0, "S_tmin": 0.05, "S_tmax": 30.0, "S_noise": 1.007}
CASES = {
    "ddpm posterior": ("ddpm", {}, ddpm, {}),
    "ddpm beta": ("ddpm", {"variance": "beta"}, ddpm, {"variance": "beta"}),
    "ddpm learned": ("ddpm", {"variance": "learned"}, ddpm, LEARNED),
    "ddpm learned, half": ("ddpm", {"variance": "learned", "variance_scale": 0.5}, ddpm, {**LEARNED, "scale": 0.5}),
    "ddpm noise_until": ("ddpm", {"noise_until": 4, "variance": "beta"}, ddpm, {"noise_until": 4, "variance": "beta"}),
    "ddim eta 0": ("ddim", {}, ddim, {}),
    "ddim eta 0.3": ("ddim", {"eta": 0.3}, ddim, {"eta": 0.3}),
    "ddim eta 1": ("ddim", {"eta": 1.0}, ddim, {"eta": 1.0}),
    "ddim eta 1, as DDPM": ("ddim", {"eta": 1.0}, ddpm, {}),
    "euler": ("euler", {}, edm, {"heun": False}),
    "euler, as a flow": ("euler", {}, flow_euler, {}),
    "euler_ancestral": ("euler_ancestral", {}, ddim, {"eta": 1.0}),
    "euler_ancestral eta 0.5": ("euler_ancestral", {"eta": 0.5}, ddim, {"eta": 0.5}),
    "heun": ("heun", {}, edm, {}),
    "heun churn": ("heun", CHURN, edm, CHURN),
    "heun much churn": ("heun", {"S_churn": 100.0}, edm, {"S_churn": 100.0}),
    "dpmpp_2s_ancestral": ("dpmpp_2s_ancestral", {}, dpmpp_2s, {"eta": 1.0}),
    "dpmpp_2s_ancestral eta 0.4": ("dpmpp_2s_ancestral", {"eta": 0.4}, dpmpp_2s, {"eta": 0.4}),
    "dpmpp_2m": ("dpmpp_2m", {}, dpmpp_2m, {}),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {}, dpmpp_2m, {"sde": True}),
    "dpmpp_2m_sde eta 0": ("dpmpp_2m_sde", {"eta": 0.0}, dpmpp_2m, {}),
    "unipc 1 bh1": ("unipc", {"order": 1, "variant": "bh1"}, unipc, {"order": 1, "variant": "bh1"}),
    "unipc 2 bh1": ("unipc", {"order": 2, "variant": "bh1"}, unipc, {"order": 2, "variant": "bh1"}),
    "unipc 2 bh2": ("unipc", {}, unipc, {}),
    "unipc 3 bh2": ("unipc", {"order": 3}, unipc, {"order": 3}),
}


@pytest.mark.parametrize("ends_at_zero", [True, False], ids=["to 0", "to sigma_min"])
@pytest.mark.parametrize("case", CASES)
def test_each_step_is_the_one_that_the_paper_prints(case, ends_at_zero):
    name, options, formula, paper_options = CASES[case]
    levels = karras_levels(9, 0.01, 50.0)[: None if ends_at_zero else -1]
    x = levels[0] * torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    states = []
    end = SAMPLERS[name].function(
        Learned(),
        x,
        torch.tensor(levels, dtype=torch.float64),
        noise=noise_queue(),
        callback=lambda step, x, x0_hat, sigma: states.append((x, x0_hat, float(sigma))),
        **options,
    )
    expected = formula(denoise, x, levels, endless(noise_queue(), x), **paper_options)
    assert len(states) == len(levels) - 1
    torch.testing.assert_close(end, expected[-1], rtol=1e-6, atol=1e-6)
    for step, (state, x0_hat, sigma) in enumerate(states):
        if "churn" not in case:
            assert sigma == levels[step]
            torch.testing.assert_close(state, [x, *expected][step], rtol=1e-6, atol=1e-6)
        if "unipc" not in case:
            torch.testing.assert_close(x0_hat, denoise(state, sigma), rtol=0, atol=0)


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("clipped_noise", [True, False])
def test_ddim_with_clipping_takes_the_noise_of_the_estimate_that_it_is_told_to(eta, clipped_noise):
    levels = karras_levels(9, 0.01, 50.0)
    x = levels[0] * torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    options = {"eta": eta, "use_clipped_model_output": clipped_noise, "noise": noise_queue()}
    end = SAMPLERS["ddim"].function(Clipped(), x, torch.tensor(levels, dtype=torch.float64), **options)
    noises = endless(noise_queue(), x)
    if clipped_noise:
        expected = ddim(Clipped(), x, levels, noises, eta)
    else:
        expected = ddim(denoise, x, levels, noises, eta, clip=Clipped.limit)
    torch.testing.assert_close(end, expected[-1], rtol=1e-6, atol=1e-6)


class EpsNet(torch.nn.Module):
    """A network that sees x_t and t as Ho 2020 do, and predicts the noise."""

    def forward(self, x, t, label=None):
        mixed = torch.nn.functional.conv2d(x, KERNEL, padding=1)
        return torch.tanh(1.5 * x + mixed) * (1 - 0.3 * torch.cos(t / 300))[:, None, None, None]


@pytest.mark.parametrize("grid", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_the_whole_chain_is_ancestral_sampling_of_ho_2020(grid, variance):
    T = 60
    betas = linear_betas(T)
    alphas, alpha_bars = 1 - betas, np.cumprod(1 - betas)
    net, queue = EpsNet(), noise_queue(3)
    x_T = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    x_t, chain = x_T, []
    for t in reversed(range(T)):
        eps = net(x_t, torch.full((SHAPE[0],), t, dtype=torch.float64))
        mean = (x_t - betas[t] / np.sqrt(1 - alpha_bars[t]) * eps) / np.sqrt(alphas[t])
        previous = alpha_bars[t - 1] if t else 1.0
        beta_tilde = (1 - previous) / (1 - alpha_bars[t]) * betas[t]
        z = queue(x_t) if t else 0.0
        x_t = mean + np.sqrt(betas[t] if variance == "beta" else beta_tilde) * z
        chain.append(x_t)
    denoiser = Denoiser(net, EpsPreconditioning(LinearSchedule(T)))
    sigmas = GRIDS[grid](T, denoiser.scaling)
    np.testing.assert_allclose(sigmas[:-1].flip(0), sigmas_of(betas), rtol=1e-10)
    scale = lambda s: torch.sqrt(1 + torch.as_tensor(s, dtype=torch.float64) ** 2)  # noqa: E731
    seen = []
    end = SAMPLERS["ddpm"].function(
        denoiser,
        x_T * scale(sigmas[0]),
        sigmas,
        variance=variance,
        noise=noise_queue(3),
        callback=lambda step, x, x0_hat, sigma: seen.append(x / scale(sigma)),
    )
    for ours, textbook in zip([*seen[1:], end], chain, strict=True):
        torch.testing.assert_close(ours, textbook, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "eta"),
    [("ddpm", None), *((name, eta) for name in ("ddim", "euler_ancestral", "dpmpp_2s_ancestral") for eta in (0.3, 1.0))]
    + [("dpmpp_2m_sde", eta) for eta in (0.3, 1.0, 2.0)],
)
def test_noise_keeps_the_level_whatever_its_amount(name, eta):
    """A data set of one image makes every sampler exact: x at level t is that image plus t times unit noise."""
    image = torch.full((1, 4), 0.3, dtype=torch.float64)
    levels = torch.tensor([5.0, 2.0, 0.7, 0.4], dtype=torch.float64)
    draws = len(levels)
    x = torch.zeros(draws, 4, dtype=torch.float64)
    x[0] = levels[0]
    step = iter(range(1, draws))

    def noise(x):
        n = torch.zeros_like(x)
        n[next(step)] = 1.0
        return n

    options = {} if eta is None else {"eta": eta}
    end = SAMPLERS[name].function(lambda x, s: image.expand_as(x), x + image, levels, noise=noise, **options)
    torch.testing.assert_close((end - image).square().sum(0).sqrt(), levels[-1].expand(4))
