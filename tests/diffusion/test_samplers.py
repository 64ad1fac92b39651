"""The contract of the samplers: what they call and how often, what they refuse, and a mixture that comes out right."""

import functools
import math
from functools import partial

import pytest
import torch

from diffusion_lit.diffusion import samplers
from diffusion_lit.diffusion.analytic import GaussianDenoiser, GaussianMixtureDenoiser
from diffusion_lit.diffusion.rng import SeededNoise
from diffusion_lit.diffusion.samplers import SAMPLERS, sampler_table
from diffusion_lit.diffusion.samplers.common import begin

NAMES = list(SAMPLERS)
FALLING = torch.tensor([5.0, 2.0, 0.8, 0.2, 0.0], dtype=torch.float64)
NOISY = {"ddim": {"eta": 0.5}, "heun": {"S_churn": 1.0}}


def denoise(x, sigma, until=None):
    """The exact denoiser of N(0.2, 0.25), for any shape, and with until the exact map to that level."""
    s = torch.as_tensor(sigma).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    gain = 0.25 / (0.25 + s**2) if until is None else ((0.25 + until**2) / (0.25 + s**2)).sqrt()
    return 0.2 + gain * (x - 0.2)


denoise.takes_until = True


class Counting:
    """Counts calls and keeps what it was called with."""

    takes_until = True

    def __init__(self):
        self.sigmas, self.dtypes = [], set()

    def __call__(self, x, sigma, **until):
        self.sigmas.append(sigma)
        self.dtypes.add(x.dtype)
        return denoise(x, sigma, **until)


def with_noise(name):
    return partial(SAMPLERS[name].function, **NOISY.get(name, {}))


