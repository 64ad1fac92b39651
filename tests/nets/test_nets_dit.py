"""The DiT against its formulas written out."""

import math

import pytest
import torch
from torch.nn import functional as F

from diffusion_lit.nets import DiT
from diffusion_lit.nets.dit import position_code
from diffusion_lit.nets.tokens import rotary_angles, rotate


def test_position_code_of_the_dit():
    """A place differs from every other, and the code of a larger grid continues that of a smaller one."""
    code = position_code(4, 6, 32)
    assert code.shape == (24, 32)
    assert torch.cdist(code, code).add(torch.eye(24)).min() > 1e-2
    row, column, frequency = 2, 5, 10000 ** (-3 / 8)
    place = code[row * 6 + column]
    expected = [math.sin(column * frequency), math.cos(column * frequency), math.sin(row * frequency)]
    assert place[[3, 11, 19]].tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(position_code(8, 6, 32)[:24], code)


def linear(x, layer):
    return x @ layer.weight.T + layer.bias


def norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def test_the_whole_network_is_its_formula():
    torch.manual_seed(0)
    net = DiT(2, 6, 3, patch_size=2, hidden_channels=8, depth=2, num_heads=2).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.5 * torch.randn_like(p))
    x, noise, label = torch.randn(2, 2, 6, 4).double(), torch.tensor([1.0, 2.0]).double(), torch.tensor([1, 3])
    emb = net.conditioning(noise, label, None)
    squares = [x[:, :, i : i + 2, j : j + 2].flatten(1) for i in range(0, 6, 2) for j in range(0, 4, 2)]
    y = linear(torch.stack(squares, 1), net.stem) + position_code(3, 2, 8)
    for block in net.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(emb, block.modulation)[:, None].chunk(6, -1)
        q, k, v = linear((1 + scale1) * norm(y) + shift1, block.qkv).chunk(3, -1)
        heads = []
        for rows in (slice(0, 4), slice(4, 8)):
            weights = torch.softmax(q[..., rows] @ k[..., rows].mT / 2, -1)
            heads.append(weights @ v[..., rows])
        y = y + gate1 * linear(torch.cat(heads, -1), block.proj)
        hidden = F.gelu(linear((1 + scale2) * norm(y) + shift2, block.mlp[0]), approximate="tanh")
        y = y + gate2 * linear(hidden, block.mlp[2])
    shift, scale = linear(emb, net.modulation)[:, None].chunk(2, -1)
    y = linear((1 + scale) * norm(y) + shift, net.out)
    out = net(x, noise, label)
    for place in range(6):
        i, j = 2 * (place // 2), 2 * (place % 2)
        torch.testing.assert_close(out[:, :, i : i + 2, j : j + 2].flatten(1), y[:, place], rtol=1e-7, atol=1e-7)


def test_each_block_starts_as_the_identity():
    torch.manual_seed(0)
    block = DiT(2, 8, hidden_channels=8, depth=1, num_heads=2).blocks[0]
    x = torch.randn(2, 4, 8)
    assert torch.equal(block(x, torch.randn(2, 8)), x)


def rms(x, gain=1.0):
    return gain * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def turned(x, height, width):
    """Rotary places by complex numbers: pair i is multiplied by e^(i angle), first of columns, then of rows."""
    half = x.shape[-1] // 2
    frequency = [100 ** (-i / (half // 2)) for i in range(half // 2)]
    angle = [[w * f for f in frequency] + [h * f for f in frequency] for h in range(height) for w in range(width)]
    z = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * torch.tensor(angle, dtype=torch.float64))
    return torch.cat([z.real, z.imag], -1)


def test_the_current_network_is_its_formula():
    """RMS norms, normalised queries and keys, rotary places and gated perceptrons, for another size than its own."""
    torch.manual_seed(0)
    options = {"rms_norm": True, "qk_norm": True, "rope": True, "swiglu": True}
    net = DiT(2, 6, 3, patch_size=2, hidden_channels=8, depth=2, num_heads=2, **options).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.5 * torch.randn_like(p))
    x, noise, label = torch.randn(2, 2, 6, 4).double(), torch.tensor([1.0, 2.0]).double(), torch.tensor([1, 3])
    emb = net.conditioning(noise, label, None)
    squares = [x[:, :, i : i + 2, j : j + 2].flatten(1) for i in range(0, 6, 2) for j in range(0, 4, 2)]
    y = linear(torch.stack(squares, 1), net.stem)
    for block in net.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(emb, block.modulation)[:, None].chunk(6, -1)
        q, k, v = linear((1 + scale1) * rms(y) + shift1, block.qkv).chunk(3, -1)
        heads = []
        for rows in (slice(0, 4), slice(4, 8)):
            one = turned(rms(q[..., rows], block.q_norm.weight), 3, 2)
            other = turned(rms(k[..., rows], block.k_norm.weight), 3, 2)
            heads.append(torch.softmax(one @ other.mT / 2, -1) @ v[..., rows])
        y = y + gate1 * linear(torch.cat(heads, -1), block.proj)
        y2 = (1 + scale2) * rms(y) + shift2
        assert block.mlp.gate.out_features == round(2 * 32 / 3)
        y = y + gate2 * linear(F.silu(linear(y2, block.mlp.gate)) * linear(y2, block.mlp.value), block.mlp.proj)
    shift, scale = linear(emb, net.modulation)[:, None].chunk(2, -1)
    y = linear((1 + scale) * rms(y) + shift, net.out)
    out = net(x, noise, label)
    for place in range(6):
        i, j = 2 * (place // 2), 2 * (place % 2)
        torch.testing.assert_close(out[:, :, i : i + 2, j : j + 2].flatten(1), y[:, place], rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert net.float()(x.float(), noise.float(), label).isfinite().all()


def test_rotary_places_count_by_their_difference():
    """A query times a key is the same wherever the two stand, if they stand alike to each other."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 8, generator=generator).double()
    angles = rotary_angles(5, 5, 8).double()
    places = angles.view(5, 5, 4)

    def product(one, other):
        return rotate(q[None], places[one][None])[0] @ rotate(k[None], places[other][None])[0]

    assert product((1, 1), (2, 3)) == pytest.approx(float(product((2, 0), (3, 2))), abs=1e-6)
    assert abs(product((1, 1), (2, 3)) - product((1, 1), (3, 2))) > 1e-3
    assert rotate(q[None], angles[7][None]).norm() == pytest.approx(float(q.norm()), rel=1e-6)


def test_the_options_of_the_current_network_are_plain_by_default_and_checked():
    plain, current = (
        DiT(1, 8, hidden_channels=24, depth=1, num_heads=2),
        DiT(1, 8, hidden_channels=24, depth=1, num_heads=2, swiglu=True),
    )
    assert not any("q_norm" in name or "gate" in name for name in plain.state_dict())
    count = [sum(p.numel() for p in net.blocks[0].mlp.parameters()) for net in (plain, current)]
    assert count[1] == pytest.approx(count[0], rel=0.02)
    with pytest.raises(ValueError, match="num_heads=4 leaves 6.*rope"):
        DiT(1, 8, hidden_channels=24, num_heads=4, rope=True)
