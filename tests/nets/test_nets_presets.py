"""The papers' networks have the papers' parameter counts, and the layout that leads to them."""

import pytest
import torch

from diffusion_lit.nets import DDPMCIFAR10, DDPMpp, DiT_B_2, DiT_S_2
from diffusion_lit.nets.layers import Attention, Resample
from diffusion_lit.nets.unet import ResBlock


def millions(net):
    return sum(p.numel() for p in net.parameters()) / 1e6


@pytest.mark.parametrize(
    ("build", "printed", "digits"),
    [
        (lambda: DDPMCIFAR10(), 35.7, 1),  # Ho 2020, appendix B
        (lambda: DDPMpp(), 55.7, 1),  # Karras 2022, table 7, unconditional
        (lambda: DDPMpp(num_classes=10), 55.7, 1),  # and conditional
        (lambda: DiT_S_2(out_channels=8), 33, 0),  # Peebles & Xie 2023, table 1
        (lambda: DiT_B_2(out_channels=8), 130, 0),
    ],
)
def test_parameter_counts_are_the_papers(build, printed, digits):
    with torch.device("meta"):
        assert round(millions(build()), digits) == printed


def widths(net, *names):
    return [stage.block.conv0.out_channels for name in names for stage in getattr(net, name) if hasattr(stage, "block")]


def test_ddpm_layout():
    with torch.device("meta"):
        net = DDPMCIFAR10()
    assert widths(net, "encoder") == [128] * 2 + [256] * 6
    assert widths(net, "decoder") == [256] * 9 + [128] * 3
    assert sum(isinstance(m, Attention) for m in net.modules()) == 2 + 1 + 3
    assert {m.heads for m in net.modules() if isinstance(m, Attention)} == {1}
    assert all(m.affine.out_features == m.conv0.out_channels for m in net.modules() if isinstance(m, ResBlock))
    assert {m.dropout.p for m in net.modules() if isinstance(m, ResBlock)} == {0.1}


def test_ddpmpp_layout():
    with torch.device("meta"):
        net = DDPMpp()
    assert widths(net, "encoder") == [256] * (4 + 1 + 4 + 1 + 4)
    assert widths(net, "decoder") == [256] * (5 + 1 + 5 + 1 + 5)
    assert sum(isinstance(m, Attention) for m in net.modules()) == 4 + 1 + 1
    assert sum(isinstance(m, Resample) for m in net.modules()) == 4
    blocks = [m for m in net.modules() if isinstance(m, ResBlock | Attention)]
    assert {m.skip_scale for m in blocks} == {0.5**0.5}


def test_dit_layout():
    with torch.device("meta"):
        net = DiT_S_2()
    assert len(net.blocks) == 12
    assert {b.num_heads for b in net.blocks} == {6}
    assert net.conditioning.label.weight.shape == (1001, 384)
    assert (net.in_channels, net.num_classes, net.image_size, net.patch_size) == (4, 1000, 32, 2)


def test_presets_run_on_other_data():
    net = DDPMpp(in_channels=1, image_size=8, num_classes=3, augment_dim=0)
    assert net(torch.randn(1, 1, 8, 8), torch.zeros(1), torch.tensor([1])).shape == (1, 1, 8, 8)
