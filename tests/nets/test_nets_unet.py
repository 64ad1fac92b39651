"""The U-Net against another library's on the same weights, and its residual block against the formula written out."""

import pytest
import torch
from torch.nn import functional as F

from diffusion_lit.nets import UNet
from diffusion_lit.nets.layers import Attention, Resample
from diffusion_lit.nets.unet import ResBlock


def block_weights(prefix, block):
    names = {"norm0": "norm1", "conv0": "conv1", "affine": "time_emb_proj", "norm1": "norm2", "conv1": "conv2"}
    names["shortcut"] = "conv_shortcut"
    return {f"{prefix}.{names[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in block.state_dict().items()}


def attention_weights(prefix, attention):
    weights = {f"{prefix}.group_norm.{k}": v for k, v in attention.norm.state_dict().items()}
    for kind in ("weight", "bias"):
        qkv, proj = getattr(attention.qkv, kind).squeeze(), getattr(attention.proj, kind).squeeze()
        weights |= {f"{prefix}.to_{n}.{kind}": part for n, part in zip("qkv", qkv.chunk(3), strict=True)}
        weights[f"{prefix}.to_out.0.{kind}"] = proj
    return weights


def stage_weights(prefix, index, stage):
    weights = block_weights(f"{prefix}.resnets.{index}", stage.block)
    if isinstance(stage.attention, Attention):
        weights |= attention_weights(f"{prefix}.attentions.{index}", stage.attention)
    return weights


def as_diffusers(net, levels, num_blocks):
    """The state dict of diffusers' UNet2DModel with the weights of a UNet with resample="conv"."""
    weights = {}
    for ours, theirs in (("stem", "conv_in"), ("norm", "conv_norm_out"), ("out", "conv_out")):
        weights |= {f"{theirs}.{k}": v for k, v in getattr(net, ours).state_dict().items()}
    for ours, theirs in (("hidden", "linear_1"), ("out", "linear_2")):
        weights |= {f"time_embedding.{theirs}.{k}": v for k, v in getattr(net.conditioning, ours).state_dict().items()}
    encoder, decoder = list(net.encoder), list(net.decoder)
    for level in range(levels):
        if level:
            conv = encoder.pop(0)
            weights |= {f"down_blocks.{level - 1}.downsamplers.0.conv.{k}": v for k, v in conv.state_dict().items()}
        for i in range(num_blocks):
            weights |= stage_weights(f"down_blocks.{level}", i, encoder.pop(0))
        for i in range(num_blocks + 1):
            weights |= stage_weights(f"up_blocks.{level}", i, decoder.pop(0))
        if level < levels - 1:
            conv = decoder.pop(0)[1]
            weights |= {f"up_blocks.{level}.upsamplers.0.conv.{k}": v for k, v in conv.state_dict().items()}
    first, second = net.middle
    weights |= block_weights("mid_block.resnets.0", first.block) | block_weights("mid_block.resnets.1", second.block)
    return weights | attention_weights("mid_block.attentions.0", first.attention)


def test_equals_diffusers_on_the_same_weights():
    """The whole wiring of DDPM's layout, at 128 channels since there both libraries take 32 groups everywhere."""
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=2,
        out_channels=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=64,
        freq_shift=1,
        flip_sin_to_cos=True,
        block_out_channels=(128, 256, 256),
        layers_per_block=1,
    )
    torch.manual_seed(0)
    net = UNet(2, 16, 0, 128, (1, 2, 2), 1, (8,), head_channels=64, adaptive_scale=False)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.03 * torch.randn_like(p))
    peer.load_state_dict(as_diffusers(net, 3, 1))
    x, t = torch.randn(2, 2, 16, 16), torch.tensor([3.0, 900.0])
    with torch.no_grad():
        ours, theirs = net(x, t), peer(x, t).sample
    assert ours.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("resample", [None, "down", "up"])
@pytest.mark.parametrize("width", [8, 12])
def test_residual_block_is_its_formula(adaptive, resample, width):
    torch.manual_seed(0)
    layer = None if resample is None else Resample(resample)
    block = ResBlock(8, width, 6, adaptive_scale=adaptive, skip_scale=0.8, resample=layer).double().eval()
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(0.4 * torch.randn_like(p))
    x, emb = torch.randn(2, 8, 4, 4).double(), torch.randn(2, 6).double()
    resized = {
        None: lambda v: v,
        "down": lambda v: F.avg_pool2d(v, 2),
        "up": lambda v: F.interpolate(v, scale_factor=2),
    }
    change = resized[resample]
    y = F.silu(F.group_norm(x, block.norm0.num_groups, block.norm0.weight, block.norm0.bias))
    y = F.conv2d(change(y), block.conv0.weight, block.conv0.bias, padding=1)
    params = (emb @ block.affine.weight.T + block.affine.bias)[:, :, None, None]
    gamma, beta = block.norm1.weight, block.norm1.bias
    if adaptive:
        y = F.group_norm(y, block.norm1.num_groups, gamma, beta)
        y = y * (1 + params[:, :width]) + params[:, width:]
    else:
        y = F.group_norm(y + params, block.norm1.num_groups, gamma, beta)
    y = F.conv2d(F.silu(y), block.conv1.weight, block.conv1.bias, padding=1)
    straight = change(x)
    if resample or width != 8:
        straight = F.conv2d(straight, block.shortcut.weight, block.shortcut.bias)
    torch.testing.assert_close(block(x, emb), (straight + y) * 0.8, rtol=1e-9, atol=1e-9)


def test_the_stem_folds_squares_of_pixels_into_channels():
    """A patched network is the plain one on the unshuffled image, with what it predicts shuffled back."""
    torch.manual_seed(0)
    patched = UNet(2, 16, 0, 8, (1, 2), 1, (4,), patch_size=2)
    plain = UNet(8, 8, 0, 8, (1, 2), 1, (4,))
    with torch.no_grad():
        for p in patched.parameters():
            p.add_(0.05 * torch.randn_like(p))
    plain.load_state_dict(patched.state_dict())
    x, t = torch.randn(2, 2, 16, 16), torch.tensor([3.0, 900.0])
    folded = torch.stack([x[:, c, i::2, j::2] for c in range(2) for i in range(2) for j in range(2)], 1)
    small, out = plain(folded, t), patched(x, t)
    for c in range(2):
        for i in range(2):
            for j in range(2):
                torch.testing.assert_close(out[:, c, i::2, j::2], small[:, 4 * c + 2 * i + j])


def test_dropout_acts_in_training_alone():
    torch.manual_seed(0)
    net = UNet(1, 8, 0, 8, (1, 2), 1, (), dropout=0.5)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    x, t = torch.randn(1, 1, 8, 8), torch.zeros(1)
    assert not torch.equal(net(x, t), net(x, t))
    net.eval()
    assert torch.equal(net(x, t), net(x, t))
