"""Observed orders of convergence: the slope of log error over log N is the order that the table of samplers claims."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers.moments import sampler_map

from diffusion_lit.diffusion.analytic import GaussianDenoiser, GaussianMixtureDenoiser
from diffusion_lit.diffusion.samplers import SAMPLERS, adaptive, rk45, unipc

LOW, HIGH = 0.05, 5.0
STEPS = (24, 32, 48, 64, 96)
MEAN = torch.tensor([0.3, -0.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)

DETERMINISTIC = {
    "ddim": {},
    "euler": {},
    "euler_ancestral": {"eta": 0.0},
    "heun": {},
    "dpmpp_2s_ancestral": {"eta": 0.0},
    "dpmpp_2m": {},
    "dpmpp_2m_sde": {"eta": 0.0},
    "unipc": {},
}
STOCHASTIC = {
    "ddpm": {},
    "ddpm, beta": {"variance": "beta"},
    "ddim": {"eta": 0.5},
    "euler_ancestral": {},
    "heun": {"S_churn": 1.0},
    "dpmpp_2s_ancestral": {},
    "dpmpp_2m_sde": {},
}


def denoiser():
    """Gaussian data of shape (1, 1, 2)."""
    return GaussianDenoiser(MEAN.view(1, 1, 2), COVARIANCE)


def mixture():
    means = torch.tensor([[0.8, 0.1], [-0.5, 0.6], [-0.2, -0.7]], dtype=torch.float64).view(3, 1, 1, 2)
    return GaussianMixtureDenoiser(torch.tensor([0.5, 0.3, 0.2]), means, torch.tensor([0.10, 0.20, 0.15]))


def grid(num_steps, rising=False):
    """Karras's grid that ends at sigma_min, not at 0."""
    levels = torch.linspace(HIGH ** (1 / 7), LOW ** (1 / 7), num_steps + 1, dtype=torch.float64) ** 7
    return levels.flip(0) if rising else levels


def start(level, num=16):
    return MEAN.view(1, 1, 2) + level * torch.randn(
        num, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )


def slope(errors):
    return -np.polyfit(np.log(STEPS), np.log(errors), 1)[0]


@pytest.mark.parametrize("rising", [False, True], ids=["sampling", "inversion"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_samplers_reach_the_exact_solution_with_their_order(name, rising):
    sampler, exact = SAMPLERS[name], denoiser()
    errors = []
    for num_steps in STEPS:
        sigmas = grid(num_steps, rising)
        x = start(float(sigmas[0]) + 0.5)
        expected = exact.probability_flow(x, float(sigmas[0]), float(sigmas[-1]))
        got = sampler.function(exact, x, sigmas, **DETERMINISTIC[name])
        errors.append(float((got - expected).abs().max()))
    assert abs(slope(errors) - sampler.order) < 0.15, errors


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_order_holds_where_the_denoiser_is_not_linear(name):
    sampler, exact = SAMPLERS[name], mixture()
    x = start(HIGH)
    expected = rk45(exact, x, grid(1), rtol=1e-11, atol=1e-11)
    errors = [float((sampler.function(exact, x, grid(n), **DETERMINISTIC[name]) - expected).abs().max()) for n in STEPS]
    assert abs(slope(errors) - sampler.order) < 0.3, errors


@pytest.mark.parametrize(("order", "observed"), [(1, 2), (2, 3), (3, 4)])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc_gains_an_order_by_its_corrector(order, observed, variant):
    exact, x = denoiser(), start(HIGH)
    expected = exact.probability_flow(x, HIGH, LOW)
    errors = [float((unipc(exact, x, grid(n), order=order, variant=variant) - expected).abs().max()) for n in STEPS]
    assert abs(slope(errors) - observed) < 0.2, errors


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samplers_reach_the_exact_distribution_with_their_order(name):
    sampler = SAMPLERS[name.split(",")[0]]
    errors = []
    for num_steps in STEPS:
        offset, (A, *B) = sampler_map(sampler.function, denoiser(), grid(num_steps), 2, **STOCHASTIC[name])
        torch.testing.assert_close(offset + A @ MEAN, MEAN)
        covariance = A @ (COVARIANCE + HIGH**2 * torch.eye(2)) @ A.T + sum(b @ b.T for b in B)
        errors.append(float((covariance - COVARIANCE - LOW**2 * torch.eye(2)).abs().max()))
    assert abs(slope(errors) - sampler.order) < 0.25, errors


def test_rk45_follows_its_tolerance():
    exact, x = denoiser(), start(HIGH)
    expected = exact.probability_flow(x, HIGH, LOW)
    for tolerance in (1e-4, 1e-6, 1e-8, 1e-10):
        got = rk45(exact, x, grid(1), rtol=tolerance, atol=tolerance)
        assert float((got - expected).abs().max()) < 10 * tolerance


def test_rk45_is_of_order_five_on_equal_steps():
    """With a tolerance that every step meets, the step is the grid's."""
    exact, x = denoiser(), start(HIGH)
    expected = exact.probability_flow(x, HIGH, LOW)
    errors = [float((rk45(exact, x, grid(n), rtol=1e9, atol=1e9) - expected).abs().max()) for n in STEPS]
    assert slope(errors) > SAMPLERS["rk45"].order - 0.25, errors


def rooted_trees(order):
    """The conditions of Runge-Kutta methods up to an order, as (product over the stages, 1 / density)."""
    A = [
        [Fraction(a).limit_denominator(10**6) for a in row] + [Fraction(0)] * (7 - len(row)) for row in adaptive.STAGES
    ]
    c = [sum(row, Fraction(0)) for row in A]

    def through(values):
        return [sum((a * v for a, v in zip(row, values, strict=True)), Fraction(0)) for row in A]

    def power(values, k):
        return [v**k for v in values]

    def times(left, right):
        return [a * b for a, b in zip(left, right, strict=True)]

    Ac, one = through(c), [Fraction(1)] * 7
    trees = {
        1: [(one, 1)],
        2: [(c, 2)],
        3: [(power(c, 2), 3), (Ac, 6)],
        4: [(power(c, 3), 4), (times(c, Ac), 8), (through(power(c, 2)), 12), (through(Ac), 24)],
        5: [
            (power(c, 4), 5),
            (times(power(c, 2), Ac), 10),
            (power(Ac, 2), 20),
            (times(c, through(power(c, 2))), 15),
            (times(c, through(Ac)), 30),
            (through(power(c, 3)), 20),
            (through(times(c, Ac)), 40),
            (through(through(power(c, 2))), 60),
            (through(through(Ac)), 120),
        ],
    }
    return c, [tree for level in range(1, order + 1) for tree in trees[level]]


def test_the_tableau_of_rk45_meets_the_order_conditions_exactly():
    fifth = [Fraction(b).limit_denominator(10**6) for b in (*adaptive.STAGES[6], 0)]
    error = [Fraction(b).limit_denominator(10**6) for b in adaptive.ERROR]
    fourth = [b - e for b, e in zip(fifth, error, strict=True)]
    for weights, order in ((fifth, 5), (fourth, 4)):
        nodes, conditions = rooted_trees(order)
        assert nodes == [Fraction(c).limit_denominator(10**6) for c in adaptive.NODES]
        for product, density in conditions:
            assert sum((b * p for b, p in zip(weights, product, strict=True)), Fraction(0)) == Fraction(1, density)
    assert any(error)
