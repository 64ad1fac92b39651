"""Losses and gradients against the papers' formulas, written out here; the bound against torch's KL and CDF."""

import itertools
import math

import jsonargparse
import pytest
import torch
from helpers.tiny_net import TinyNet
from torch import nn

from diffusion_lit.diffusion import (
    ContinuousVP,
    CosineSchedule,
    Denoiser,
    DenoisingLoss,
    EDMPreconditioning,
    EpsPreconditioning,
    FlowPreconditioning,
    HybridLoss,
    LearnedUncertainty,
    LearnedVarianceDenoiser,
    LinearSchedule,
    LogNormal,
    LossWeight,
    MinSNR,
    NoiseLevels,
    Preconditioning,
    PredictionWeight,
    UnitWeight,
    VPreconditioning,
    X0Preconditioning,
)
from diffusion_lit.diffusion.normal import discretised_gaussian_nll, gaussian_kl

SCHEDULE = LinearSchedule(300)
LABEL = torch.tensor([0, 1, 2, 3])
STEPS = torch.tensor([0, 5, 120, 299])
BETAS = torch.linspace(1e-4, 0.02, 300, dtype=torch.float64) * 1000 / 300
ALPHA_BAR = torch.cumprod(1 - BETAS, 0)


def tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(4, 2, 5, 7, generator=generator, dtype=torch.float64) * 2 - 1
    return x0.to(dtype), torch.randn(4, 2, 5, 7, generator=generator, dtype=torch.float64).to(dtype)


def image_at(t, x0, n):
    signal = ALPHA_BAR[t].sqrt()[:, None, None, None]
    noise = (1 - ALPHA_BAR[t]).sqrt()[:, None, None, None]
    return signal, noise, signal * x0 + noise * n


def per_image(error):
    return error.square().flatten(1).mean(1)


def ho(net, x0, n):  # arXiv 2006.11239, equation 14
    _, _, x_t = image_at(STEPS, x0, n)
    return per_image(n - net(x_t, STEPS.double(), LABEL))


def x0_loss(net, x0, n):  # arXiv 2202.00512, section 4
    _, _, x_t = image_at(STEPS, x0, n)
    return per_image(x0 - net(x_t, STEPS.double(), LABEL))


def v_loss(net, x0, n):  # arXiv 2202.00512, appendix D
    signal, noise, x_t = image_at(STEPS, x0, n)
    return per_image(signal * n - noise * x0 - net(x_t, STEPS.double(), LABEL))


FLOW_T = torch.tensor([0.01, 0.4, 0.7, 0.99], dtype=torch.float64)


def flow_loss(net, x0, n):  # arXiv 2209.03003, equation 1, towards the noise
    t = FLOW_T[:, None, None, None]
    return per_image(n - x0 - net((1 - t) * x0 + t * n, FLOW_T, LABEL))


def x0_flow_loss(net, x0, n):
    t = FLOW_T[:, None, None, None]
    return per_image(x0 - net((1 - t) * x0 + t * n, FLOW_T, LABEL))


EDM_SIGMA = torch.tensor([0.02, 0.4, 3.0, 70.0], dtype=torch.float64)


def edm_loss(net, x0, n):  # arXiv 2206.00364, equation 2 and table 1, with sigma_data 0.5
    s = EDM_SIGMA[:, None, None, None]
    x = x0 + s * n
    inner = net(x / (s**2 + 0.25).sqrt(), EDM_SIGMA.log() / 4, LABEL)
    denoised = 0.25 / (s**2 + 0.25) * x + s * 0.5 / (s**2 + 0.25).sqrt() * inner
    weight = (EDM_SIGMA**2 + 0.25) / (EDM_SIGMA * 0.5) ** 2
    return weight * per_image(denoised - x0)


PAPERS = {
    "eps": (EpsPreconditioning(SCHEDULE), SCHEDULE.sigmas[STEPS], ho),
    "x0": (X0Preconditioning(SCHEDULE), SCHEDULE.sigmas[STEPS], x0_loss),
    "v": (VPreconditioning(SCHEDULE), SCHEDULE.sigmas[STEPS], v_loss),
    "flow": (FlowPreconditioning(), FLOW_T / (1 - FLOW_T), flow_loss),
    "x0 flow": (X0Preconditioning(), FLOW_T / (1 - FLOW_T), x0_flow_loss),
    "edm": (EDMPreconditioning(0.5), EDM_SIGMA, edm_loss),
}


def gradients(loss, net):
    return torch.autograd.grad(loss.mean(), list(net.parameters()))


