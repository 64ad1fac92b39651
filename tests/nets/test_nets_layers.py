"""The parts of the networks against their formulas written out."""

import math

import pytest
import torch
from torch.nn import functional as F

from diffusion_lit.nets.layers import (
    Attention,
    Conditioning,
    GroupNorm,
    LinearAttention,
    Resample,
    downsample,
    initialise,
    upsample,
)


def perturbed(layer):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    return layer.double()


def norm_by_hand(x, layer):
    """Group norm with the definition's mean and variance over each group's channels and positions."""
    groups = x.reshape(len(x), layer.num_groups, -1)
    y = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, unbiased=False, keepdim=True) + layer.eps).sqrt()
    return y.reshape(x.shape) * layer.weight[:, None, None] + layer.bias[:, None, None]


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (6, 1), (36, 9), (48, 12), (54, 9), (128, 32), (256, 32)])
def test_group_norm(channels, groups):
    layer = perturbed(GroupNorm(channels))
    x = torch.randn(2, channels, 3, 5, dtype=torch.float64) * 3 + 1
    assert layer.num_groups == groups
    torch.testing.assert_close(layer(x), norm_by_hand(x, layer), rtol=1e-12, atol=1e-12)


LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])


@LAYOUTS
def test_modulated_group_norm_is_its_formula_and_so_are_its_gradients(layout):
    layer = perturbed(GroupNorm(12))
    x = (torch.randn(3, 12, 4, 5, dtype=torch.float64) * 3 + 1).contiguous(memory_format=layout)
    scale, shift = torch.randn(2, 3, 12, dtype=torch.float64)
    inputs = [value.requires_grad_() for value in (x, scale, shift)]
    parameters = [*layer.parameters()]
    made = layer(*inputs)
    expected = norm_by_hand(x, layer) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    found, right = (torch.autograd.grad((y * weights).sum(), inputs + parameters) for y in (made, expected))
    torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)


@LAYOUTS
@pytest.mark.parametrize("modulated", [False, True])
def test_group_norm_of_bfloat16_has_the_statistics_of_float32(layout, modulated):
    """A mean far from zero is what rounded statistics get wrong: 100 +- 1 becomes 100 +- 0.5 in bfloat16 steps."""
    layer = GroupNorm(16)
    torch.manual_seed(0)
    x = (torch.randn(4, 16, 16, 16) + 30).bfloat16().contiguous(memory_format=layout)
    modulation = (torch.rand(2, 4, 16) - 0.5).bfloat16() if modulated else ()
    exact = layer(x.float(), *(value.float() for value in modulation))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(x, *modulation)
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().max() < 0.02 * (2 if modulated else 1)  # half a step at 4 is 0.016, at 8 0.031


@pytest.mark.parametrize(("channels", "head_channels", "heads"), [(24, 8, 3), (24, 24, 1), (24, 64, 1), (24, 7, 4)])
@pytest.mark.parametrize("kind", ["full", "linear"])
def test_attention_is_its_formula(channels, head_channels, heads, kind):
    layer = perturbed((Attention if kind == "full" else LinearAttention)(channels, head_channels, skip_scale=0.6))
    assert layer.heads == heads
    x = torch.randn(2, channels, 3, 5, dtype=torch.float64)
    normed = norm_by_hand(x, layer.norm).flatten(2)  # (B, C, N)
    weight, bias = layer.qkv.weight.flatten(1), layer.qkv.bias[:, None]
    q, k, v = (weight @ normed + bias).chunk(3, dim=1)
    mixed = torch.empty_like(q)
    d = channels // heads
    for image in range(2):
        for head in range(heads):
            rows = slice(head * d, (head + 1) * d)
            qh, kh, vh = q[image, rows].T, k[image, rows].T, v[image, rows].T  # (N, d)
            if kind == "full":
                score = torch.exp(qh @ kh.T / math.sqrt(d))
                result = score / score.sum(1, keepdim=True) @ vh
            else:  # each query's weights over the positions are a product of two softmaxes, and need not be normalised
                query = torch.exp(qh) / torch.exp(qh).sum(1, keepdim=True)
                key = torch.exp(kh) / torch.exp(kh).sum(0, keepdim=True)
                result = torch.stack([sum((query[i] @ key[j]) * vh[j] for j in range(15)) for i in range(15)])
            mixed[image, rows] = result.T
    expected = (x + (layer.proj.weight.flatten(1) @ mixed + layer.proj.bias[:, None]).reshape(x.shape)) * 0.6
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


