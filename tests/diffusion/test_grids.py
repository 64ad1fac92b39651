"""Sampling grids: their shape and range for every prediction type, closed forms, and the steps that diffusers takes."""

import math

import numpy as np
import pytest
import torch
from helpers.exact import PREDICTIONS, cosine_betas, linear_betas, sigmas_of, vp_sigma

from diffusion_lit.diffusion.generate import Sampling
from diffusion_lit.diffusion.grids import FLOW_STEPS, GRIDS
from diffusion_lit.diffusion.noise import ContinuousVP, CosineSchedule, LinearSchedule
from diffusion_lit.diffusion.preconditioning import (
    EDMPreconditioning,
    EpsPreconditioning,
    FlowPreconditioning,
    VPreconditioning,
    X0Preconditioning,
)

CONTINUOUS = ["karras", "exponential", "uniform_t", "log_snr"]
STRIDED = ["leading", "linspace", "trailing"]
COMPUTED = [*CONTINUOUS, *STRIDED]


def test_the_table_is_whole():
    assert list(GRIDS) == [*COMPUTED, "levels"]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 100])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("grid", COMPUTED)
def test_a_grid_falls_within_the_range_and_ends_in_zero(grid, prediction, num_steps):
    if grid == "leading" and num_steps == 1:
        return
    scaling = PREDICTIONS[prediction][0]()
    sigmas = GRIDS[grid](num_steps, scaling)
    low, high = scaling.sampling_range
    assert sigmas.shape == (num_steps + 1,)
    assert sigmas.dtype == torch.float64
    assert bool((sigmas.diff() < 0).all())
    assert sigmas[-1] == 0
    assert float(sigmas[0]) <= high
    assert float(sigmas[-2]) >= low
    scaling(sigmas[:-1])  # inside the trained support
    if grid in CONTINUOUS and prediction != "edm":
        assert float(sigmas[0]) == pytest.approx(high, rel=1e-9)
        assert num_steps == 1 or float(sigmas[-2]) == pytest.approx(low, rel=1e-9)


