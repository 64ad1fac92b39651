"""Prediction types against the table of formulas, against what they mean, and in every precision."""

import math

import pytest
import torch

from diffusion_lit.diffusion import (
    ContinuousVP,
    CosineSchedule,
    EDMPreconditioning,
    EpsPreconditioning,
    FlowPreconditioning,
    LinearSchedule,
    Preconditioning,
    VPreconditioning,
    X0Preconditioning,
)

SCHEDULE = LinearSchedule()
SIGMAS = torch.logspace(-1.9, 2.1, 50, dtype=torch.float64)

# Each formula as the papers write it, in Python's floats: (c_skip, c_out, c_in, c_noise) of one sigma s.
TABLE = {
    "edm": (
        EDMPreconditioning(0.7),
        lambda s: (
            0.49 / (s * s + 0.49),
            s * 0.7 / math.sqrt(s * s + 0.49),
            1 / math.sqrt(s * s + 0.49),
            math.log(s) / 4,
        ),
    ),
    "eps": (EpsPreconditioning(SCHEDULE), lambda s: (1, -s, 1 / math.sqrt(1 + s * s), None)),
    "x0": (X0Preconditioning(SCHEDULE), lambda s: (0, 1, 1 / math.sqrt(1 + s * s), None)),
    "x0 flow": (X0Preconditioning(), lambda s: (0, 1, 1 / (1 + s), s / (1 + s))),
    "v": (
        VPreconditioning(SCHEDULE),
        lambda s: (1 / (1 + s * s), -s / math.sqrt(1 + s * s), 1 / math.sqrt(1 + s * s), None),
    ),
    "flow": (FlowPreconditioning(), lambda s: (1 / (1 + s), -s / (1 + s), 1 / (1 + s), s / (1 + s))),
}
EVERY = pytest.mark.parametrize("name", TABLE)


@EVERY
def test_coefficients_are_the_papers(name):
    scaling, formula = TABLE[name]
    for sigma in SIGMAS:
        for got, expected in zip(scaling(sigma), formula(float(sigma)), strict=True):
            if expected is not None:
                assert float(got) == pytest.approx(expected, rel=1e-12)


@EVERY
def test_the_right_target_gives_back_the_image(name):
    """With n, x0, v or n - x0 for the network's output, and EDM's target solved for, D is x0: signs and all."""
    scaling, _ = TABLE[name]
    generator = torch.Generator().manual_seed(0)
    x0, n = torch.randn(2, 50, dtype=torch.float64, generator=generator)
    s = SIGMAS
    alpha_bar = 1 / (1 + s**2)
    targets = {
        "edm": (x0 - 0.49 / (s**2 + 0.49) * (x0 + s * n)) * (s**2 + 0.49).sqrt() / (s * 0.7),
        "eps": n,
        "x0": x0,
        "x0 flow": x0,
        "v": alpha_bar.sqrt() * n - (1 - alpha_bar).sqrt() * x0,
        "flow": n - x0,
    }
    c_skip, c_out, _, _ = scaling(s)
    torch.testing.assert_close(c_skip * (x0 + s * n) + c_out * targets[name], x0, rtol=1e-9, atol=1e-9)


@EVERY
def test_the_network_sees_the_image_of_its_path(name):
    """c_in takes x0 + s n to sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) n, to (1 - t) x0 + t n, or to unit variance."""
    scaling, _ = TABLE[name]
    c_in = scaling(SIGMAS)[2]
    if name == "edm":
        torch.testing.assert_close(c_in**2 * (0.7**2 + SIGMAS**2), torch.ones_like(SIGMAS))
    elif "flow" in name:
        torch.testing.assert_close(c_in * 1 + c_in * SIGMAS, torch.ones_like(SIGMAS))
        torch.testing.assert_close(c_in * SIGMAS, scaling(SIGMAS)[3])
    else:
        torch.testing.assert_close(c_in**2 + (c_in * SIGMAS) ** 2, torch.ones_like(SIGMAS))


def test_edm_target_has_unit_variance_and_least_amplification():
    scaling = EDMPreconditioning(0.7)
    c_skip, c_out, _, _ = scaling(SIGMAS)

    def target_scale(skip):  # standard deviation of x0 - skip (x0 + s n), which c_out has to undo
        return ((1 - skip) ** 2 * 0.49 + skip**2 * SIGMAS**2).sqrt()

    torch.testing.assert_close(target_scale(c_skip) / c_out, torch.ones_like(SIGMAS))
    assert bool((target_scale(c_skip) < target_scale(c_skip + 1e-3)).all())
    assert bool((target_scale(c_skip) < target_scale(c_skip - 1e-3)).all())


