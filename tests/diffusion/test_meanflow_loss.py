"""MeanFlow against exact maps: of a Gaussian in closed form, of a two-dimensional mixture by integrating its ODE.

The network under test is the true average velocity, so that the loss, its target and its gradient can be checked
without training: with the mixture's own velocity the residual vanishes, with sampled pairs the mean gradient does.
"""

import pytest
import torch
from helpers.average_velocity import OfGaussian, OfMixture, gaussian, mixture, on_the_path
from torch import nn

from diffusion_lit.diffusion import (
    AdaptiveWeight,
    Conditioned,
    Denoiser,
    EDMPreconditioning,
    FlowPreconditioning,
    LevelPairs,
    LogitNormal,
    MeanFlowLoss,
    PredictionWeight,
    SeededNoise,
    TrainingGuidance,
    UniformT,
    X0Preconditioning,
    meanflow,
    rk45,
)
from diffusion_lit.diffusion.meanflow_loss import directional_derivative, mean_flow_target
from diffusion_lit.nets import DiT, UNet

PLAIN = MeanFlowLoss(PredictionWeight())
EXACT = {"gaussian": (gaussian(), OfGaussian, 1e-12), "mixture": (mixture(), OfMixture, 1e-7)}


def pairs(count, seed=0, equal=0.4):
    return LevelPairs(equal=equal).sample(count, torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize(("name", "scaling"), [("gaussian", X0Preconditioning()), ("mixture", FlowPreconditioning())])
def test_with_the_exact_velocity_the_residual_at_the_true_map_vanishes(name, scaling):
    """x0 and n are chosen so that n - x0 is the velocity of the ODE at the noisy image; a map off by 1% shows."""
    exact, velocity, rounding = EXACT[name]
    levels, gives_x0 = pairs(24), isinstance(scaling, X0Preconditioning)
    x, clean, noise = on_the_path(exact, levels[:, 0])
    right = Denoiser(velocity(gives_x0=gives_x0), scaling)
    assert float(PLAIN(right, clean, levels, noise).sqrt().max()) < rounding
    moving = levels[:, 1] < levels[:, 0]
    wrong = Denoiser(velocity(gives_x0=gives_x0, factor=1.01), scaling)
    assert float(PLAIN(wrong, clean, levels, noise).sqrt()[moving].min()) > 1e-5
    # the map that the mixture is held against is the end of its own ODE
    ends = [
        rk45(exact, row[None], pair, rtol=1e-10, atol=1e-10)
        for row, pair in zip(x[moving], levels[moving], strict=True)
    ]
    torch.testing.assert_close(
        right(x, levels[:, 0], until=levels[:, 1])[moving], torch.cat(ends), rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize("mix", [0.0, 0.4])
def test_guidance_in_training_makes_the_guided_map_the_solution(mix):
    """The network holds the map of D(null) + 1.7 (D(label) - D(null)) for labels and the plain one without."""
    exact, levels, scale = mixture(), pairs(24), 1.7
    label = torch.arange(24) % (exact.num_classes + 1)
    denoiser = Denoiser(OfMixture(steps=40, cfg_scale=scale), FlowPreconditioning())
    _, clean, noise = on_the_path(exact, levels[:, 0], label)
    loss = MeanFlowLoss(PredictionWeight(), TrainingGuidance(scale, mix))
    assert float(loss(denoiser, clean, levels, noise, label).sqrt().max()) < 1e-4  # of the integration
    plain = PLAIN(denoiser, clean, levels, noise, label)
    assert float(plain.sqrt().max()) > 1e-2
    nowhere = MeanFlowLoss(PredictionWeight(), TrainingGuidance(scale, mix, interval=(0.0, 1e-6)))
    torch.testing.assert_close(nowhere(denoiser, clean, levels, noise, label), plain)
    with pytest.raises(ValueError, match="model with classes"):
        loss(denoiser, clean, levels, noise)


class Disturbed(nn.Module):
    """The true average velocity plus features of (z, t, r) times coefficients, one set for each sample."""

    takes_until = True

    def __init__(self, net, count):
        super().__init__()
        self.net = net
        self.coefficients = nn.Parameter(torch.zeros(count, 6, dtype=torch.float64))

    def forward(self, z, t, label=None, *, until):
        t, r = t.view(-1, 1, 1, 1), until.view(-1, 1, 1, 1)
        one = torch.ones_like(z)
        features = torch.stack([one, z, z * t, one * (t - r), torch.tanh(2 * z) * r, z.flip(1)], dim=1)
        return self.net(z, t.flatten(), label, until=until) + (
            self.coefficients[:, :, None, None, None] * features
        ).sum(1)


def gradients(name, loss, count=3000):
    """The gradient of each sample's loss at the true map, with sampled x0 and noise; shape (count, 6)."""
    exact, velocity, _ = EXACT[name]
    generator = torch.Generator().manual_seed(3)
    x0, _ = exact.sample(count, generator)
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    levels = LevelPairs(equal=0.0).sample(count, generator).double()
    net = Disturbed(velocity(**({"steps": 30} if name == "mixture" else {})), count)
    loss(Denoiser(net, FlowPreconditioning()), x0, levels, noise).sum().backward()
    return net.coefficients.grad


@pytest.mark.parametrize("name", EXACT)
def test_with_sampled_pairs_the_mean_gradient_at_the_true_map_is_zero(name):
    """Within 4 standard errors under the squared distance; adaptive weights bias it, as docs/concepts.md says."""
    plain = gradients(name, PLAIN)
    errors = plain.mean(0) / (plain.std(0) / len(plain) ** 0.5)
    assert float(errors.abs().max()) < 4, errors
    assert float(plain.std(0).min()) > 1e-3  # each has a gradient that could have been far from zero
    if name == "mixture":
        adaptive = gradients(name, MeanFlowLoss(AdaptiveWeight()))
        biased = adaptive.mean(0) / (adaptive.std(0) / len(adaptive) ** 0.5)
        assert float(biased.abs().max()) > 5, biased


def test_the_target_is_held_fixed():
    """The gradient is that of the squared distance to the target as numbers."""
    torch.manual_seed(0)
    net = UNet(2, 8, 0, 8, (1,), 1, noise_embedding="fourier", takes_until=True)
    disturb(net)
    denoiser = Denoiser(net, FlowPreconditioning())
    x0, noise, levels = torch.randn(6, 2, 8, 8), torch.randn(6, 2, 8, 8), pairs(6, equal=0.0).float()
    sigma, until = levels.unbind(1)
    x = x0 + sigma.view(-1, 1, 1, 1) * noise
    target = mean_flow_target(denoiser, x, sigma, until, x0)
    assert not target.requires_grad
    by_hand = (denoiser.average(x, sigma, until) - target) / (sigma / (1 + sigma)).view(-1, 1, 1, 1)
    grads = [
        torch.autograd.grad(loss, list(net.parameters()))
        for loss in (PLAIN(denoiser, x0, levels, noise).mean(), by_hand.square().mean())
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)


def disturb(net):
    """Moves the parts that start at zero off it, so that everything has an effect."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


NETS = {
    "unet": lambda: UNet(2, 8, 3, 8, (1, 2), 1, (4,), (8,), noise_embedding="fourier", takes_until=True),
    "unet ddpm++": lambda: UNet(
        2, 8, 3, 8, (1, 2), 1, (-1,), noise_embedding="positional", adaptive_scale=False, resample="block",
        resample_filter=(1, 3, 3, 1), skip_scale=0.7, takes_until=True
    ),
    "dit": lambda: DiT(2, 8, 3, 2, 16, 2, 2, noise_embedding="fourier", takes_until=True),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_the_derivative_is_that_of_finite_differences(name):
    torch.manual_seed(0)
    net = NETS[name]().double()
    disturb(net)
    denoiser = Denoiser(net, FlowPreconditioning())
    x, step = torch.randn(2, 3, 2, 8, 8, dtype=torch.float64)
    sigma, rate, until = torch.tensor([[0.3, 1.0, 5.0], [0.7, -1.0, 2.0], [0.1, 0.0, 2.0]], dtype=torch.float64)
    label, h = torch.tensor([0, 2, 3]), 1e-5

    def average(x, sigma):
        return denoiser.average(x, sigma, until, label)

    value, slope = directional_derivative(average, (x, sigma), (step, rate))
    with torch.no_grad():
        differences = (average(x + h * step, sigma + h * rate) - average(x - h * step, sigma - h * rate)) / (2 * h)
        torch.testing.assert_close(value, average(x, sigma), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slope, differences, rtol=1e-6, atol=1e-8)
    assert not slope.requires_grad
    with torch.inference_mode():  # validation runs in it
        torch.testing.assert_close(directional_derivative(average, (x.clone(), sigma.clone()), (step, rate))[1], slope)


def test_dropout_draws_the_same_masks_in_both_passes():
    torch.manual_seed(0)
    net = UNet(2, 8, 0, 16, (1,), 1, dropout=0.4, noise_embedding="fourier", takes_until=True).train()
    disturb(net)
    masks = []
    for part in net.modules():
        if isinstance(part, nn.Dropout):
            part.register_forward_hook(lambda part, inputs, output: masks.append((output == 0) & (inputs[0] != 0)))
    denoiser, levels = Denoiser(net, FlowPreconditioning()), pairs(5).float()
    assert 0 < int((levels[:, 1] < levels[:, 0]).sum()) < 5  # the others must not shift the masks
    for autocast in (False, True):
        masks.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = PLAIN(denoiser, torch.randn(5, 2, 8, 8), levels, torch.randn(5, 2, 8, 8)).mean()
        loss.backward()
        half = len(masks) // 2
        assert half == 5  # one for each block, in each pass
        assert all(torch.equal(one, other) for one, other in zip(masks[:half], masks[half:], strict=True))
        assert not torch.equal(masks[0], masks[1])
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())


def test_only_samples_whose_step_has_a_length_cost_a_derivative():
    calls = []

    class Spy(OfMixture):
        def forward(self, z, t, label=None, *, until=None):
            calls.append(len(z))
            return super().forward(z, t, label, until=until)

    exact, levels = mixture(), pairs(10)
    denoiser = Denoiser(Spy(steps=20), FlowPreconditioning())
    _, clean, noise = on_the_path(exact, levels[:, 0])
    PLAIN(denoiser, clean, levels, noise)
    assert calls == [int((levels[:, 1] < levels[:, 0]).sum()), 10]
    calls.clear()
    torch.testing.assert_close(PLAIN(denoiser, clean, levels[:, 0], noise), torch.zeros(10, dtype=torch.float64))
    assert calls == [10]


def test_pairs_are_two_draws_in_order():
    levels = LevelPairs(LogitNormal(0.5, 0.8), equal=0.3).sample(20000, torch.Generator().manual_seed(0))
    sigma, until = levels.unbind(1)
    equal = sigma == until
    assert levels.shape == (20000, 2) and bool((until <= sigma).all())
    assert abs(float(equal.double().mean()) - 0.3) < 0.02
    # the larger of two normals lies 1 / sqrt(pi) deviations above their mean, the smaller as far below
    for value, sign in ((sigma, 1), (until[~equal], -1)):
        assert abs(float(value.log().mean()) - (0.5 + sign * 0.8 / torch.pi**0.5)) < 0.03
    assert (LevelPairs().levels.mean, LevelPairs().levels.std, LevelPairs().equal) == (-0.4, 1.0, 0.75)  # the source's
    with pytest.raises(ValueError, match="equal"):
        LevelPairs(equal=1.2)


def test_the_adaptive_weight_scales_the_gradient_and_leaves_the_value():
    error = torch.tensor([4.0, 0.01], requires_grad=True)
    weighted = AdaptiveWeight(0.5, 0.001)(error, torch.tensor([1.0, 3.0]), FlowPreconditioning())
    plain = error.detach() / torch.tensor([0.25, 0.5625])  # / t^2, the error of the velocity
    torch.testing.assert_close(weighted, plain, check_stride=False)
    weighted.sum().backward()
    torch.testing.assert_close(error.grad, 1 / torch.tensor([0.25, 0.5625]) / (plain + 0.001).sqrt())
    for options, words in (({"power": -1.0}, "power"), ({"floor": 0.0}, "floor")):
        with pytest.raises(ValueError, match=words):
            AdaptiveWeight(**options)
    for options, words in (({"cfg_scale": 0.0}, "cfg_scale"), ({"cfg_scale": 2.0, "mix": 1.0}, "mix")):
        with pytest.raises(ValueError, match=words):
            TrainingGuidance(**options)


@pytest.mark.parametrize("name", EXACT)
def test_on_the_true_map_one_step_ends_where_the_ode_ends(name):
    exact, velocity, _ = EXACT[name]
    denoise = Conditioned(Denoiser(velocity(), FlowPreconditioning()))
    start = 50 * SeededNoise(range(4))(torch.empty(4, 2, 1, 1, dtype=torch.float64))
    expected = rk45(exact, start, torch.tensor([50.0, 1e-5]), rtol=1e-10, atol=1e-10)
    seen = []
    for levels in ([50.0, 0.0], [50.0, 1.0, 0.0], [50.0, 7.0, 0.9, 0.1, 0.0]):
        end = meanflow(denoise, start, torch.tensor(levels), callback=lambda *step: seen.append(step))
        torch.testing.assert_close(end, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(seen[0][2], meanflow(denoise, start, torch.tensor([50.0, 0.0])))  # x0_hat of the only step
    assert [step[0] for step in seen] == [0, 0, 1, 0, 1, 2, 3]
    # sample 2 alone is sample 2 of the batch
    torch.testing.assert_close(
        meanflow(denoise, start[2:3], torch.tensor([50.0, 1.0, 0.0])), expected[2:3], rtol=1e-4, atol=1e-4
    )
    for bad, words in ((denoise, "rising grid"), (Denoiser(nn.Conv2d(2, 2, 1), EDMPreconditioning()), "takes_until")):
        with pytest.raises(ValueError, match=words):
            meanflow(bad, start, torch.tensor([1.0, 50.0]))


class Perceptron(nn.Module):
    """A small network on two numbers and two times."""

    takes_until = True

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, z, t, label=None, *, until=None):
        way = t - (t if until is None else until)
        times = torch.stack([t, way, (3 * t).sin(), (3 * way).sin()], dim=1)
        return self.layers(torch.cat([z.flatten(1), times], dim=1)).reshape(z.shape)


def test_a_small_network_approaches_the_true_map():
    """The error of one step against the end points of the ODE falls with training."""
    torch.manual_seed(0)
    exact, net, generator = mixture(), Perceptron(), torch.Generator().manual_seed(1)
    denoiser, levels = Denoiser(net, FlowPreconditioning()), LevelPairs(UniformT(), equal=0.25)
    optimizer = torch.optim.Adam(net.parameters())
    start = 19 * torch.randn(256, 2, 1, 1, generator=generator)
    ends = rk45(exact, start.double(), torch.tensor([19.0, 1e-4]), rtol=1e-7, atol=1e-7)

    @torch.no_grad()
    def error():
        return float((meanflow(denoiser, start, torch.tensor([19.0, 0.0])) - ends).square().mean().sqrt())

    errors = [error()]
    for step in range(600):
        x0 = exact.sample(256, generator)[0].float()
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 600)
        optimizer.zero_grad()
        PLAIN(denoiser, x0, levels.sample(256, generator), torch.randn(x0.shape, generator=generator)).mean().backward()
        optimizer.step()
        if step in (99, 599):
            errors.append(error())
    assert errors[2] < 0.75 * errors[1] < 0.75 * 0.8 * errors[0] and errors[2] < 0.2, errors
    # without being told where to go, one step ends at the mean of the data
    with torch.no_grad():
        assert float((denoiser(start, 19.0) - ends).square().mean().sqrt()) > 0.5


def test_single_precision_is_enough_at_both_ends():
    """The derivative runs in x and sigma, whose rates reach 10^6 where the flow time nears 1."""
    torch.manual_seed(0)
    net = UNet(2, 8, 0, 8, (1,), 1, noise_embedding="fourier", takes_until=True).double()
    disturb(net)
    levels = torch.tensor([[999.0, 0.001], [999.0, 500.0], [0.0011, 0.00101], [1.0, 0.001]], dtype=torch.float64)
    sigma, until = levels.unbind(1)
    x0, noise = torch.randn(2, 4, 2, 8, 8, dtype=torch.float64)
    x = x0 + sigma.view(-1, 1, 1, 1) * noise
    exact = mean_flow_target(Denoiser(net, FlowPreconditioning()), x, sigma, until, x0)
    single = mean_flow_target(
        Denoiser(net.float(), FlowPreconditioning()), *(value.float() for value in (x, sigma, until, x0))
    )
    torch.testing.assert_close(single.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_compiled_network_has_the_same_derivative():
    """Compiled kernels drop the derivative without an error, so that the network must run uncompiled for it."""
    torch.manual_seed(0)
    denoiser = Denoiser(Perceptron(), FlowPreconditioning())
    x, sigma = torch.randn(3, 2, 1, 1), torch.tensor([1.0, 2.0, 3.0])

    def slope():
        return directional_derivative(lambda x, sigma: denoiser.average(x, sigma, sigma / 3), (x, sigma), (x, sigma))[1]

    before = slope()
    denoiser.net.compile()
    with torch.no_grad():
        denoiser.average(x, sigma, sigma / 3)
    assert float(before.abs().max()) > 0.1
    torch.testing.assert_close(slope(), before)
