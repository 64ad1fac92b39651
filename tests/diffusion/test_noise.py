"""Schedules against their papers' formulas and diffusers' tables; the distributions of training noise levels."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from diffusion_lit.diffusion import (
    Constant,
    ContinuousVP,
    CosineSchedule,
    DiscreteUniform,
    LinearSchedule,
    LogitNormal,
    LogNormal,
    NoiseLevels,
    ScaledLinearSchedule,
    Schedule,
    SigmoidSchedule,
    UniformT,
)

KINDS = [LinearSchedule, CosineSchedule, SigmoidSchedule, ScaledLinearSchedule, ContinuousVP]
LENGTHS = [300, 512, 1000, 4000]
EVERY = [pytest.param(kind, T, id=f"{kind.__name__}-{T}") for kind in KINDS for T in LENGTHS]


@pytest.mark.parametrize(("kind", "T"), EVERY)
def test_every_schedule_is_consistent_and_monotone(kind, T):
    schedule = kind(num_steps=T)
    betas, alpha_bar, sigmas = schedule.betas, schedule.alpha_bar, schedule.sigmas
    assert schedule.num_steps == T and len(betas) == len(alpha_bar) == len(sigmas) == T
    assert {betas.dtype, alpha_bar.dtype, sigmas.dtype} == {torch.float64}
    assert bool(((betas > 0) & (betas < 1)).all())
    assert bool((alpha_bar.diff() < 0).all()) and bool((sigmas.diff() > 0).all())
    torch.testing.assert_close(alpha_bar, torch.cumprod(1 - betas, 0), rtol=1e-9, atol=0)
    torch.testing.assert_close(alpha_bar * (1 + sigmas**2), torch.ones_like(sigmas), rtol=1e-9, atol=0)
    assert (schedule.sigma_min, schedule.sigma_max) == (float(sigmas[0]), float(sigmas[-1]))
    assert schedule.sigma_min <= schedule.sampling_range[0] < schedule.sampling_range[1] == schedule.sigma_max


@pytest.mark.parametrize(("kind", "T"), EVERY)
def test_steps_and_sigma_round_trip(kind, T):
    schedule = kind(num_steps=T)
    steps = torch.arange(T)
    torch.testing.assert_close(schedule.t_to_sigma(steps), schedule.sigmas, rtol=1e-13, atol=0)
    torch.testing.assert_close(schedule.sigma_to_t(schedule.sigmas), steps.double(), rtol=0, atol=1e-8)
    between = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(T)) * (T - 1)
    sigma = schedule.t_to_sigma(between)
    torch.testing.assert_close(schedule.sigma_to_t(sigma), between, rtol=0, atol=1e-8)
    assert bool((schedule.t_to_sigma(between.sort().values).diff() > 0).all())
    assert bool((schedule.sigma_to_t(sigma.sort().values).diff() > 0).all())


def test_between_steps_log_sigma_is_linear():
    schedule = LinearSchedule(300)
    low, high = schedule.sigmas[40], schedule.sigmas[41]
    torch.testing.assert_close(schedule.t_to_sigma(40.25), low**0.75 * high**0.25)
    torch.testing.assert_close(schedule.sigma_to_t((low * high).sqrt()).item(), 40.5)


def test_conversions_keep_shape_and_precision():
    schedule = LinearSchedule()
    for dtype, expected in [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.int64, torch.float64),
    ]:
        value = torch.tensor([[2, 3, 5]], dtype=dtype)
        for result in (schedule.sigma_to_t(value), schedule.t_to_sigma(value)):
            assert result.dtype == expected and result.shape == (1, 3)
    assert float(schedule.t_to_sigma(3.7)) == float(schedule.t_to_sigma(torch.tensor(3.7, dtype=torch.float64)))
    assert schedule.sigma_to_t(1e9).item() == 999 and schedule.sigma_to_t(1e-9).item() == 0
    assert schedule.t_to_sigma(2000).item() == schedule.t_to_sigma(999).item()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (LinearSchedule(), {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        (ScaledLinearSchedule(), {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        (CosineSchedule(), {"beta_schedule": "squaredcos_cap_v2"}),
        (CosineSchedule(300), {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 300}),
        (LinearSchedule(512, rescale=False), {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
    ],
)
def test_tables_equal_those_of_diffusers(ours, theirs):
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DDPMScheduler(**{"num_train_timesteps": ours.num_steps, **theirs})
    torch.testing.assert_close(ours.betas.float(), peer.betas, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(ours.alpha_bar.float(), peer.alphas_cumprod, rtol=2e-4, atol=1e-9)


def test_linear_betas_end_alike_for_every_length():
    assert LinearSchedule(500).betas[0].item() == pytest.approx(2e-4)
    assert LinearSchedule(500).betas[-1].item() == pytest.approx(0.04)
    for kind in (LinearSchedule, ScaledLinearSchedule):
        last = [kind(T).sigma_max for T in LENGTHS]
        assert max(last) / min(last) < 1.12
    assert LinearSchedule(300, rescale=False).sigma_max < 5


def test_sigmoid_follows_its_curve():
    T, start, end, tau = 1000, -3.0, 3.0, 0.9
    time = np.arange(T + 1) / T
    curve = 1 / (1 + np.exp(-(time * (end - start) + start) / tau))
    expected = (curve[-1] - curve) / (curve[-1] - curve[0])
    schedule = SigmoidSchedule(T, start, end, tau)
    # The last beta is held below 1, where the curve itself would reach 0.
    np.testing.assert_allclose(schedule.alpha_bar[:-1].numpy(), expected[1:-1], rtol=1e-9)
    assert schedule.betas[-1].item() == pytest.approx(0.999)


def test_continuous_vp_integrates_its_rate():
    schedule = ContinuousVP(0.1, 20.0, num_steps=11, tau_min=1e-5)
    for step in range(11):
        tau = 1e-5 + (1 - 1e-5) * step / 10
        exponent, _ = integrate.quad(lambda s: 0.1 + 19.9 * s, 0, tau)
        assert schedule.t_to_sigma(step).item() == pytest.approx(math.sqrt(math.expm1(exponent)), rel=1e-12)
        # Halfway between the whole steps it is exact too, not interpolated.
    tau = 1e-5 + (1 - 1e-5) * 0.05
    expected = math.sqrt(math.expm1(0.1 * tau + 19.9 * tau**2 / 2))
    assert schedule.t_to_sigma(0.5).item() == pytest.approx(expected, rel=1e-12)
    assert schedule.sampling_range[0] == pytest.approx(math.sqrt(math.expm1(0.1e-3 + 19.9e-6 / 2)), rel=1e-9)


def test_continuous_vp_is_the_limit_of_linear_betas():
    chain, limit = LinearSchedule(20000), ContinuousVP()
    share = torch.linspace(0.05, 1, 20, dtype=torch.float64)
    fine = chain.t_to_sigma(share * (chain.num_steps - 1))
    torch.testing.assert_close(fine, limit.t_to_sigma(share * 999), rtol=2e-3, atol=0)


def test_constant_rate_is_the_limit_of_the_closed_form():
    schedule = ContinuousVP(5.0, 5.0)
    sigma = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    torch.testing.assert_close(schedule.t_to_sigma(schedule.sigma_to_t(sigma)), sigma)


N = 20000


def draw(levels, seed=0):
    sigma = levels.sample(N, torch.Generator().manual_seed(seed))
    assert sigma.shape == (N,) and sigma.dtype == torch.float32 and bool((sigma > 0).all())
    assert torch.equal(sigma, levels.sample(N, torch.Generator().manual_seed(seed)))
    return sigma.double()


def follows(values, distribution):
    """Whether a Kolmogorov-Smirnov test, with a fixed seed, sees no difference."""
    return stats.kstest(values.numpy(), distribution).pvalue > 0.01


def test_discrete_uniform_draws_every_step_alike():
    schedule = LinearSchedule(50)
    sigma = draw(DiscreteUniform(schedule))
    steps = schedule.sigma_to_t(sigma)
    assert float((steps - steps.round()).abs().max()) < 1e-4
    counts = torch.bincount(steps.round().long(), minlength=50)
    assert stats.chisquare(counts.numpy()).pvalue > 0.01


@pytest.mark.parametrize("schedule", [LinearSchedule(25), ContinuousVP(num_steps=25)], ids=["chain", "continuous"])
def test_uniform_t_is_uniform_in_the_step(schedule):
    assert follows(schedule.sigma_to_t(draw(UniformT(schedule))), stats.uniform(0, 24).cdf)


def test_uniform_t_without_schedule_is_uniform_in_flow_time():
    sigma = draw(UniformT())
    time = sigma / (1 + sigma)
    assert follows(time, stats.uniform(1e-3, 1 - 2e-3).cdf)
    assert float(time.min()) >= 1e-3 * (1 - 1e-6) and float(sigma.max()) <= 999 * (1 + 1e-6)


def test_log_normal():
    assert follows(draw(LogNormal(-1.2, 1.2)).log(), stats.norm(-1.2, 1.2).cdf)
    assert follows(draw(LogNormal(0.3, 0.7)).log(), stats.norm(0.3, 0.7).cdf)


def test_log_normal_up_to_a_level():
    free, cut = draw(LogNormal(-1.1, 2.0)), draw(LogNormal(-1.1, 2.0, sigma_max=12))
    assert torch.equal(cut, free.clamp(max=12))
    share = stats.norm(-1.1, 2.0).sf(math.log(12))
    assert stats.binomtest(int((cut == 12).sum()), len(cut), share).pvalue > 0.01


def test_logit_normal():
    sigma = draw(LogitNormal(0.5, 0.8))
    time = sigma / (1 + sigma)
    assert follows((time / (1 - time)).log(), stats.norm(0.5, 0.8).cdf)
    wide = draw(LogitNormal(0.0, 10.0))
    assert float(wide.max()) == pytest.approx(999, rel=1e-5) and float(wide.min()) == pytest.approx(1 / 999, rel=1e-5)


def test_constant():
    assert bool((draw(Constant(0.7)) == np.float32(0.7)).all())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LinearSchedule(1), "num_steps is 1"),
        (lambda: LogNormal(sigma_max=0), "sigma_max is 0"),
        (lambda: CosineSchedule(0), "num_steps is 0"),
        (lambda: LinearSchedule(10), "strictly between 0 and 1"),
        (lambda: LinearSchedule(beta_start=0.0), "beta_start is 0.0"),
        (lambda: Schedule(torch.full((2, 2), 0.1)), "row of 2 betas"),
        (lambda: SigmoidSchedule(start=1.0, end=0.0), "end is 0.0; give a finite number above 1, which is start"),
        (lambda: SigmoidSchedule(tau=0.0), "tau is 0.0"),
        (lambda: ContinuousVP(beta_min=3.0, beta_max=1.0), "beta_max is 1.0"),
        (lambda: ContinuousVP(tau_min=0.0), "tau_min"),
        (lambda: LogNormal(P_std=-1.0), "P_std is -1.0"),
        (lambda: LogitNormal(std=-1.0), "std is -1.0"),
        (lambda: Constant(0.0), "sigma is 0.0"),
    ],
)
def test_bad_input_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_base_without_draws_says_so():
    with pytest.raises(TypeError, match="abstract"):
        NoiseLevels()