def test_attention_does_not_know_the_order_of_the_positions():
    x = torch.randn(1, 8, 4, 4, dtype=torch.float64)
    order = torch.randperm(16)
    for layer in (perturbed(Attention(8, 4)), perturbed(LinearAttention(8, 4))):
        shuffled = x.flatten(2)[:, :, order].reshape(x.shape)
        expected = layer(x).flatten(2)[:, :, order].reshape(x.shape)
        torch.testing.assert_close(layer(shuffled), expected, rtol=1e-10, atol=1e-12)


def features(kind, noise):
    return Conditioning(16, 8, kind, 0, 0).noise_features(noise)


def test_positional_features_are_the_paper_s():
    out = features("positional", torch.tensor([3.0]))[0].double()
    for i in range(8):
        angle = 3.0 / 10000 ** (i / 7)
        assert out[i].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert out[8 + i].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_fourier_features_have_the_frequencies_of_a_normal_distribution():
    """Slope of sin(2 pi f c) at 0 gives f; the quantile of |N(0, 1)| at (i + 1/2) / n is where its cdf is that."""
    c = 1e-6
    slope = features("fourier", torch.tensor([c], dtype=torch.float64))[0, 8:] / (2 * math.pi * c)
    cdf = torch.special.erf(slope / math.sqrt(2))
    torch.testing.assert_close(cdf, (torch.arange(8, dtype=torch.float64) + 0.5) / 8, rtol=1e-6, atol=1e-8)


def test_features_of_half_precision_noise_are_computed_in_float32():
    net = Conditioning(16, 8, "positional", 0, 0)
    assert net.noise_features(torch.tensor([100.0], dtype=torch.bfloat16)).dtype == torch.float32
    assert net.noise_features(torch.tensor([100.0], dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("join", ["before", "after"])
def test_conditioning_is_its_formula(join):
    net = perturbed(Conditioning(6, 8, "fourier", 3, 2, labels_join=join))
    noise, label, augment = torch.rand(2).double(), torch.tensor([0, 3]), torch.randn(2, 2).double()
    labels = net.label.weight[label] + augment @ net.augment.weight.T
    x = net.noise_features(noise)
    hidden = F.silu((x + labels if join == "before" else x) @ net.hidden.weight.T + net.hidden.bias)
    out = hidden @ net.out.weight.T + net.out.bias
    torch.testing.assert_close(net(noise, label, augment), F.silu(out if join == "before" else out + labels))


def test_box_filter_is_average_and_nearest():
    x = torch.randn(2, 3, 4, 6)
    small = x.reshape(2, 3, 2, 2, 3, 2).mean((3, 5))
    torch.testing.assert_close(Resample("down")(x), small)
    assert torch.equal(Resample("up")(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_wider_filter_is_its_sum_and_up_is_the_transpose_of_down():
    taps = (1.0, 3.0, 3.0, 1.0)
    down, up = Resample("down", taps), Resample("up", taps)
    x, y = torch.randn(2, 3, 8, 8).double(), torch.randn(2, 3, 4, 4).double()
    row = torch.tensor(taps, dtype=torch.float64) / 8
    padded = F.pad(x, (1, 1, 1, 1))
    expected = sum(row[i] * row[j] * padded[:, :, i : i + 7 : 2, j : j + 7 : 2] for i in range(4) for j in range(4))
    torch.testing.assert_close(down.double()(x), expected)
    torch.testing.assert_close((down(x) * y).sum() * 4, (x * up.double()(y)).sum())
    for layer in (down, up):  # a constant stays itself, away from the border
        middle = layer(torch.ones(1, 1, 16, 16).double())[..., 2:-2, 2:-2]
        torch.testing.assert_close(middle, torch.ones_like(middle))


@pytest.mark.parametrize("kind", ["conv", "pool", "unshuffle"])
@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_resampling_halves_and_doubles(kind, taps):
    x = torch.randn(2, 8, 6, 4)
    assert downsample(8, kind, taps)(x).shape == (2, 8, 3, 2)
    assert upsample(8, kind, taps)(x).shape == (2, 8, 12, 8)


def test_unshuffling_loses_nothing():
    """The 1x1 convolutions set to the identity, going up undoes going down."""
    down, up = downsample(8, "unshuffle"), upsample(8, "unshuffle")
    down[1] = torch.nn.Identity()
    up[0] = torch.nn.Identity()
    x = torch.randn(2, 8, 6, 4)
    assert torch.equal(up(down(x)), x)


def test_initial_variance_is_kept_by_a_convolution():
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(64, 64, 3, padding=1)
    initialise(layer)
    y = layer(torch.randn(8, 64, 16, 16))[..., 1:-1, 1:-1]
    assert y.std().item() == pytest.approx(1, rel=0.1)
    assert torch.count_nonzero(layer.bias) == 0