def test_karras_is_equation_5():
    sigmas = GRIDS["karras"](5, EDMPreconditioning())
    expected = [(80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(5)]
    np.testing.assert_allclose(sigmas[:-1], expected, rtol=1e-12)
    np.testing.assert_allclose(GRIDS["karras"](3, EDMPreconditioning(), rho=1, sigma_max=10)[:-1], [10, 5.001, 0.002])


@pytest.mark.parametrize("grid", ["exponential", "log_snr"])
def test_exponential_is_even_in_log_snr(grid):
    sigmas = GRIDS[grid](7, EDMPreconditioning(), sigma_min=0.01, sigma_max=100)
    steps = np.diff(-2 * np.log(sigmas[:-1]))
    np.testing.assert_allclose(steps, 2 * math.log(1e4) / 6)


def test_uniform_t_is_even_in_the_time_of_each_path():
    cosine = GRIDS["uniform_t"](6, VPreconditioning(CosineSchedule(251)))
    np.testing.assert_allclose(cosine[:-1], sigmas_of(cosine_betas(251))[[250, 200, 150, 100, 50, 0]], rtol=1e-9)
    flow = GRIDS["uniform_t"](6, FlowPreconditioning())[:-1]
    np.testing.assert_allclose(flow / (1 + flow), np.linspace(0.999, 0.001, 6))
    assert torch.equal(GRIDS["uniform_t"](6, X0Preconditioning())[:-1], flow)
    vp = GRIDS["uniform_t"](6, EpsPreconditioning(ContinuousVP()))[:-1]
    np.testing.assert_allclose(vp, vp_sigma(np.linspace(1, 1e-3, 6)), rtol=1e-9)
    edm = GRIDS["uniform_t"](6, EDMPreconditioning())[:-1]
    assert float(edm[0]) == pytest.approx(80)
    assert float(edm[-1]) == pytest.approx(sigmas_of(linear_betas())[0])
    steps = np.interp(np.log(edm), np.log(sigmas_of(linear_betas())), np.arange(1000))
    np.testing.assert_allclose(np.diff(steps), -steps[0] / 5, rtol=1e-6)


@pytest.mark.parametrize(
    ("grid", "num_steps", "steps"),
    [
        ("leading", 4, [750, 500, 250, 0]),
        ("leading", 3, [666, 333, 0]),
        ("linspace", 4, [999, 666, 333, 0]),
        ("linspace", 1, [999]),
        ("trailing", 4, [999, 749, 499, 249]),
        ("trailing", 3, [999, 666, 332]),
        ("trailing", 1, [999]),
    ],
)
def test_strided_grids_take_whole_steps(grid, num_steps, steps):
    sigmas = GRIDS[grid](num_steps, EpsPreconditioning(LinearSchedule(1000)))
    np.testing.assert_allclose(sigmas[:-1], sigmas_of(linear_betas())[steps], rtol=1e-9)


@pytest.mark.parametrize("num_steps", [2, 10, 17, 50, 333, 1000])
@pytest.mark.parametrize("grid", STRIDED)
def test_strided_grids_take_the_steps_of_diffusers(grid, num_steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(1000, timestep_spacing=grid)
    scheduler.set_timesteps(num_steps)
    schedule = LinearSchedule(1000)
    steps = schedule.sigma_to_t(GRIDS[grid](num_steps, EpsPreconditioning(schedule))[:-1])
    np.testing.assert_allclose(steps, scheduler.timesteps, atol=1e-6)


@pytest.mark.parametrize("grid", STRIDED)
@pytest.mark.parametrize("T", [60, 300])
def test_as_many_steps_as_the_schedule_has_is_the_whole_chain(grid, T):
    schedule = LinearSchedule(T)
    torch.testing.assert_close(
        GRIDS[grid](T, EpsPreconditioning(schedule))[:-1], schedule.sigmas.flip(0), rtol=1e-9, atol=0
    )
    with pytest.raises(ValueError, match=f"num_steps is {T + 1}, but the schedule has {T} steps"):
        GRIDS[grid](T + 1, EpsPreconditioning(schedule))


@pytest.mark.parametrize("grid", STRIDED)
def test_a_flow_has_a_thousand_steps(grid):
    sigmas = GRIDS[grid](FLOW_STEPS, FlowPreconditioning())[:-1]
    np.testing.assert_allclose(sigmas / (1 + sigmas), np.linspace(0.999, 0.001, 1000), rtol=1e-9)


@pytest.mark.parametrize("grid", COMPUTED)
def test_a_range_of_ones_own_is_kept(grid):
    scaling = EpsPreconditioning(LinearSchedule(1000))
    sigmas = GRIDS[grid](9, scaling, sigma_min=0.1, sigma_max=10.0)
    assert float(sigmas[0]) <= 10
    assert float(sigmas[-2]) >= 0.1
    if grid in CONTINUOUS:
        assert float(sigmas[0]) == pytest.approx(10)
        assert float(sigmas[-2]) == pytest.approx(0.1)
    if grid in STRIDED:
        steps = scaling.schedule.sigma_to_t(sigmas[:-1])
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-6)
        assert float(sigmas[0]) > (7.5 if grid != "leading" else 5)


@pytest.mark.parametrize("grid", COMPUTED)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0; give a whole number from 1"),
        ({"num_steps": -3}, "num_steps is -3; give a whole number from 1"),
        ({"num_steps": 4, "sigma_min": 5.0, "sigma_max": 5.0}, "give 0 < sigma_min < sigma_max"),
        ({"num_steps": 4, "sigma_min": 100.0}, "sigma_min 100.0 to sigma_max 80.0; give 0 < sigma_min < sigma_max"),
        ({"num_steps": 4, "sigma_min": 0.0}, "give 0 < sigma_min < sigma_max"),
        ({"num_steps": 4, "sigma_max": math.inf}, "give 0 < sigma_min < sigma_max"),
    ],
)
def test_a_bad_range_is_refused_in_a_sentence(grid, arguments, message):
    with pytest.raises(ValueError, match=message):
        GRIDS[grid](scaling=EDMPreconditioning(), **arguments)


def test_bad_options_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="rho is 0; give a finite number above 0"):
        GRIDS["karras"](4, EDMPreconditioning(), rho=0)
    with pytest.raises(ValueError, match="would start at the lowest noise level; give 2 or more, or trailing"):
        GRIDS["leading"](1, EDMPreconditioning())


@pytest.mark.parametrize(
    ("grid", "options", "steps", "end"),
    [
        ("leading", {"steps_offset": 1}, [751, 501, 251, 1], None),
        ("leading", {"steps_offset": 1, "to_zero": False}, [751, 501, 251, 1], 0),
        ("leading", {"to_zero": False}, [750, 500, 250], 0),  # the step from the lowest level to itself is left out
        ("trailing", {"to_zero": False}, [999, 749, 499, 249], 0),
        ("linspace", {"to_zero": False}, [999, 666, 333], 0),
    ],
)
def test_a_strided_grid_may_be_moved_up_and_end_at_the_lowest_level(grid, options, steps, end):
    levels = sigmas_of(linear_betas())
    expected = [*levels[steps], 0.0 if end is None else levels[end]]
    np.testing.assert_allclose(GRIDS[grid](4, EpsPreconditioning(LinearSchedule()), **options), expected, rtol=1e-9)


