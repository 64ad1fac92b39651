"""Views: the raw network comes back out of the denoiser, and every prediction has its definition."""

import pytest
import torch
from helpers.tiny_net import TinyNet

from diffusion_lit.diffusion import (
    ContinuousVP,
    Denoiser,
    EDMPreconditioning,
    EpsPreconditioning,
    FlowPreconditioning,
    LinearSchedule,
    VPreconditioning,
    X0Preconditioning,
    as_eps,
    as_score,
    as_v,
    as_velocity,
    as_x0,
)

SCHEDULE = LinearSchedule(300)
LABEL = torch.tensor([0, 1, 2, 3])
VIEWS = [as_x0, as_eps, as_v, as_velocity, as_score]


def image():
    return torch.randn(4, 2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    ("view", "scaling", "path", "time"),
    [
        (as_eps, EpsPreconditioning(SCHEDULE), "vp", torch.tensor([0, 3, 150, 299])),
        (as_v, VPreconditioning(SCHEDULE), "vp", torch.tensor([0, 3, 150, 299])),
        (as_x0, X0Preconditioning(SCHEDULE), "vp", torch.tensor([0, 3, 150, 299])),
        (as_eps, EpsPreconditioning(ContinuousVP()), "vp", torch.tensor([1.5, 3.0, 150.0, 299.0])),
        (as_velocity, FlowPreconditioning(), "flow", torch.tensor([0.002, 0.3, 0.5, 0.99])),
        (as_x0, X0Preconditioning(), "flow", torch.tensor([0.002, 0.3, 0.5, 0.99])),
    ],
)
def test_the_view_of_its_own_type_is_the_network_itself(view, scaling, path, time):
    """Another library calls net(x_t, t); the view on that path must be the same function."""
    net = TinyNet(num_classes=4).double()
    result = view(Denoiser(net, scaling), path)(image(), time, LABEL)
    torch.testing.assert_close(result, net(image(), time.double(), LABEL), rtol=1e-6, atol=1e-6)


def test_definitions():
    denoiser = Denoiser(TinyNet().double(), EDMPreconditioning())
    x = image()
    sigma = torch.tensor([0.1, 0.7, 3.0, 30.0], dtype=torch.float64)
    s = sigma[:, None, None, None]
    x0 = denoiser(x, sigma)
    n = (x - x0) / s
    alpha, std = 1 / (1 + s**2).sqrt(), s / (1 + s**2).sqrt()
    torch.testing.assert_close(as_x0(denoiser)(x, sigma), x0)
    torch.testing.assert_close(as_eps(denoiser)(x, sigma), n)
    torch.testing.assert_close(as_v(denoiser)(x, sigma), alpha * n - std * x0)
    torch.testing.assert_close(as_velocity(denoiser)(x, sigma), n - x0)
    torch.testing.assert_close(as_score(denoiser)(x, sigma), (x0 - x) / s**2)


@pytest.mark.parametrize("view", [as_x0, as_eps, as_v, as_velocity])
def test_paths_agree_on_what_does_not_depend_on_them(view):
    denoiser = Denoiser(TinyNet(num_classes=4).double(), EDMPreconditioning())
    x = image()
    t = torch.tensor([10, 50, 150, 299])
    sigma = SCHEDULE.sigmas[t]
    s = sigma[:, None, None, None]
    expected = view(denoiser)(x, sigma, LABEL)
    torch.testing.assert_close(view(denoiser, "vp", SCHEDULE)(x / (1 + s**2).sqrt(), t, LABEL), expected)
    torch.testing.assert_close(view(denoiser, "flow")(x / (1 + s), sigma / (1 + sigma), LABEL), expected)


@pytest.mark.parametrize("path", ["ve", "vp", "flow"])
def test_score_is_the_gradient_of_a_gaussian_s_log_density(path):
    mean, std = 0.3, 0.6
    sigma, t = SCHEDULE.sigmas[150], 150

    def denoise(x, sigma):
        sigma = sigma.reshape(-1, 1, 1, 1)
        return mean + std**2 / (std**2 + sigma**2) * (x - mean)

    signal, noise = {
        "ve": (1.0, sigma),
        "vp": (SCHEDULE.alpha_bar[t].sqrt(), (1 - SCHEDULE.alpha_bar[t]).sqrt()),
        "flow": (1 / (1 + sigma), sigma / (1 + sigma)),
    }[path]
    time = {"ve": sigma, "vp": t, "flow": noise}[path]
    x = image().requires_grad_()
    density = torch.distributions.Normal(mean * signal, ((std * signal) ** 2 + noise**2) ** 0.5)
    (expected,) = torch.autograd.grad(density.log_prob(x).sum(), x)
    torch.testing.assert_close(as_score(denoise, path, SCHEDULE)(x.detach(), time), expected)


@pytest.mark.parametrize("view", VIEWS)
def test_single_half_and_scalar_times(view):
    denoiser = Denoiser(TinyNet(), EpsPreconditioning(SCHEDULE))
    for dtype in (torch.float32, torch.bfloat16):
        result = view(denoiser, "vp")(image().to(dtype), 7)
        assert result.dtype == torch.float32 and result.shape == (4, 2, 5, 7)
    assert torch.equal(view(denoiser, "vp")(image(), 7), view(denoiser, "vp")(image(), torch.full((4,), 7)))


def test_bad_input_is_named():
    denoiser = Denoiser(TinyNet(), EDMPreconditioning())
    with pytest.raises(ValueError, match="no path 'vpx'; choose one of ve, vp, flow"):
        as_eps(denoiser, "vpx")
    with pytest.raises(ValueError, match="no schedule"):
        as_eps(denoiser, "vp")
