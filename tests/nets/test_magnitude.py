"""Magnitude-preserving layers keep the variance, and the U-Net of EDM2 is its formula."""

import copy
import math

import pytest
import torch
from helpers.runs import FIT, LAST, read, same_training
from torch.nn import functional as F

from diffusion_lit.modules import EDM
from diffusion_lit.modules.optim import configure_optimizers
from diffusion_lit.nets import MPUNet, UNet, force_norms
from diffusion_lit.nets.magnitude import MPAttention, MPConditioning, MPConv, mp_cat, mp_silu, mp_sum, unit

SMALL = {"model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "attention_resolutions": (-1,)}
SMALL |= {"head_channels": 8}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def variance(x):
    return float(x.detach().square().mean())


def test_each_layer_keeps_the_variance():
    torch.manual_seed(0)
    a, b = normal(64, 32, 8, 8), normal(64, 96, 8, 8, seed=1)
    assert variance(mp_silu(normal(10**6))) == pytest.approx(1, abs=0.01)
    for t in (0.3, 0.5, 0.9):
        assert variance(mp_sum(a, b[:, :32], t)) == pytest.approx(1, abs=0.02)
        both = mp_cat(a, b, t)
        assert variance(both) == pytest.approx(1, abs=0.02)
        share = both[:, 32:].square().sum() / both[:, :32].square().sum()
        assert float(share) == pytest.approx((t / (1 - t)) ** 2, rel=0.02)
    inner = MPConv(32, 200, 3).double()(a)[:, :, 1:-1, 1:-1]  # behind the border, where zeros join
    assert variance(inner) == pytest.approx(1, abs=0.03)
    assert variance(MPConv(32, 500).double()(normal(500, 32))) == pytest.approx(1, abs=0.05)
    assert variance(unit(7 * a, (1,))) == pytest.approx(1, abs=1e-3)
    emb = MPConditioning(64, 400, 0, 0).double()(normal(300), None, None)
    assert variance(emb) == pytest.approx(1, abs=0.1)


def conv(layer, x, gain=1.0):
    """The layer written out: rows over their length."""
    rows = layer.weight.flatten(1)
    weight = gain * (rows / rows.norm(dim=1, keepdim=True)).view_as(layer.weight)
    return x @ weight.T if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)


def silu(x):
    return x * torch.sigmoid(x) / 0.596


def add(a, b, t):
    return ((1 - t) * a + t * b) / ((1 - t) ** 2 + t**2) ** 0.5


def pixel(x, dim=1):
    return x / x.pow(2).mean(dim, keepdim=True).sqrt()


def attend(layer, x):
    batch, _, height, width = x.shape
    q, k, v = (pixel(part.view(batch, 2, 8, height * width), 2) for part in conv(layer.qkv, x).chunk(3, 1))
    weights = torch.softmax(torch.einsum("bndi,bndj->bnij", q, k) / math.sqrt(8), -1)
    y = torch.einsum("bnij,bndj->bndi", weights, v).reshape(x.shape)
    return add(x, conv(layer.proj, y), 0.3)


def block(layer, x, emb, skip=None):
    if layer.resample is not None:
        down = layer.resample.direction == "down"
        x = F.avg_pool2d(x, 2) if down else x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    if skip is not None:
        first, second = x.shape[1], skip.shape[1]
        scale = ((first + second) / 0.5) ** 0.5 / 2
        x = torch.cat([x * scale / first**0.5, skip * scale / second**0.5], 1)
    short = x if layer.shortcut is None else conv(layer.shortcut, x)
    if layer.down:
        x = short = pixel(short)
    y = conv(layer.conv0, silu(x)) * (1 + conv(layer.affine, emb, layer.gain))[:, :, None, None]
    x = add(short, conv(layer.conv1, silu(y)), 0.3)
    return x if layer.attention is None else attend(layer.attention, x)


