"""The consistency loss against the true map: of a Gaussian in closed form, of a mixture in the plane by rk45.

The true map leads each point of the ODE's path to its end. At it the loss vanishes for pairs on the exact path, falls
with the order of the step for pairs by a teacher's step, and has no mean gradient for pairs of the same draw.
"""

import math

import numpy as np
import pytest
import torch
from helpers.exact import PREDICTIONS
from torch import nn

from diffusion_lit.diffusion import (
    Denoiser,
    EDMPreconditioning,
    FlowPreconditioning,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    LogNormal,
    X0Preconditioning,
    rk45,
)
from diffusion_lit.diffusion.consistency_loss import ConsistencyLoss, ContinuousConsistencyLoss, check_boundary
from diffusion_lit.diffusion.consistency_parts import (
    Gap,
    InverseGap,
    PairWeight,
    PathPoint,
    PseudoHuber,
    ShrinkingGrid,
    ShrinkingRatio,
    SquaredDistance,
    TeacherStep,
)
from diffusion_lit.nets import UNet

MEAN, VARIANCE = torch.tensor([0.3, -0.5], dtype=torch.float64), torch.tensor([0.25, 0.09], dtype=torch.float64)
GAUSSIAN = GaussianDenoiser(MEAN, VARIANCE)
MIXTURE = GaussianMixtureDenoiser(
    torch.tensor([0.5, 0.3, 0.2]),
    torch.tensor([[0.8, 0.1], [-0.5, 0.6], [-0.2, -0.7]], dtype=torch.float64),
    torch.tensor([0.05, 0.10, 0.08]),
)
LEVELS = (0.3, 1.0, 4.0)


def column(t):
    return t[:, None] if t.ndim else t


def gaussian_map(x, t):
    return MEAN + (VARIANCE / (VARIANCE + column(t) ** 2)).sqrt() * (x - MEAN)


def mixture_map(x, t, tolerance=1e-9):
    """The end of the path from x; one level for the whole batch, or one for each row."""
    made = torch.empty_like(x)
    for level in t.unique().tolist():
        rows = t.expand(len(x)) == level
        grid = torch.tensor([level, 1e-4, 0.0] if level > 1e-4 else [level, 0.0], dtype=torch.float64)
        made[rows] = rk45(MIXTURE, x[rows], grid, rtol=tolerance, atol=tolerance)
    return made


WORLDS = {"gaussian": (GAUSSIAN, gaussian_map), "mixture": (MIXTURE, mixture_map)}


class TrueMap:
    """The true map as a denoiser, and with `theta` (B, K) a map that differs by features that vanish at level 0."""

    scaling = EDMPreconditioning()

    def __init__(self, function, theta=None):
        self.function, self.theta = function, theta

    def __call__(self, x, sigma, label=None, augment=None):
        made = self.function(x, sigma)
        if self.theta is not None:
            c_out = self.scaling.coefficients(sigma)[1][:, None]
            inner = x * self.scaling.coefficients(sigma)[2][:, None]
            features = torch.stack([torch.ones_like(x), inner, inner.flip(1), inner.tanh() ** 2], dim=1)  # (B, 4, 2)
            made = made + c_out * torch.einsum("bk,bkd->bd", self.theta, features)
        return made


class Share(Gap):
    """r at a fixed share of t."""

    def __init__(self, share):
        self.share = share

    def __call__(self, t, progress):
        return self.share * t