def start(*shape, dtype=torch.float64, seed=0):
    return (5 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
@pytest.mark.parametrize("name", [name for name in NAMES if SAMPLERS[name].calls_per_step])
def test_the_network_is_called_as_often_as_the_table_says(name, num_steps):
    counting = Counting()
    sigmas = torch.cat([torch.linspace(5, 0.1, num_steps, dtype=torch.float64), torch.zeros(1)])
    SAMPLERS[name].function(counting, start(2, 3), sigmas)
    assert len(counting.sigmas) == SAMPLERS[name].nfe(num_steps)
    formula = SAMPLERS[name].nfe_formula.replace("2N", "2 * N")
    assert eval(formula, {"N": num_steps}) == len(counting.sigmas)


def test_rk45_calls_once_and_six_times_for_each_step_tried():
    counting = Counting()
    SAMPLERS["rk45"].function(counting, start(2, 3), FALLING)
    assert SAMPLERS["rk45"].nfe(4) is None
    assert len(counting.sigmas) % 6 == 1
    assert all(sigma.shape == (2,) for sigma in counting.sigmas)


@pytest.mark.parametrize("name", NAMES)
def test_no_network_is_called_at_level_zero_nor_outside_the_grid(name):
    counting = Counting()
    SAMPLERS[name].function(counting, start(2, 3), FALLING)
    levels = torch.cat([sigma.reshape(-1) for sigma in counting.sigmas])
    assert float(levels.min()) >= float(FALLING[-2]) * (1 - 1e-12)
    assert float(levels.max()) <= float(FALLING[0])


@pytest.mark.parametrize("name", NAMES)
def test_the_table_says_which_samplers_draw_noise(name):
    draws = []

    def noise(x):
        draws.append(x)
        return torch.randn_like(x)

    SAMPLERS[name].function(denoise, start(2, 3), FALLING, noise=noise)
    assert bool(draws) == SAMPLERS[name].stochastic


def test_the_table_is_printed_with_every_sampler():
    text = sampler_table()
    for name, sampler in SAMPLERS.items():
        (line,) = [line for line in text.splitlines() if line.startswith(name + " ")]
        assert sampler.nfe_formula in line
        assert sampler.summary in line
    assert "2N - 1" in text
    assert "adaptive" in text


def test_names_that_coincide_are_one_function():
    def run(name, **options):
        generator = torch.Generator().manual_seed(5)
        noise = lambda x: torch.randn(x.shape, dtype=x.dtype, generator=generator)  # noqa: E731
        return SAMPLERS[name].function(denoise, start(2, 3), FALLING, noise=noise, **options)

    assert torch.equal(run("ddim"), run("euler"))
    assert torch.equal(run("ddim", eta=1.0), run("euler_ancestral"))
    assert torch.equal(run("ddpm"), run("euler_ancestral"))
    assert torch.equal(run("euler_ancestral", eta=0.4), run("ddim", eta=0.4))
    assert torch.equal(run("dpmpp_2m"), run("dpmpp_2m_sde", eta=0.0))
    assert not torch.equal(run("ddim"), run("ddim", eta=0.4))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_lower_precision_gives_the_same_up_to_rounding(name, dtype, tolerance):
    counting = Counting()
    exact = with_noise(name)(denoise, start(3, 2, 5), FALLING, noise=lambda x: torch.full_like(x, 0.7))
    got = with_noise(name)(counting, start(3, 2, 5, dtype=dtype), FALLING, noise=lambda x: torch.full_like(x, 0.7))
    assert got.dtype == dtype
    assert counting.dtypes == {torch.float32}
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_its_batch(name):
    """Odd sizes and a batch of one; the others in the batch are far away, so that they need other step sizes."""
    x = start(5, 3, 7, 5)
    x[1:] *= 100
    together = with_noise(name)(denoise, x, FALLING, noise=SeededNoise(range(5)))
    for index in (0, 3):
        alone = with_noise(name)(denoise, x[index : index + 1], FALLING, noise=SeededNoise([index]))
        torch.testing.assert_close(alone[0], together[index], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_callback_sees_every_step_and_changes_nothing(name):
    seen = []
    plain = with_noise(name)(denoise, start(2, 3), FALLING, noise=SeededNoise([0, 1]))
    watched = with_noise(name)(
        denoise, start(2, 3), FALLING, noise=SeededNoise([0, 1]), callback=lambda *step: seen.append(step)
    )
    assert torch.equal(plain, watched)
    assert [step for step, *_ in seen] == list(range(4))
    for step, x, x0_hat, sigma in seen:
        assert x.shape == x0_hat.shape == (2, 3)
        assert sigma.shape == ()
        if name != "heun":
            torch.testing.assert_close(sigma, FALLING[step])
    assert torch.equal(seen[0][1], start(2, 3)) or name == "heun"


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpmpp_2m", "unipc", "rk45"])
def test_deterministic_samplers_invert(name):
    x0 = GaussianDenoiser(torch.zeros(3), 0.25).sample(4, torch.Generator().manual_seed(0))[0]
    rising = torch.linspace(0.05**0.2, 5**0.2, 200, dtype=torch.float64) ** 5
    sampler = SAMPLERS[name].function
    noisy = sampler(denoise, x0, rising)
    assert float(noisy.std()) > 3
    torch.testing.assert_close(sampler(denoise, noisy, rising.flip(0)), x0, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "name", ["ddpm", "euler_ancestral", "dpmpp_2s_ancestral", "dpmpp_2m_sde", "ddim", "heun", "consistency"]
)
def test_samplers_that_add_noise_refuse_a_rising_grid(name):
    with pytest.raises(ValueError, match="rising grid; invert with a deterministic one"):
        with_noise(name)(denoise, start(2, 3), FALLING[:-1].flip(0))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ddim", {"eta": -0.1}, r"eta is -0.1; give a .*number from 0 to 1"),
        ("ddim", {"eta": 1.5}, r"eta is 1.5; give a .*number from 0 to 1"),
        ("ddim", {"eta": math.nan}, r"eta is nan; give"),
        ("euler_ancestral", {"eta": -1.0}, r"eta is -1.0; give"),
        ("dpmpp_2s_ancestral", {"eta": 1.1}, r"eta is 1.1; give"),
        ("dpmpp_2m_sde", {"eta": -1.0}, r"eta is -1.0; give a .*number from 0"),
        ("heun", {"S_churn": -1.0}, r"S_churn is -1.0; give a .*number from 0"),
        ("heun", {"S_noise": -1.0}, r"S_noise is -1.0; give a .*number from 0"),
        ("heun", {"S_tmin": -1.0}, r"S_tmin is -1.0; give a .*number from 0"),
        ("ddpm", {"variance": "fixed"}, r"variance is 'fixed'; give 'posterior', 'beta' or 'learned'"),
        ("ddpm", {"variance_scale": -1.0}, r"variance_scale is -1.0; give a .*number from 0"),
        ("ddpm", {"noise_until": -1}, r"noise_until is -1; give a .*number from 0"),
        ("ddpm", {"variance": "learned"}, r"no learned variance; train with it"),
        ("unipc", {"order": 4}, r"order is 4; give a .*number from 1 to 3"),
        ("unipc", {"variant": "bh3"}, r"variant is 'bh3'; give 'bh1' or 'bh2'"),
        ("rk45", {"rtol": 0.0}, r"rtol is 0.0; give a finite number above 0"),
        ("rk45", {"atol": -1.0}, r"atol is -1.0; give a finite number above 0"),
        ("rk45", {"max_steps": 0}, r"max_steps is 0; give a .*number from 1"),
        ("rk45", {"max_steps": 2}, r"did not reach its end within max_steps; raise max_steps, rtol or atol"),
    ],
)
def test_a_bad_option_is_refused_in_a_sentence(name, options, message):
    with pytest.raises(ValueError, match=message):
        SAMPLERS[name].function(denoise, start(2, 3), FALLING, **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([1.0], "holds no step"),
        ([1.0, 2.0, 0.5], "does not rise from 2.0 to 0.5; give each level once"),
        ([2.0, 1.0, 1.0, 0.0], "does not fall from 1.0 to 1.0; give each level once"),
        ([2.0, 1.0, 1.5, 0.0], "does not fall from 1.0 to 1.5; give each level once"),
        ([2.0, 2.0, 0.0], "does not fall from 2.0 to 2.0; give each level once"),
        ([2.0, 1.0, -1.0], "the noise level -1.0; give finite values from 0 up"),
        ([math.inf, 1.0, 0.0], "the noise level inf; give finite values from 0 up"),
        ([math.nan, 1.0, 0.0], "the noise level nan; give finite values from 0 up"),
        ([0.0, 1.0, 2.0], "starts at noise level 0"),
    ],
)
def test_a_bad_grid_is_refused_in_a_sentence(name, levels, message):
    with pytest.raises(ValueError, match=message):
        SAMPLERS[name].function(denoise, start(2, 3), torch.tensor(levels))


