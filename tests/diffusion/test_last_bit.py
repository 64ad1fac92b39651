"""No decision hangs on the last bit of a rounding, which differs between processors: levels are jittered by hand."""

import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
from helpers.exact import PREDICTIONS

from diffusion_lit.diffusion.generate import Sampling
from diffusion_lit.diffusion.grids import GRIDS, evenly
from diffusion_lit.diffusion.guidance import ClassifierFreeGuidance
from diffusion_lit.diffusion.noise import LinearSchedule, Schedule
from diffusion_lit.diffusion.preconditioning import EDMPreconditioning, EpsPreconditioning
from diffusion_lit.diffusion.samplers import SAMPLERS
from diffusion_lit.diffusion.samplers.common import ancestral_split
from diffusion_lit.evaluation.memorization import nearest

STRIDED = ["leading", "linspace", "trailing"]


@pytest.fixture
def jitter(monkeypatch):
    """Moves every level that a schedule gives up or down by a few units in the last place, by turns."""
    exact, turn = Schedule.t_to_sigma, iter(range(10**9))

    def jittered(self, t):
        sigma = exact(self, t)
        return sigma * (1 + (-1) ** next(turn) * 1e-15 * torch.linspace(-1, 1, max(sigma.numel(), 2))[: sigma.numel()])

    monkeypatch.setattr(Schedule, "t_to_sigma", jittered)


@pytest.mark.parametrize("to_zero", [True, False])
@pytest.mark.parametrize("grid", STRIDED)
def test_a_strided_grid_has_the_same_steps_whatever_the_last_bit(grid, to_zero, jitter):
    """The lowest level comes once, and the steps are whole numbers computed here with integers."""
    for total in (1000, 50):
        scaling = EpsPreconditioning(LinearSchedule(total))
        for count in range(2, 50):
            wanted = {
                "leading": [i * (total // count) for i in range(count)],
                "linspace": [round_half_even(i * (total - 1), count - 1) for i in range(count)],
                "trailing": [round_half_even((i + 1) * total, count) - 1 for i in range(count)],
            }[grid]
            wanted = wanted[::-1] if to_zero or wanted[0] == 0 else [*wanted[::-1], 0]
            levels = GRIDS[grid](count, scaling, to_zero=to_zero)
            steps = scaling.schedule.sigma_to_t(levels[:-1] if to_zero else levels)
            assert steps.round().tolist() == wanted
            np.testing.assert_allclose(steps, wanted, atol=1e-6)


def round_half_even(numerator, denominator):
    whole, rest = divmod(numerator, denominator)
    return whole + (2 * rest > denominator or (2 * rest == denominator and whole % 2 == 1))


def test_whole_numbers_are_spread_by_integers():
    for last in range(0, 60):
        for count in range(2, 30):
            assert evenly(0, last, count) == [round_half_even(i * last, count - 1) for i in range(count)]
            assert evenly(last, 0, count)[0] == last and evenly(last, 0, count)[-1] == 0
    assert evenly(7, 3, 1) == [7]


@pytest.mark.parametrize("prediction", ["edm", "flow", "eps, linear"])
def test_the_end_of_an_interval_counts_as_itself(prediction):
    """A guidance interval, S_tmin and S_tmax that are levels of the grid, printed or in float32, act at that level."""
    levels = GRIDS["karras"](6, PREDICTIONS[prediction][0]())
    low, high = float(levels[4]), float(levels[1])
    for typed in (float, lambda level: float(f"{level:.8g}"), lambda level: float(np.float32(level))):
        interval = (typed(low), typed(high))
        acted = []
        for level in levels[:-1].float():
            calls = []

            def denoise(x, sigma, label, calls=calls):
                calls.append(len(x))
                return x

            denoise.num_classes = 2
            ClassifierFreeGuidance(Plain(denoise), 3.0, interval)(torch.zeros(1, 1, 2, 2), level, torch.zeros(1).long())
            acted.append(calls[0] == 2)
        assert acted == [False, True, True, True, False, False]
        draws = []
        churned = {"S_churn": 1.0, "S_tmin": interval[0], "S_tmax": interval[1]}
        SAMPLERS["heun"].function(
            lambda x, sigma: x * 0.5,
            torch.zeros(1, 1, 2, 2),
            levels,
            noise=lambda x, draws=draws: draws.append(1) or torch.zeros_like(x),
            **churned,
        )
        assert len(draws) == 4


class Plain(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.num_classes = function, function.num_classes

    def forward(self, *arguments):
        return self.function(*arguments)


def test_noise_ends_at_the_same_level_when_sampling_goes_on_from_one():
    sampling = Sampling("ddpm", 8, "exponential", sampler_options={"noise_until": 5})
    grid = sampling.sigmas(EDMPreconditioning())
    for index in range(1, 5):
        for moved in (1, 1 + 1e-9, 1 - 1e-9):
            rest = torch.cat([grid[index : index + 1] * moved, grid[index + 1 :]])
            assert sampling._options(EDMPreconditioning(), grid, rest)["noise_until"] == 5 - index


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("ratio", [0.9, 1e-3, 1e-7, 1e-9, 1e-12])
def test_a_long_step_keeps_its_lower_level(ratio, eta):
    """Against 60 digits; the square root of a difference is 0 where the ratio is below 1e-8."""
    getcontext().prec = 60
    share = Decimal(eta) * (1 - Decimal(ratio) ** 2).sqrt()
    down, up = ancestral_split(1.0, ratio, eta)
    assert down == pytest.approx(float(Decimal(ratio) * (1 - share**2).sqrt()), rel=1e-12)
    assert up == pytest.approx(float(Decimal(ratio) * share), rel=1e-12)
    assert math.hypot(down, up) == pytest.approx(ratio)


def test_neighbours_of_images_are_found_with_whole_numbers():
    """Many ties: the first of the nearest wins, as in integers."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randint(0, 3, (40, 1, 4, 4), generator=generator, dtype=torch.uint8) * 85
    queries = torch.randint(0, 3, (60, 1, 4, 4), generator=generator, dtype=torch.uint8) * 85
    exact = (queries.long().flatten(1)[:, None] - points.long().flatten(1)).square().sum(2)
    distances, found = nearest(queries, points)
    assert found.tolist() == exact.numpy().argmin(1).tolist()
    torch.testing.assert_close(distances * 255, exact.min(1).values.double().sqrt())
