"""The dispersive loss: its formula pair by pair, its place in training, and what it does to features."""

import math

import pytest
import torch

from diffusion_lit.diffusion import Denoiser, DenoisingLoss, DispersiveLoss, EDMPreconditioning
from diffusion_lit.nets import UNet


@pytest.fixture
def denoiser():
    torch.manual_seed(0)
    net = UNet(
        in_channels=1, image_size=8, model_channels=8, channel_mult=[1, 2], num_blocks=1, attention_resolutions=[]
    )
    return Denoiser(net, EDMPreconditioning())


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(6, 1, 8, 8, generator=generator) for _ in range(2)]
    return draw[0], torch.rand(6, generator=generator) + 0.2, draw[1]


def test_it_adds_the_mean_over_pairs_of_a_layers_features(denoiser, batch):
    x0, sigma, noise = batch
    loss, plain = DispersiveLoss("middle.1", share=0.3, temperature=2.0), DenoisingLoss()
    found = []
    hook = denoiser.net.middle[1].register_forward_hook(lambda module, given, made: found.append(made.flatten(1)))
    alone = plain(denoiser, x0, sigma, noise)
    hook.remove()
    z = found[0].detach().double()
    pairs = [math.exp(-float((a - b).square().mean()) / 2.0) for a in z for b in z]
    torch.testing.assert_close(loss(denoiser, x0, sigma, noise), alone + 0.3 * math.log(sum(pairs) / 36))
    assert torch.equal(loss.eval()(denoiser, x0, sigma, noise), alone)  # held-out losses compare with others
    assert not denoiser.net.middle[1]._forward_hooks  # nothing stays behind
    assert float(loss.dispersion(torch.ones(5, 3))) == pytest.approx(0, abs=1e-6)


def test_descent_pushes_features_apart():
    z = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).mul(0.1).requires_grad_()
    loss = DispersiveLoss("x")
    before = torch.pdist(z.detach()).mean()
    for _ in range(50):
        (slope,) = torch.autograd.grad(loss.dispersion(z), z)
        z = (z - slope).detach().requires_grad_()
    assert torch.pdist(z.detach()).mean() > 3 * before


def test_what_cannot_be_is_told(denoiser, batch):
    with pytest.raises(ValueError, match=r"no layer 'centre'.*middle\.1"):
        DispersiveLoss("centre")(denoiser, *batch)
    with pytest.raises(ValueError, match="middle of DispersiveLoss gives no features"):  # a list, which is not called
        DispersiveLoss("middle")(denoiser, *batch)
    with pytest.raises(ValueError, match="temperature"):
        DispersiveLoss("middle.1", temperature=0)
    with pytest.raises(ValueError, match="share"):
        DispersiveLoss("middle.1", share=-1)