def test_rk45_refuses_a_denoiser_that_is_not_finite():
    with pytest.raises(ValueError, match="not finite; check the denoiser"):
        SAMPLERS["rk45"].function(lambda x, s: x / 0 * 0, start(2, 3), FALLING)


def test_rk45_lets_each_sample_choose_its_steps():
    """A sample with sharp structure takes more steps than its neighbour, which stays where it has arrived."""

    def levels_of(x):
        seen = []

        def mixed(x, sigma):
            seen.append(sigma)
            s = sigma[:, None]
            sharp = torch.tanh(x * 0.3 / (s**2 + 0.003))
            return torch.where(torch.arange(len(x))[:, None] == 0, sharp, 0 * x)

        SAMPLERS["rk45"].function(mixed, x, torch.tensor([5.0, 0.01], dtype=torch.float64))
        return torch.stack(seen)

    both = levels_of(torch.tensor([[1.0], [1.0]], dtype=torch.float64))
    distinct = [len(both[:, i].unique()) for i in range(2)]
    assert distinct[0] > distinct[1]
    torch.testing.assert_close(both[-1], torch.full((2,), 0.01, dtype=torch.float64))


@pytest.mark.parametrize("noise_until", [0, 2, 99])
def test_noise_until_counts_the_steps_that_add_noise(noise_until):
    draws = []

    def noise(x):
        draws.append(len(draws))
        return torch.zeros_like(x)

    SAMPLERS["ddpm"].function(denoise, start(2, 3), FALLING, noise=noise, noise_until=noise_until)
    assert len(draws) == min(noise_until, 3)