def pairs(world, count, seed=0, levels=LEVELS):
    generator = torch.Generator().manual_seed(seed)
    x0 = WORLDS[world][0].sample(count, generator)[0]
    t = torch.tensor(levels, dtype=torch.float64)[torch.arange(count) % len(levels)]
    return x0, t, torch.randn(x0.shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("world", WORLDS)
def test_on_the_exact_path_the_loss_of_the_true_map_vanishes(world):
    exact, function = WORLDS[world]

    class OnThePath(PathPoint):
        def __call__(self, x, x0, noise, t, r, label, augment):
            made = torch.empty_like(x)
            for level in LEVELS:
                rows = t == level
                grid = torch.tensor([level, float(r[rows][0])], dtype=torch.float64)
                made[rows] = rk45(exact, x[rows], grid, rtol=1e-10, atol=1e-10)
            return made

    x0, t, noise = pairs(world, 30)
    for share in (0.9, 0.5, 0.01):
        loss = ConsistencyLoss(Share(share), OnThePath(), SquaredDistance(), PairWeight())
        assert float(loss(TrueMap(function), x0, t, noise).max()) < 1e-14
        assert float(loss(TrueMap(exact), x0, t, noise).max()) > 1e-4, "a posterior mean is no consistency model"


@pytest.mark.parametrize("world", WORLDS)
def test_by_a_teachers_step_it_falls_with_the_order_of_heuns_method(world):
    """One step of length h is off by h^3."""
    exact, function = WORLDS[world]
    x0, t, noise = pairs(world, 60)
    gaps = np.array([0.2, 0.1, 0.05])
    errors = [
        float(
            ConsistencyLoss(Share(1 - gap), TeacherStep(exact), SquaredDistance(), PairWeight())(
                TrueMap(function), x0, t, noise
            )
            .mean()
            .sqrt()
        )
        for gap in gaps
    ]
    assert abs(np.polyfit(np.log(gaps), np.log(errors), 1)[0] - 3) < 0.35, errors


def mean_gradient(world, loss, count):
    """Mean gradient with respect to theta at the true map, and its standard error, both (4,)."""
    x0, t, noise = pairs(world, count)
    theta = torch.zeros(count, 4, dtype=torch.float64, requires_grad=True)
    loss(TrueMap(WORLDS[world][1], theta), x0, t, noise).sum().backward()
    return theta.grad.mean(0), theta.grad.std(0) / count**0.5


@pytest.mark.parametrize("world", WORLDS)
def test_for_pairs_of_the_same_draw_the_true_map_has_no_mean_gradient(world):
    """A single draw keeps the spread of the velocity, so that the gradient vanishes in the mean alone."""
    count = 30_000 if world == "gaussian" else 6_000
    mean, error = mean_gradient(world, ConsistencyLoss(Share(0.999), None, SquaredDistance()), count)
    assert bool((mean.abs() < 4 * error).all()), mean / error
    assert bool((error > 0).all())


def test_pseudo_huber_moves_the_minimum_where_the_velocity_is_skewed():
    """A root weighs a difference by its own inverse; on the mixture that leaves a mean gradient of several errors."""
    squared = mean_gradient("mixture", ConsistencyLoss(Share(0.999), None, SquaredDistance()), 6_000)
    huber = mean_gradient("mixture", ConsistencyLoss(Share(0.999), None, PseudoHuber(1e-6)), 6_000)
    assert float((squared[0] / squared[1]).abs().max()) < 4
    assert float((huber[0] / huber[1]).abs().max()) > 4
    share = (huber[0].abs() / (huber[1] * 6_000**0.5)).max()  # of the spread of single gradients
    assert 0.03 < float(share) < 0.5, share


def test_a_teacher_is_guided_and_told_of_the_augmentation_row_by_row():
    """Its point is Heun's step along D(null) + 3 (D(label) - D(null)), each with the augmentation of its image."""
    torch.manual_seed(0)
    net = UNet(1, 8, 3, model_channels=16, channel_mult=(1,), num_blocks=1, augment_dim=9)
    for parameter in net.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    denoiser = Denoiser(net, EDMPreconditioning())
    x, t, r = torch.randn(4, 1, 8, 8), torch.tensor([2.0, 1.0, 1.0, 0.5]), torch.tensor([1.0, 0.5, 0.0, 0.4])
    label, augment = torch.tensor([0, 2, 1, 3]), torch.randn(4, 9)  # 3 is the null class

    def slope(x, t):
        null = denoiser(x, t, torch.full_like(label, 3), augment=augment)
        guided = null + 3 * (denoiser(x, t, label, augment=augment) - null)
        return (x - guided) / t.view(-1, 1, 1, 1)

    with torch.no_grad():
        first, step = slope(x, t), (r - t).view(-1, 1, 1, 1)
        later = slope(x + step * first, r.clamp(min=0.1))
        expected = torch.where((r > 0).view(-1, 1, 1, 1), x + step * (first + later) / 2, x + step * first)
        teacher = TeacherStep(denoiser, 3.0)
        torch.testing.assert_close(teacher(x, x, x, t, r, label, augment), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(teacher.slope(x, x, x, t, label, augment), first, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(teacher.slope(x, x, x, t, label, None), first, atol=1e-2)
    with pytest.raises(ValueError, match="no classes to guide by; leave cfg_scale at 1"):
        TeacherStep(GaussianDenoiser(torch.zeros(1, 8, 8), 0.25), 3.0)


def small_net(dropout=0.0, seed=0):
    torch.manual_seed(seed)
    net = UNet(1, 8, 3, model_channels=16, channel_mult=(1,), num_blocks=1, dropout=dropout)
    for parameter in net.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return net


def test_loss_and_gradient_are_the_formula_of_the_papers():
    """t above r, the gradient through the upper estimate alone, 1 / (t - r), pseudo-Huber with c = 0.00054 sqrt(d)."""
    denoiser = Denoiser(small_net(), EDMPreconditioning())
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.rand(6, 1, 8, 8, generator=generator) * 2 - 1, torch.randn(6, 1, 8, 8, generator=generator)
    label, t = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([0.05, 0.3, 1.0, 3.0, 20.0, 80.0])
    stage = 4
    decay = (1 + 8 / (1 + t.exp())) / 2**5
    r = t * (1 - decay)
    upper = denoiser(x0 + t.view(-1, 1, 1, 1) * noise, t, label)
    with torch.no_grad():
        lower = denoiser(x0 + r.view(-1, 1, 1, 1) * noise, r, label)
    d = 64
    c = 0.00054 * math.sqrt(d)
    expected = (((upper - lower).flatten(1).norm(dim=1) ** 2 + c**2).sqrt() - c) / (t - r)
    made = ConsistencyLoss()(denoiser, x0, t, noise, label, progress=stage / 8)
    torch.testing.assert_close(made * math.sqrt(d), expected, rtol=1e-4, atol=1e-5)
    weights = list(denoiser.parameters())
    made = torch.autograd.grad(made.sum() * math.sqrt(d), weights)
    for mine, theirs in zip(made, torch.autograd.grad(expected.sum(), weights), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-3 * float(theirs.abs().max()))


def test_where_r_is_0_the_target_is_the_image_itself_and_no_network_is_called_at_0():
    denoiser = Denoiser(small_net(), EDMPreconditioning())
    x0, noise, t = torch.rand(3, 1, 8, 8), torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 5.0])
    loss = ConsistencyLoss(Share(0.0), None, SquaredDistance(), PairWeight())(denoiser, x0, t, noise)
    estimate = denoiser(x0 + t.view(-1, 1, 1, 1) * noise, t)
    torch.testing.assert_close(loss, (estimate - x0).square().mean((1, 2, 3)))
    teacher = TeacherStep(GaussianDenoiser(torch.zeros(1, 8, 8), 0.25))
    x = x0 + t.view(-1, 1, 1, 1) * noise
    made = teacher(x, x0, noise, t, torch.zeros(3), None, None)
    torch.testing.assert_close(made, GaussianDenoiser(torch.zeros(1, 8, 8), 0.25)(x, t))


def test_dropout_is_the_same_in_both_estimates_and_later_draws_are_not_moved():
    denoiser = Denoiser(small_net(dropout=0.5), EDMPreconditioning()).train()
    x0, noise, t = torch.rand(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.full((4,), 1.0)
    x = x0 + noise
    torch.manual_seed(3)
    denoiser(x, t)
    after = torch.rand(1)
    torch.manual_seed(3)
    loss = ConsistencyLoss(Share(1 - 1e-6), None, SquaredDistance(), PairWeight())(denoiser, x0, t, noise)
    assert torch.equal(torch.rand(1), after)
    assert float(loss.detach().max()) < 1e-8
    assert float((denoiser(x, t) - denoiser(x, t)).abs().max()) > 1e-2


def test_in_bf16_the_gradient_is_that_of_float32_up_to_rounding():
    """Autocast keeps cast weights, and those of a pass without gradients have none."""
    denoiser = Denoiser(small_net(), EDMPreconditioning())
    x0, noise, t = torch.rand(8, 1, 8, 8), torch.randn(8, 1, 8, 8), torch.linspace(0.3, 3, 8)
    loss, weights = ConsistencyLoss(Share(0.5)), [p for p in denoiser.parameters() if p.ndim > 1]

    def gradient():
        made = torch.autograd.grad(loss(denoiser, x0, t, noise).mean(), weights, allow_unused=True)
        pairs = zip(made, weights, strict=True)
        return torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for g, p in pairs])

    exact = gradient()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradient()
    assert float(torch.cosine_similarity(exact, rounded, dim=0)) > 0.98
    assert float(rounded.norm() / exact.norm()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_boundary_holds_or_the_prediction_type_is_refused_with_the_reason(prediction):
    scaling = PREDICTIONS[prediction][0]()
    if isinstance(scaling, X0Preconditioning):
        with pytest.raises(ValueError, match=r"c_skip\(0\) = 0 and c_out\(0\) = 1 instead of.*EDMPreconditioning"):
            check_boundary(scaling)
        return
    check_boundary(scaling)
    denoiser, x = Denoiser(small_net(), scaling).double(), torch.rand(2, 1, 8, 8, dtype=torch.float64)
    near = max(scaling.sigma_min, 1e-6)
    assert float((denoiser(x, near) - x).detach().abs().max()) < 20 * near


def test_below_the_trained_levels_the_lower_estimate_is_the_image():
    scaling = FlowPreconditioning()
    denoiser = Denoiser(small_net(), scaling)
    x0, noise, t = torch.rand(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor([0.0012, 2.0])
    loss = ConsistencyLoss(Share(0.5), None, SquaredDistance(), PairWeight())(denoiser, x0, t, noise)
    estimate = denoiser(x0[:1] + t[0] * noise[:1], t[:1])
    torch.testing.assert_close(loss[:1], (estimate - x0[:1]).square().mean((1, 2, 3)))


def test_the_gap_shrinks_over_the_training():
    t = torch.tensor([0.01, 0.5, 2.0, 80.0], dtype=torch.float64)
    for gap, stages in ((ShrinkingRatio(), 8), (ShrinkingGrid(), 8), (ShrinkingRatio(q=4, stages=4, first=1), 3)):
        made = torch.stack([t - gap(t, progress) for progress in np.linspace(0, 1, 4 * stages + 1)])
        assert bool((made > 0).all()) and bool((made <= t).all())
        assert bool((made.diff(dim=0) <= 1e-12).all())
        assert len(made[:, 3].unique()) == stages
    assert torch.equal(ShrinkingRatio()(t, 0.0)[:2], torch.zeros(2, dtype=torch.float64))
    grid = torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 11, dtype=torch.float64) ** 7
    torch.testing.assert_close(ShrinkingGrid()(grid[:-1], 0.0)[:-1], grid[1:-1], rtol=1e-9, atol=0)
    last = torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 1281, dtype=torch.float64) ** 7
    torch.testing.assert_close(ShrinkingGrid()(last[5:9], 1.0), last[6:10], rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShrinkingRatio(q=1), "q is 1; give a finite number above 1"),
        (lambda: ShrinkingRatio(stages=0), "stages is 0; give a whole number from 1"),
        (lambda: ShrinkingRatio(first=8), "first is 8, but there are 8 stages"),
        (lambda: ShrinkingRatio(k=-1), "k is -1; give"),
        (lambda: ShrinkingGrid(first=20, last=10), "last is 10; give a whole number from 20"),
        (lambda: ShrinkingGrid(sigma_max=0.001), "sigma_max is 0.001; give a finite number above 0.002"),
        (lambda: PseudoHuber(0.0), "c is 0.0; give a finite number above 0"),
        (lambda: TeacherStep(GAUSSIAN, float("nan")), "cfg_scale is nan; give"),
    ],
)
def test_a_bad_number_is_refused_in_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Plane(nn.Module):
    """A small network on the plane."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)
        )

    def forward(self, x, c_noise, label):
        return self.layers(torch.cat([x, c_noise[:, None]], dim=1))


@pytest.mark.parametrize(
    "loss",
    [
        ConsistencyLoss(ShrinkingRatio(stages=6), None, PseudoHuber(0.01)),
        pytest.param(ConsistencyLoss(ShrinkingRatio(stages=6), TeacherStep(MIXTURE)), marks=pytest.mark.slow),
        pytest.param(ContinuousConsistencyLoss(), marks=pytest.mark.slow),
    ],
    ids=["same draw", "teacher", "continuous"],
)
def test_a_small_network_learns_the_true_map(loss):
    """Its distance to the ends of the ODE's paths falls with training, far below that of the posterior mean."""
    torch.manual_seed(0)
    steps, generator = 900, torch.Generator().manual_seed(0)
    denoiser = Denoiser(Plane(), EDMPreconditioning())
    levels = LogNormal(-0.5, 1.2)
    x0, t, noise = pairs("mixture", 300, levels=(0.5, 2.0, 10.0))
    x = x0 + t[:, None] * noise
    ends = mixture_map(x, t, 1e-6)

    def error():
        with torch.no_grad():
            return float((denoiser(x.float(), t.float()) - ends).square().mean().sqrt())

    errors, optimizer = [error()], torch.optim.Adam(denoiser.parameters(), 3e-3)
    for step in range(steps):
        clean = MIXTURE.sample(128, generator)[0].float()
        drawn = torch.randn(clean.shape, generator=generator)
        made = loss(denoiser, clean, levels.sample(128, generator), drawn, progress=step / steps).mean()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, 2 * (1 - step / steps))
        optimizer.zero_grad()
        made.backward()
        optimizer.step()
        if step in (200, 500, steps - 1):
            errors.append(error())
    posterior_mean = float((MIXTURE(x, t) - ends).square().mean().sqrt())
    assert errors[0] > errors[1] > errors[-1], errors
    assert errors[-1] < 0.25 * posterior_mean, (errors, posterior_mean)