@pytest.mark.parametrize("name", PAPERS)
def test_loss_and_gradient_are_the_paper_s(name):
    scaling, sigma, paper = PAPERS[name]
    x0, n = tensors()
    net = TinyNet(num_classes=4).double()
    ours = DenoisingLoss()(Denoiser(net, scaling), x0, sigma, n, LABEL)
    theirs = paper(net, x0, n)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)
    for got, expected in zip(gradients(ours, net), gradients(theirs, net), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", PAPERS)
def test_unit_weight_is_the_error_of_the_image(name):
    scaling, sigma, _ = PAPERS[name]
    x0, n = tensors()
    denoiser = Denoiser(TinyNet(num_classes=4).double(), scaling)
    x = x0 + sigma[:, None, None, None] * n
    loss = DenoisingLoss(UnitWeight())(denoiser, x0, sigma, n, LABEL)
    torch.testing.assert_close(loss, per_image(denoiser(x, sigma, LABEL) - x0))


@pytest.mark.parametrize(
    ("name", "table"),
    [
        # arXiv 2303.09556: the weight on the network's own error for each prediction
        ("x0", lambda snr, gamma: snr.clamp(max=gamma)),
        ("eps", lambda snr, gamma: snr.clamp(max=gamma) / snr),
        ("v", lambda snr, gamma: snr.clamp(max=gamma) / (snr + 1)),
    ],
)
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_follows_the_paper_s_table(name, table, gamma):
    scaling, sigma, paper = PAPERS[name]
    x0, n = tensors()
    net = TinyNet(num_classes=4).double()
    snr = ALPHA_BAR[STEPS] / (1 - ALPHA_BAR[STEPS])
    assert bool((snr > gamma).any()) and bool((snr < gamma).any())
    loss = DenoisingLoss(MinSNR(gamma))(Denoiser(net, scaling), x0, sigma, n, LABEL)
    torch.testing.assert_close(loss, table(snr, gamma) * paper(net, x0, n), rtol=1e-7, atol=1e-10)


def test_learned_uncertainty_starts_as_the_paper_s_loss():
    x0, n = tensors()
    denoiser = Denoiser(TinyNet(num_classes=4).double(), EDMPreconditioning())
    plain = DenoisingLoss()(denoiser, x0, EDM_SIGMA, n, LABEL)
    learned = DenoisingLoss(LearnedUncertainty().double())(denoiser, x0, EDM_SIGMA, n, LABEL)
    torch.testing.assert_close(learned, plain)


def test_learned_uncertainty_has_its_formula_and_learns_the_error():
    torch.manual_seed(0)
    weight, scaling = LearnedUncertainty(), EDMPreconditioning()
    sigma = torch.logspace(-2, 2, 64)
    weighted = 0.3 + 0.2 * (sigma.log() / 2).sin()  # error / c_out^2, a smooth function of sigma
    error = weighted * scaling(sigma)[1] ** 2
    optimizer = torch.optim.Adam(weight.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        weight(error, sigma, scaling).mean().backward()
        optimizer.step()
    u = weight.log_error(sigma).detach()
    torch.testing.assert_close(weight(error, sigma, scaling).detach(), weighted / u.exp() + u)
    torch.testing.assert_close(u.exp(), weighted, rtol=0.1, atol=0)
    assert set(weight.state_dict()) == {"frequencies", "phases", "coefficients"}


@pytest.mark.parametrize("weight", [PredictionWeight(), UnitWeight(), MinSNR(), LearnedUncertainty()])
@pytest.mark.parametrize("name", PAPERS)
def test_every_weight_goes_with_every_prediction(weight, name):
    scaling = PAPERS[name][0]
    x0, n = tensors(torch.float32)
    # Many of these levels lie outside the discrete schedules; training takes them to the edge.
    sigma = LogNormal(0.0, 3.0).sample(4, torch.Generator().manual_seed(3))
    loss = DenoisingLoss(weight)(Denoiser(TinyNet(num_classes=4), scaling), x0, sigma, n, LABEL)
    assert loss.shape == (4,) and loss.dtype == torch.float32 and bool(loss.isfinite().all())


def test_levels_outside_the_support_move_to_its_edge():
    x0, n = tensors()
    denoiser = Denoiser(TinyNet().double(), EpsPreconditioning(SCHEDULE))
    outside = torch.tensor([1e-6, 1.0, 2.0, 1e6], dtype=torch.float64)
    inside = torch.tensor([SCHEDULE.sigma_min, 1.0, 2.0, SCHEDULE.sigma_max], dtype=torch.float64)
    loss = DenoisingLoss()
    assert torch.equal(loss(denoiser, x0, outside, n), loss(denoiser, x0, inside, n))


def test_labels_and_augmentation_reach_the_network():
    x0, n = tensors(torch.float32)
    net = TinyNet(num_classes=4)
    DenoisingLoss()(Denoiser(net, EDMPreconditioning()), x0, EDM_SIGMA.float(), n, LABEL, torch.ones(4, 9))
    assert torch.equal(net.calls[0]["label"], LABEL) and net.calls[0]["augment"].shape == (4, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_single_precision_for_shorter_images(dtype):
    x0, n = tensors(dtype)
    exact_x0, exact_n = tensors()
    loss = DenoisingLoss()(Denoiser(TinyNet(), EDMPreconditioning()), x0, EDM_SIGMA.float(), n)
    exact = DenoisingLoss()(Denoiser(TinyNet().double(), EDMPreconditioning()), exact_x0, EDM_SIGMA, exact_n)
    assert loss.dtype == torch.float32
    if dtype == torch.float32:
        torch.testing.assert_close(loss.double(), exact, rtol=1e-3, atol=0)


# The hybrid loss.


def textbook_bound(x0_hat, v, x0, t):
    """T times one term of the variational bound in bits per dimension, by torch's distributions (arXiv 2102.09672)."""
    before = torch.cat([torch.ones(1, dtype=torch.float64), ALPHA_BAR[:-1]])
    posterior = BETAS * (1 - before) / (1 - ALPHA_BAR)
    posterior[0] = posterior[1]
    terms = []
    for row in range(len(x0)):
        step = int(t[row])
        log_variance = v[row] * BETAS[step].log() + (1 - v[row]) * posterior[step].log()
        std = (log_variance / 2).exp()
        share = before[step].sqrt() * BETAS[step] / (1 - ALPHA_BAR[step])
        if step == 0:
            model = torch.distributions.Normal(x0_hat[row], std)
            upper = torch.where(x0[row] > 0.999, torch.ones_like(std), model.cdf(x0[row] + 1 / 255))
            lower = torch.where(x0[row] < -0.999, torch.zeros_like(std), model.cdf(x0[row] - 1 / 255))
            term = -(upper - lower).log()
        else:
            true = torch.distributions.Normal(share * x0[row], posterior[step].sqrt())
            model = torch.distributions.Normal(share * x0_hat[row], std)
            term = torch.distributions.kl_divergence(true, model)
        terms.append(term.mean() / math.log(2) * 300)
    return torch.stack(terms)


def levels_of(x0):
    """The 256 values of 8-bit images, both ends among them."""
    grid = ((x0 + 1) * 127.5).round() / 127.5 - 1
    grid[:, 0, 0, 0], grid[:, 0, 0, 1] = -1.0, 1.0
    return grid


@pytest.mark.parametrize("kind", [EpsPreconditioning, VPreconditioning, X0Preconditioning])
def test_hybrid_loss_is_the_paper_s(kind):
    x0, n = tensors()
    x0 = levels_of(x0)
    net = TinyNet(num_classes=4, out_channels=4).double()
    denoiser = LearnedVarianceDenoiser(net, kind(SCHEDULE))
    sigma = SCHEDULE.sigmas[STEPS]
    with torch.no_grad():  # a mean near the image at the first step, as after training, keeps the CDF off its tails
        net.mix.weight *= 0.01
    x0_hat, v = denoiser.learned_variance(x0 + sigma[:, None, None, None] * n, sigma, sigma, LABEL)
    loss = HybridLoss(vlb_weight=0.01)
    bound = loss.bound(x0_hat, v, x0, sigma, denoiser.scaling)
    near = (x0_hat - x0).abs().flatten(1).max(1).values < 0.15  # where torch's CDF does not cancel
    expected = textbook_bound(x0_hat, v, x0, STEPS)
    rows = near | (STEPS > 0)
    torch.testing.assert_close(bound[rows], expected[rows], rtol=1e-6, atol=1e-9)
    total = loss(denoiser, x0, sigma, n, LABEL)
    simple = DenoisingLoss()(denoiser, x0, sigma, n, LABEL)
    torch.testing.assert_close(total, simple + 0.01 * bound)


def test_hybrid_bound_of_the_first_step():
    x0 = levels_of(tensors()[0])
    x0_hat = x0 + 0.02 * tensors()[1]
    v = tensors()[0] / 2 + 0.5
    sigma = SCHEDULE.sigmas[torch.zeros(4, dtype=torch.long)]
    bound = HybridLoss().bound(x0_hat, v, x0, sigma, EpsPreconditioning(SCHEDULE))
    expected = textbook_bound(x0_hat, v, x0, torch.zeros(4))
    torch.testing.assert_close(bound, expected, rtol=1e-6, atol=0)


def test_a_perfect_reverse_step_costs_nothing():
    x0, _ = tensors()
    sigma = SCHEDULE.sigmas[torch.tensor([1, 7, 100, 299])]
    bound = HybridLoss().bound(x0, torch.zeros_like(x0), x0, sigma, EpsPreconditioning(SCHEDULE))
    torch.testing.assert_close(bound, torch.zeros_like(bound), rtol=0, atol=1e-9)
    worse = HybridLoss().bound(x0, torch.full_like(x0, 0.5), x0, sigma, EpsPreconditioning(SCHEDULE))
    assert bool((worse > 0).all())


@pytest.mark.parametrize("step", [1, 20, 150])
def test_the_bound_is_least_at_the_true_reverse_variance(step):
    """For Gaussian data of variance d it is posterior + share^2 Var[x0 | x] (arXiv 2201.06503)."""
    d, sigma = 0.3, SCHEDULE.sigmas[step]
    generator = torch.Generator().manual_seed(0)
    x0 = d**0.5 * torch.randn(1, 1, 400, 400, generator=generator, dtype=torch.float64)
    x = x0 + sigma * torch.randn(1, 1, 400, 400, generator=generator, dtype=torch.float64)
    x0_hat = d / (d + sigma**2) * x
    before, beta, now = ALPHA_BAR[step - 1], BETAS[step], ALPHA_BAR[step]
    posterior, share = beta * (1 - before) / (1 - now), before.sqrt() * beta / (1 - now)
    true = posterior + share**2 * d * sigma**2 / (d + sigma**2)
    best = ((true / posterior).log() / (beta / posterior).log()).item()
    assert 0 < best < 1

    def bound(v):
        return HybridLoss().bound(x0_hat, torch.full_like(x0, v), x0, sigma[None], EpsPreconditioning(SCHEDULE)).item()

    assert bound(best) < min(bound(best - 0.02), bound(best + 0.02))


def test_the_bound_reaches_the_variance_and_not_the_mean():
    x0, n = tensors()
    x0 = levels_of(x0)
    net = TinyNet(num_classes=4, out_channels=4).double()
    denoiser = LearnedVarianceDenoiser(net, EpsPreconditioning(SCHEDULE))
    sigma = SCHEDULE.sigmas[STEPS]
    hybrid = gradients(HybridLoss()(denoiser, x0, sigma, n, LABEL), net)
    simple = gradients(DenoisingLoss()(denoiser, x0, sigma, n, LABEL), net)
    for ours, plain, name in zip(hybrid, simple, ["weight", "bias", "embedding"], strict=True):
        mean_part = (slice(None), slice(0, 2)) if name == "embedding" else slice(0, 2)
        variance_part = (slice(None), slice(2, 4)) if name == "embedding" else slice(2, 4)
        torch.testing.assert_close(ours[mean_part], plain[mean_part])
        assert float(plain[variance_part].abs().max()) == 0 < float(ours[variance_part].abs().max())


@pytest.mark.parametrize("schedule", [CosineSchedule(4000), ContinuousVP(), LinearSchedule()])
def test_hybrid_loss_in_single_precision(schedule):
    x0, n = tensors()
    x0 = levels_of(x0)
    net = TinyNet(out_channels=4).double()
    sigma = schedule.sigmas[torch.tensor([0, 1, schedule.num_steps // 2, schedule.num_steps - 1])]
    exact = HybridLoss()(LearnedVarianceDenoiser(net, VPreconditioning(schedule)), x0, sigma, n)
    single = LearnedVarianceDenoiser(TinyNet(out_channels=4), VPreconditioning(schedule))
    loss = HybridLoss()(single, x0.float(), sigma.float(), n.float())
    torch.testing.assert_close(loss.double(), exact, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(("mean", "std"), [(0.1, 0.01), (-0.99, 0.5), (0.3, 2.0), (1.5, 0.3)])
def test_probabilities_of_all_levels_sum_to_one(mean, std):
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    log_variance = torch.full_like(levels, 2 * math.log(std))
    nll = discretised_gaussian_nll(levels, torch.full_like(levels, mean), log_variance)
    assert bool((nll > 0).all())
    assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("dtype", "mean"), [(torch.float64, -40.0), (torch.float64, 40.0), (torch.float32, -3.0), (torch.float32, 3.0)]
)
def test_far_tails_stay_finite_with_the_right_slope(dtype, mean):
    x0 = torch.tensor([-1.0, 0.0, 0.5, 1.0], dtype=dtype)
    means = torch.full_like(x0, mean).requires_grad_()
    nll = discretised_gaussian_nll(x0, means, torch.full_like(x0, 2 * math.log(0.01)))
    (slope,) = torch.autograd.grad(nll.sum(), means)
    assert bool(nll.isfinite().all()) and bool(slope.isfinite().all())
    # Deep in the tail the nearest edge of the bin decides: the slope is its distance over the variance.
    inner = slice(1, 3)
    edge = x0[inner] + math.copysign(1 / 255, mean)
    torch.testing.assert_close(slope[inner], (mean - edge) / 1e-4, rtol=1e-2, atol=0)


def test_gaussian_kl_is_torch_s():
    p = torch.distributions.Normal(torch.tensor(0.3), torch.tensor(0.5))
    q = torch.distributions.Normal(torch.tensor(-0.2), torch.tensor(0.9))
    got = gaussian_kl(torch.tensor(0.5), torch.tensor(0.25).log(), torch.tensor(0.81).log())
    torch.testing.assert_close(got, torch.distributions.kl_divergence(p, q))


def test_bad_input_is_named():
    x0, n = tensors(torch.float32)
    with pytest.raises(ValueError, match="gamma is 0"):
        MinSNR(0)
    with pytest.raises(ValueError, match="vlb_weight is -1"):
        HybridLoss(vlb_weight=-1)
    with pytest.raises(ValueError, match="use a LearnedVarianceDenoiser"):
        HybridLoss()(Denoiser(TinyNet(), EpsPreconditioning(SCHEDULE)), x0, EDM_SIGMA.float(), n)
    with pytest.raises(ValueError, match="HybridLoss needs a schedule, and this EDMPreconditioning has none"):
        HybridLoss()(LearnedVarianceDenoiser(TinyNet(out_channels=4), EDMPreconditioning()), x0, EDM_SIGMA.float(), n)
    with pytest.raises(TypeError, match="abstract"):
        LossWeight()


SCHEDULE_YAML = "schedule: {class_path: diffusion_lit.diffusion.CosineSchedule, init_args: {num_steps: 300}}"
FROM_YAML = {
    "scaling": [
        ("EDMPreconditioning", "sigma_data: 0.6"),
        ("EpsPreconditioning", SCHEDULE_YAML),
        ("X0Preconditioning", ""),
        ("X0Preconditioning", SCHEDULE_YAML),
        ("VPreconditioning", SCHEDULE_YAML),
        ("FlowPreconditioning", ""),
    ],
    "levels": [
        ("DiscreteUniform", SCHEDULE_YAML),
        ("UniformT", ""),
        ("UniformT", SCHEDULE_YAML),
        ("LogNormal", "P_mean: -0.4, P_std: 1.0"),
        ("LogitNormal", "mean: 0.1"),
        ("Constant", "sigma: 0.5"),
    ],
    "weight": [("PredictionWeight", ""), ("UnitWeight", ""), ("MinSNR", "gamma: 3.0"), ("LearnedUncertainty", "")],
}


def from_yaml(base, name, arguments):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "built")
    text = f"built: {{class_path: diffusion_lit.diffusion.{name}, init_args: {{{arguments}}}}}"
    built = parser.instantiate_classes(parser.parse_string(text)).built
    assert type(built).__name__ == name
    return built


def test_any_combination_comes_from_yaml():
    bases = {"scaling": Preconditioning, "levels": NoiseLevels, "weight": LossWeight}
    choices = [[from_yaml(bases[key], *option) for option in options] for key, options in FROM_YAML.items()]
    x0, n = tensors(torch.float32)
    for scaling, levels, weight in itertools.product(*choices):
        sigma = levels.sample(4, torch.Generator().manual_seed(0))
        loss = DenoisingLoss(weight)(Denoiser(TinyNet(), scaling), x0, sigma, n)
        assert bool(loss.isfinite().all())


def test_losses_are_modules_with_the_weights_parameters():
    assert isinstance(DenoisingLoss(), nn.Module) and not list(DenoisingLoss().parameters())
    assert [name for name, _ in DenoisingLoss(LearnedUncertainty()).named_parameters()] == ["weight.coefficients"]