def test_the_whole_network_is_its_formula():
    torch.manual_seed(0)
    net = MPUNet(2, 8, 3, **SMALL).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p))
    x, noise, label = normal(2, 2, 8, 8), torch.tensor([0.3, -0.5]).double(), torch.tensor([1, 3])
    angle = noise[:, None] * net.conditioning.frequency
    emb = conv(net.conditioning.noise, 2**0.5 * torch.cat([angle.cos(), angle.sin()], 1))
    table = net.conditioning.label.weight
    emb = silu(add(emb, 2 * (table / table.norm(dim=1, keepdim=True)).T[label], 0.5))
    y = conv(net.stem, torch.cat([x, torch.ones(2, 1, 8, 8).double()], 1))
    skips = [y]
    for layer in net.encoder:
        y = block(layer, y, emb)
        skips.append(y)
    assert [y.shape[1] for y in skips] == [8, 8, 8, 16]
    for layer in net.middle:
        y = block(layer, y, emb)
    for layer, takes in zip(net.decoder, [True, True, False, True, True], strict=True):
        y = block(layer, y, emb, skips.pop() if takes else None)
    expected = conv(net.out, y, net.out_gain)
    made = net(x, noise, label)
    torch.testing.assert_close(made, expected, rtol=2e-3, atol=2e-3)  # the divisor of `unit` is not exactly 0-safe
    checkpointed = MPUNet(2, 8, 3, **SMALL, activation_checkpointing=True).double()
    checkpointed.load_state_dict(net.state_dict())
    made.square().mean().backward()
    checkpointed(x, noise, label).square().mean().backward()
    for one, other in zip(net.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_weights_length_does_not_count_and_is_brought_back():
    torch.manual_seed(0)
    module = EDM(MPUNet(1, 8, **SMALL))
    net = module.denoiser.net
    with torch.no_grad():
        net.out_gain.fill_(1.0)
    x, noise = normal(2, 1, 8, 8).float(), torch.zeros(2)
    longer = copy.deepcopy(net)
    with torch.no_grad():
        for layer in longer.modules():
            if isinstance(layer, MPConv):
                layer.weight *= 5
    made = net(x, noise)
    torch.testing.assert_close(longer(x, noise), made, rtol=1e-3, atol=1e-3)
    optimizer = configure_optimizers(module, lambda weights: torch.optim.SGD(weights, lr=3.0), None)
    made.square().mean().backward()
    convs = [layer for layer in net.modules() if isinstance(layer, MPConv)]
    for layer in convs:  # a gradient is orthogonal to a weight whose length does not count
        if layer.weight.grad is not None and layer.weight.grad.norm() > 1e-6:
            rows, grads = layer.weight.flatten(1), layer.weight.grad.flatten(1)
            assert F.cosine_similarity(rows, grads).abs().max() < 0.02
    before = net.stem.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(net.stem.weight, before)
    for layer in convs:
        lengths = layer.weight.flatten(1).norm(dim=1)
        assert torch.allclose(lengths, torch.full_like(lengths, layer.weight[0].numel() ** 0.5), rtol=1e-3)
    force_norms(longer)
    assert torch.allclose(longer.stem.weight.norm(), before.norm(), rtol=1e-3)
    plain = configure_optimizers(EDM(UNet(1, 8, model_channels=8)), torch.optim.AdamW, None)
    assert not plain._optimizer_step_post_hooks


def test_it_starts_at_zero_and_refuses_what_it_cannot_take():
    net = MPUNet(1, 8, 2, augment_dim=9, **SMALL)
    x = normal(1, 1, 8, 8).float()
    assert torch.equal(net(x, torch.zeros(1), torch.tensor([1]), torch.zeros(1, 9)), torch.zeros(1, 1, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x, torch.zeros(1)).isfinite().all()
    assert MPAttention(24, 8).heads == 3
    with pytest.raises(ValueError, match="without classes"):
        MPUNet(1, 8, **SMALL)(x, torch.zeros(1), torch.tensor([1]))
    with pytest.raises(ValueError, match="augment_dim=0"):
        MPUNet(1, 8, **SMALL)(x, torch.zeros(1), None, torch.zeros(1, 9))
    with pytest.raises(ValueError, match="model_channels"):
        MPUNet(1, 8, model_channels=2)


@pytest.mark.medium
def test_a_run_goes_on_exactly(lightning):
    options = ["--model.net=diffusion_lit.nets.MPUNet", "--model.net.model_channels=8", "--model.optimizer.lr=0.01"]
    options += ["--model.net.channel_mult=[1,2]", "--model.net.attention_resolutions=[-1]"]
    fit = [word for word in FIT if "net.init_args" not in word]
    lightning(*fit, *options, "--trainer.max_steps=4", "--name=unbroken")
    whole = read("runs/unbroken/version_0/checkpoints/last.ckpt")
    lightning(*fit, *options, "--trainer.max_steps=2")
    lightning(*fit, *options, "--trainer.max_steps=4", "--ckpt_path=last")
    assert same_training(read(LAST), whole)
    stem = whole["current_model_state"]["denoiser.net.stem.weight"]
    assert torch.allclose(stem.flatten(1).norm(dim=1), torch.tensor(18.0).sqrt(), rtol=1e-3)