@pytest.mark.parametrize("kind", [EpsPreconditioning, VPreconditioning, X0Preconditioning])
@pytest.mark.parametrize("T", [300, 4000])
def test_networks_on_a_schedule_are_told_the_step(kind, T):
    schedule = CosineSchedule(T)
    t = torch.tensor([0, 1, T // 2, T - 1])
    c_noise = kind(schedule)(schedule.sigmas[t].float())[3]
    torch.testing.assert_close(c_noise, t.float(), rtol=0, atol=1e-2)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (5,)])
def test_shapes_and_precision(name, dtype, shape):
    scaling, _ = TABLE[name]
    sigma = torch.full(shape, 2.5, dtype=dtype)
    for coefficient in scaling(sigma):
        assert coefficient.shape == shape
        assert coefficient.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("sigma", [0.0101, 1.0, 157.0])
@EVERY
def test_single_precision_loses_only_rounding(name, sigma):
    scaling, _ = TABLE[name]
    single = torch.tensor(sigma)
    for got, exact in zip(scaling(single), scaling(single.double()), strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)


def test_single_precision_at_the_end_of_a_cosine_chain():
    scaling = VPreconditioning(CosineSchedule(4000))
    single = torch.tensor(scaling.sigma_max).float()
    c_skip, c_out, c_in, _ = scaling(single)
    assert float(c_skip) == pytest.approx(1 / (1 + float(single) ** 2), rel=1e-6)
    assert float(c_in) == pytest.approx(1 / float(single), rel=1e-6)
    assert float(c_out) == pytest.approx(-1, rel=1e-6)


def test_supports_and_paths():
    assert (EDMPreconditioning().sigma_min, EDMPreconditioning().sigma_max) == (0, math.inf)
    assert EDMPreconditioning().sampling_range == (0.002, 80)
    for scaling in (EpsPreconditioning(SCHEDULE), VPreconditioning(SCHEDULE), X0Preconditioning(SCHEDULE)):
        assert (scaling.sigma_min, scaling.sigma_max) == (SCHEDULE.sigma_min, SCHEDULE.sigma_max)
        assert scaling.variance_preserving and scaling.schedule is SCHEDULE
    for scaling in (FlowPreconditioning(), X0Preconditioning()):
        assert scaling.sigma_min == pytest.approx(1 / 999) and scaling.sigma_max == pytest.approx(999)
        assert not scaling.variance_preserving and scaling.schedule is None
    assert not EDMPreconditioning().variance_preserving
    continuous = EpsPreconditioning(ContinuousVP())
    assert continuous.sampling_range[0] > continuous.sigma_min


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.inf, math.nan, 1e-3, 200.0])
def test_a_sigma_outside_the_support_is_refused(sigma):
    scaling = EpsPreconditioning(SCHEDULE)
    with pytest.raises(
        ValueError, match=r"outside the noise levels that EpsPreconditioning is trained on, 0\.01.* to 157"
    ):
        scaling(torch.tensor([1.0, sigma]))
    with pytest.raises(ValueError, match="outside"):
        scaling(sigma)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.inf, math.nan])
def test_open_ends_of_a_support_are_refused(sigma):
    with pytest.raises(ValueError, match="outside"):
        EDMPreconditioning()(torch.tensor(sigma))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_edges_of_a_support_survive_rounding(dtype):
    for scaling in (EpsPreconditioning(SCHEDULE), FlowPreconditioning()):
        c = scaling(torch.tensor([scaling.sigma_min, scaling.sigma_max], dtype=dtype))
        assert all(bool(part.isfinite().all()) for part in c)


def test_clamp_moves_to_the_edges():
    scaling = EpsPreconditioning(SCHEDULE)
    moved = scaling.clamp(torch.tensor([1e-5, 1.0, 1e5]))
    torch.testing.assert_close(moved, torch.tensor([SCHEDULE.sigma_min, 1.0, SCHEDULE.sigma_max]))
    scaling(moved)
    levels = torch.tensor([1e-5, 1e5])
    assert torch.equal(EDMPreconditioning().clamp(levels), levels)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="sigma_data is 0"):
        EDMPreconditioning(0.0)
    with pytest.raises(TypeError, match="abstract"):
        Preconditioning((0.1, 1.0))
