"""The DiT against its formulas written out."""

import math

import pytest
import torch
from torch.nn import functional as F

from diffusion_lit.nets import DiT
from diffusion_lit.nets.dit import position_code


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
