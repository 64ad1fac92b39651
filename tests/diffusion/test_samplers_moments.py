"""Every sampler on every grid with every prediction type, on Gaussian data, against the papers' moment recursions.

On a Gaussian a denoiser is affine in x, so a sampler is affine in start and noise: A x_start + sum_j B_j n_j + c.
The papers' formulas (tests/helpers/textbook.py) go through the same algebra for each principal axis, as coefficients
of (1, x_start, n_1, n_2, ...), and from them follow the mean and the covariance of what the sampler makes.
"""

import math

import pytest
import torch
from helpers.exact import PREDICTIONS, exact_denoiser, gaussian
from helpers.moments import sampler_map
from helpers.textbook import consistency, ddim, ddpm, dpmpp_2m, dpmpp_2s, edm, flow_euler, unipc

from diffusion_lit.diffusion.grids import GRIDS
from diffusion_lit.diffusion.samplers import SAMPLERS

CASES = {
    "consistency": ("consistency", {}, consistency, {}),
    "ddpm": ("ddpm", {}, ddpm, {}),
    "ddpm, beta": ("ddpm", {"variance": "beta"}, ddpm, {"variance": "beta"}),
    "ddpm, crisp": ("ddpm", {"variance_scale": 0.5, "noise_until": 2}, ddpm, {"scale": 0.5, "noise_until": 2}),
    "ddim": ("ddim", {}, ddim, {}),
    "ddim, eta 0.6": ("ddim", {"eta": 0.6}, ddim, {"eta": 0.6}),
    "euler": ("euler", {}, edm, {"heun": False}),
    "euler, as a flow": ("euler", {}, flow_euler, {}),
    "euler_ancestral": ("euler_ancestral", {}, ddim, {"eta": 1.0}),
    "heun": ("heun", {}, edm, {}),
    "heun, churn": ("heun", {"S_churn": 1.5, "S_noise": 1.01}, edm, {"S_churn": 1.5, "S_noise": 1.01}),
    "dpmpp_2s_ancestral": ("dpmpp_2s_ancestral", {}, dpmpp_2s, {"eta": 1.0}),
    "dpmpp_2s_ancestral, eta 0": ("dpmpp_2s_ancestral", {"eta": 0.0}, dpmpp_2s, {}),
    "dpmpp_2m": ("dpmpp_2m", {}, dpmpp_2m, {}),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {}, dpmpp_2m, {"sde": True}),
    "unipc": ("unipc", {}, unipc, {}),
    "unipc, order 3": ("unipc", {"order": 3, "variant": "bh1"}, unipc, {"order": 3, "variant": "bh1"}),
}


def start_std(denoiser, levels):
    return math.sqrt(1 + levels[0] ** 2) if denoiser.scaling.variance_preserving else levels[0]


def sampler_moments(sampler, denoiser, sigmas, size, **options):
    """Mean and covariance of what a sampler makes from the start that belongs to the path."""
    mean, (A, *B) = sampler_map(sampler, denoiser, sigmas, size, **options)
    return mean, start_std(denoiser, sigmas.tolist()) ** 2 * A @ A.T + sum(b @ b.T for b in B)


def textbook_moments(formula, levels, std, **options):
    """The same from a paper's formula, axis by axis."""
    mean, variances, axes = gaussian()
    columns = 2 + 2 * len(levels)
    unit = torch.eye(columns, dtype=torch.float64)
    shift = (mean @ axes)[:, None] * unit[0]

    def denoise(x, s):
        gain = (variances / (variances + s**2))[:, None]
        return shift + gain * (x - shift)

    noises = (unit[column].expand(3, columns) for column in range(2, columns))
    *_, end = formula(denoise, unit[1].expand(3, columns), levels, noises, **options)
    variance = std**2 * end[:, 1] ** 2 + end[:, 2:].square().sum(1)
    return axes @ end[:, 0], axes @ variance.diag() @ axes.T


@pytest.mark.parametrize("grid", [name for name in GRIDS if name != "levels"])  # which are the caller's
@pytest.mark.parametrize("case", CASES)
def test_the_moments_on_a_gaussian_are_those_of_the_paper(case, grid):
    name, options, formula, paper_options = CASES[case]
    for prediction in PREDICTIONS:
        denoiser = exact_denoiser(prediction)
        for num_steps in (2, 4, 7) if grid == "karras" else (4,):
            sigmas = GRIDS[grid](num_steps, denoiser.scaling)
            levels = sigmas.tolist()
            extra = {"S_tmax": levels[1] * 1.01} if "S_churn" in options else {}
            mean, covariance = sampler_moments(SAMPLERS[name].function, denoiser, sigmas, 3, **options, **extra)
            expected = textbook_moments(formula, levels, start_std(denoiser, levels), **paper_options, **extra)
            message = f"{case} on {grid} with {prediction} in {num_steps} steps: "
            for what, got, want in (("mean", mean, expected[0]), ("covariance", covariance, expected[1])):
                difference = float((got - want).abs().max() / max(1, want.abs().max()))
                assert difference <= 1e-7, message + f"the {what} is off by {difference:.1e}"


@pytest.mark.parametrize("grid", [name for name in GRIDS if name != "levels"])  # which are the caller's
def test_the_adaptive_sampler_solves_the_ode_on_every_grid_and_prediction(grid):
    mean, variances, axes = gaussian()
    for prediction in PREDICTIONS:
        denoiser = exact_denoiser(prediction)
        sigmas = GRIDS[grid](2, denoiser.scaling)
        first, last = sigmas[0], sigmas[-2]
        unit = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x = mean + unit @ ((variances + first**2).sqrt() * axes).T
        got = SAMPLERS["rk45"].function(denoiser, x.reshape(4, 1, 1, 3), sigmas, rtol=1e-6, atol=1e-6)
        at_last = mean + unit @ ((variances + last**2).sqrt() * axes).T
        expected = mean + (at_last - mean) @ axes @ (axes * (variances / (variances + last**2))).T
        torch.testing.assert_close(got.flatten(1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("case", CASES)
def test_one_step_gives_the_mean_of_the_data(case, prediction):
    name, options, *_ = CASES[case]
    denoiser = exact_denoiser(prediction)
    sigmas = GRIDS["karras"](1, denoiser.scaling)
    extra = {"S_churn": 0} if "S_churn" in options else {}
    got, _ = sampler_map(SAMPLERS[name].function, denoiser, sigmas, 3, **{**options, **extra})
    torch.testing.assert_close(got, denoiser(torch.zeros(1, 1, 1, 3, dtype=torch.float64), sigmas[0])[0, 0, 0])


def test_every_sampler_has_a_case():
    others = {"rk45", "meanflow"}  # the last in test_meanflow_loss.py, on denoisers that are told where a step ends
    assert {case[0] for case in CASES.values()} | others == set(SAMPLERS)