def test_ddpm_asks_only_a_learned_variance_for_it():
    asked = []

    class Learned(Counting):
        def learned_variance(self, x, sigma, sigma_next):
            asked.append((float(sigma), float(sigma_next)))
            return self(x, sigma), torch.zeros_like(x)

    fixed = Learned()
    SAMPLERS["ddpm"].function(fixed, start(2, 3), FALLING, noise=SeededNoise([0, 1]))
    assert not asked
    learned = Learned()
    got = SAMPLERS["ddpm"].function(learned, start(2, 3), FALLING, variance="learned", noise=SeededNoise([0, 1]))
    assert asked == [(5.0, 2.0), (2.0, 0.8), (0.8, 0.2)]
    assert len(learned.sigmas) == SAMPLERS["ddpm"].nfe(4)
    torch.testing.assert_close(got, SAMPLERS["ddpm"].function(denoise, start(2, 3), FALLING, noise=SeededNoise([0, 1])))


def test_churn_acts_between_its_levels_only():
    counting = Counting()
    SAMPLERS["heun"].function(counting, start(2, 3), FALLING, S_churn=0.4, S_tmin=0.5, S_tmax=3.0)
    first_calls = [float(sigma) for sigma in counting.sigmas][::2]
    assert first_calls == pytest.approx([5.0, 2.0 * 1.1, 0.8 * 1.1, 0.2])


def test_begin_keeps_at_least_float32():
    assert begin(torch.zeros(1, 2, dtype=torch.float16), FALLING, stochastic=True)[0].dtype == torch.float32
    assert begin(torch.zeros(1, 2, dtype=torch.float64), FALLING, stochastic=True)[0].dtype == torch.float64


def test_every_sampler_is_importable_by_its_name():
    for name, sampler in SAMPLERS.items():
        assert getattr(samplers, name) is sampler.function


def mixture():
    means = torch.tensor([[0.8, 0.1], [-0.5, 0.6], [-0.2, -0.7]], dtype=torch.float64)
    spread = torch.tensor([[[0.03, 0.02], [0.02, 0.05]], [[0.02, 0.0], [0.0, 0.10]], [[0.05, -0.03], [-0.03, 0.04]]])
    return GaussianMixtureDenoiser(torch.tensor([0.5, 0.3, 0.2]), means, spread)