class Path(PathPoint):
    """The slope of the exact ODE."""

    def __init__(self, exact):
        self.exact = exact

    def slope(self, x, x0, noise, t, label, augment):
        return (x - self.exact(x, t)) / t[:, None]


def test_the_continuous_form_vanishes_at_the_true_map_and_its_derivative_is_that_of_finite_differences():
    x0, t, noise = pairs("gaussian", 200)
    loss = ContinuousConsistencyLoss(Path(GAUSSIAN))
    assert float(loss(TrueMap(gaussian_map), x0, t, noise).max()) < 1e-24
    assert float(loss(TrueMap(GAUSSIAN), x0, t, noise).min()) > 1e-3
    assert torch.equal(
        TeacherStep(GAUSSIAN).slope(x0, x0, noise, t, None, None), Path(GAUSSIAN).slope(*[x0] * 2, noise, t, None, None)
    )

    denoiser = Denoiser(small_net().double(), EDMPreconditioning())
    x0, noise = torch.rand(5, 1, 8, 8, dtype=torch.float64), torch.randn(5, 1, 8, 8, dtype=torch.float64)
    t, step = torch.tensor([0.05, 0.3, 1.0, 5.0, 40.0], dtype=torch.float64), 1e-5
    with torch.no_grad():
        ends = [denoiser(x0 + (t * (1 + s)).view(-1, 1, 1, 1) * noise, t * (1 + s)) for s in (step, -step)]
    c_out = denoiser.scaling.coefficients(t)[1].view(-1, 1, 1, 1)
    u = (ends[0] - ends[1]) / (2 * step) / c_out
    rms = u.square().mean((1, 2, 3), keepdim=True).sqrt()
    made = ContinuousConsistencyLoss()(denoiser, x0, t, noise)
    torch.testing.assert_close(made, (u / (rms + 0.1)).square().mean((1, 2, 3)), rtol=1e-6, atol=1e-9)

    weights = list(denoiser.parameters())
    estimate = denoiser(x0 + t.view(-1, 1, 1, 1) * noise, t)
    expected = torch.autograd.grad((2 * estimate / c_out * u / (rms + 0.1)).mean((1, 2, 3)).sum(), weights)
    for mine, theirs in zip(torch.autograd.grad(made.sum(), weights), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


def test_its_mean_gradient_at_the_true_map_vanishes_but_for_the_cut_of_large_derivatives():
    mean, error = mean_gradient("gaussian", ContinuousConsistencyLoss(c=1e6), 30_000)
    assert bool((mean.abs() < 4 * error).all()), mean / error


def test_the_weight_is_that_of_the_gap():
    t, r = torch.tensor([2.0, 0.5]), torch.tensor([1.5, 0.0])
    assert torch.equal(InverseGap()(t, r, EDMPreconditioning()), torch.tensor([2.0, 2.0]))
    assert torch.equal(PairWeight()(t, r, EDMPreconditioning()), torch.ones(2))