def test_an_offset_beyond_the_schedule_is_refused():
    with pytest.raises(ValueError, match="first step would be 1000"):
        GRIDS["leading"](1000, EpsPreconditioning(LinearSchedule()), steps_offset=1)
    with pytest.raises(ValueError, match="steps_offset is -1"):
        GRIDS["leading"](10, EpsPreconditioning(LinearSchedule()), steps_offset=-1)


def test_explicit_levels_are_the_grid_as_they_stand():
    scaling = EDMPreconditioning()
    assert GRIDS["levels"](2, scaling, levels=[80, 0.8]).tolist() == [80, 0.8, 0]
    assert GRIDS["levels"](1, scaling, levels=[80, 0.8]).tolist() == [80, 0]
    assert GRIDS["levels"](2, scaling, levels=(3.5, 0.1)).dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"levels is \(\); give the noise levels, such as --grid_options"),
        ({"levels": []}, r"levels is \[\]; give the noise levels"),
        ({"levels": "80"}, "levels is '80'; give the noise levels"),
        ({"levels": [80, 0]}, "levels is 0; give a finite number above 0"),
        ({"levels": [math.nan]}, "levels is nan; give a finite number above 0"),
        ({"levels": [1.0, 2.0]}, "do not fall from 1.0 to 2.0; give falling ones"),
        ({"levels": [2.0, 2.0]}, "do not fall from 2.0 to 2.0"),
        ({"num_steps": 3, "levels": [80, 0.8]}, r"num_steps is 3, but levels \[80, 0.8\] are 2"),
        ({"num_steps": 0, "levels": [80, 0.8]}, "num_steps is 0; give a whole number from 1"),
        (
            {"num_steps": 2, "levels": [2000, 1], "scaling": FlowPreconditioning()},
            "hold 2000, which is outside .* to 999",
        ),
        ({"num_steps": 2, "levels": [9, 1e-4], "scaling": FlowPreconditioning()}, "hold 0.0001, which is outside"),
        ({"levels": [80, 0.8], "sigma_max": 40.0}, "sigma_max 40.0 was given beside levels"),
        ({"levels": [80, 0.8], "sigma_min": 0.1}, "sigma_min 0.1 was given beside levels"),
    ],
)
def test_levels_that_are_no_grid_are_refused_in_a_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        GRIDS["levels"](**{"num_steps": 1, "scaling": EDMPreconditioning(), **arguments})


def test_settings_take_levels_as_grid_and_number_of_steps():
    scaling, levels = EDMPreconditioning(), {"levels": [80, 5.0, 0.8]}
    assert Sampling(sampler="consistency", grid_options=levels).sigmas(scaling).tolist() == [80, 5, 0.8, 0]
    ddpm = Sampling(sampler="ddpm", num_steps=1000, grid="trailing")
    assert ddpm.replace(sampler="consistency", grid_options=levels).sigmas(scaling).tolist() == [80, 5, 0.8, 0]
    own = Sampling(sampler="consistency", grid_options=levels)
    assert own.replace(num_steps=1).sigmas(scaling).tolist() == [80, 0]
    assert own.replace(grid_options={"levels": [40]}).sigmas(scaling).tolist() == [40, 0]
    assert len(own.replace(sampler="heun", grid="karras", num_steps=18).sigmas(scaling)) == 19
    assert Sampling(**own.record()) == own
    for changes, message in (
        ({"num_steps": 4}, "num_steps is 4, but there are 3 levels"),
        ({"num_steps": 18}, "num_steps is 18, but there are 3 levels"),
        ({"grid_options": {"levels": 5}}, "levels is 5; give the noise levels"),
        ({"grid": "trailing", "grid_options": levels}, "'trailing' has no option 'levels'"),
        ({"grid": "karras", "grid_options": levels}, "'karras' has no option 'levels'"),
        ({"grid_options": {"level": [80]}}, "'levels' has no option 'level'; it takes levels"),
        ({"grid": "karras", "grid_options": {"roh": 5}}, "'karras' has no option 'roh'; it takes rho"),
    ):
        with pytest.raises(ValueError, match=message):
            own.replace(**changes)