def test_consistency_is_the_map_and_fresh_noise():
    """Algorithm 1 of arXiv 2303.01469, written out; every level of the grid is called once."""
    counting, draws = Counting(), []

    def noise(x):
        draws.append(torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(len(draws))))
        return draws[-1]

    got = SAMPLERS["consistency"].function(counting, start(2, 3), torch.tensor([5.0, 0.8, 0.3, 0.0]), noise=noise)
    x = denoise(start(2, 3), 5.0)
    for level, drawn in zip((0.8, 0.3), draws, strict=True):
        x = denoise(x + level * drawn, level)
    torch.testing.assert_close(got, x, rtol=1e-6, atol=1e-6)
    assert [float(sigma) for sigma in counting.sigmas] == pytest.approx([5.0, 0.8, 0.3])
    half = SAMPLERS["consistency"].function(denoise, start(2, 3), torch.tensor([5.0, 0.8]), noise=torch.ones_like)
    torch.testing.assert_close(half, denoise(start(2, 3), 5.0) + 0.8, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("levels", [[80.0, 0.0], [80.0, 0.8, 0.0], [80.0, 5.0, 0.3, 0.0]])
def test_consistency_with_the_true_map_draws_the_data_at_any_levels(levels):
    """N(0.2, 0.25) has the map m + sqrt(v / (v + s²)) (x - m)."""
    draw = torch.Generator().manual_seed(0)
    noise = lambda x: torch.randn(x.shape, dtype=x.dtype, generator=draw)  # noqa: E731
    x = levels[0] * noise(torch.empty(40_000, 1, dtype=torch.float64))
    made = SAMPLERS["consistency"].function(
        lambda x, s: 0.2 + (0.25 / (0.25 + s.double() ** 2)).sqrt() * (x - 0.2), x, torch.tensor(levels), noise=noise
    )
    assert float(made.mean()) == pytest.approx(0.2, abs=4 * 0.5 / 200 + 0.2 * 0.5 / 80)
    assert float(made.std()) == pytest.approx(0.5, abs=4 * 0.5 / (2 * 40_000) ** 0.5)


NUM_SAMPLES = 2500


@functools.cache
def reference():
    """Exact samples, their mean distance from each other, and the energy distance that chance alone gives."""
    draws = [mixture().sample(NUM_SAMPLES, torch.Generator().manual_seed(seed))[0] for seed in range(1, 8)]
    within = [torch.cdist(draw, draw).mean() for draw in draws]
    by_chance = [
        float(2 * torch.cdist(draws[0], draw).mean() - within[0] - inner)
        for draw, inner in zip(draws[1:], within[1:], strict=True)
    ]
    return draws[0], float(within[0]), max(by_chance)


@pytest.mark.parametrize(
    ("name", "num_steps", "options"),
    [
        ("ddpm", 400, {}),
        ("ddpm", 400, {"variance": "beta"}),
        ("ddim", 200, {}),
        ("ddim", 200, {"eta": 0.5}),
        ("euler", 200, {}),
        ("euler_ancestral", 400, {}),
        ("heun", 40, {}),
        ("heun", 60, {"S_churn": 10.0}),
        ("dpmpp_2s_ancestral", 80, {}),
        ("dpmpp_2m", 50, {}),
        ("dpmpp_2m_sde", 100, {}),
        ("unipc", 40, {}),
        ("rk45", 2, {"rtol": 1e-3, "atol": 1e-3}),
    ],
)
def test_the_mixture_comes_out_right(name, num_steps, options):
    """At an N where halving the step changes mean and covariance by less than the sampling error."""
    exact, n = mixture(), NUM_SAMPLES
    true, within, by_chance = reference()

    def draw(steps):
        generator = torch.Generator().manual_seed(0)
        ramp = torch.linspace(20 ** (1 / 7), 0.005 ** (1 / 7), steps, dtype=torch.float64) ** 7
        noise = lambda x: torch.randn(x.shape, dtype=x.dtype, generator=generator)  # noqa: E731
        x = 20 * noise(torch.empty(n, 2, dtype=torch.float64))
        return SAMPLERS[name].function(exact, x, torch.cat([ramp, ramp.new_zeros(1)]), noise=noise, **options)

    centred = true - true.mean(0)
    error_mean, error_cov = true.std(0) / n**0.5, (centred[:, :, None] * centred[:, None]).std(0) / n**0.5
    samples, halved = draw(num_steps), draw(2 * num_steps)
    bound = 4 * 2**0.5 if SAMPLERS[name].stochastic or options else 1.0
    assert bool(((samples.mean(0) - halved.mean(0)).abs() < bound * error_mean).all())
    assert bool(((samples.T.cov() - halved.T.cov()).abs() < bound * error_cov).all())
    assert bool(((samples.mean(0) - exact.weights @ exact.means).abs() < 4 * error_mean).all())
    assert bool(((samples.T.cov() - true.T.cov()).abs() < 4 * 2**0.5 * error_cov).all())
    energy_distance = float(2 * torch.cdist(samples, true).mean() - torch.cdist(samples, samples).mean()) - within
    assert energy_distance < 1.5 * by_chance
