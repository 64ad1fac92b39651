"""The magnitude-preserving U-Net of EDM2 (configuration G): `magnitude`'s layers, and no normalisation of maps but one.

A block on the way down is, with c the gain that the embedding gives each channel,

    x = unit(conv1x1(x));    x = sum(x, conv3x3(silu(c * conv3x3(silu(x)))))

and on the way up the same without `unit`, of x concatenated with the map of the way down. Attention may follow. A
channel of ones joins the input, since no layer has a bias; gains of the embedding and of the output are learned from 0,
so that a new network predicts zero.

Source: Karras et al. 2024, arXiv 2312.02696, section 2 and figure 21.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_lit.checks import check_count, check_number
from diffusion_lit.nets.checks import require_image, require_level_sizes, require_levels
from diffusion_lit.nets.layers import Resample, recomputed
from diffusion_lit.nets.magnitude import BALANCE, MPAttention, MPConditioning, MPConv, mp_cat, mp_silu, mp_sum, unit

LARGEST = 256.0  # of an activation, for half precision


class MPBlock(nn.Module):
    """Residual block of two 3x3 convolutions under the embedding, with or without attention after it.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        emb_channels: Length of the embedding.
        down: Whether the block is of the way down, whose maps are normalised.
        resample: Resampling before the block.
        attention: Attention after it.
        dropout: Probability of dropping an activation before the second convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        down: bool,
        resample: Resample | None = None,
        attention: MPAttention | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.down = down
        self.resample, self.attention = resample, attention
        self.gain = nn.Parameter(torch.zeros(()))
        self.affine = MPConv(emb_channels, out_channels)
        self.conv0 = MPConv(out_channels if down else in_channels, out_channels, 3)
        self.conv1 = MPConv(out_channels, out_channels, 3)
        self.shortcut = None if in_channels == out_channels else MPConv(in_channels, out_channels, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        """Return (B, out_channels, H', W') from x (B, C, H, W), emb (B, emb_channels) and the map of the way down."""
        x = x if self.resample is None else self.resample(x)
        x = x if skip is None else mp_cat(x, skip)
        short = x if self.shortcut is None else self.shortcut(x)
        if self.down:
            x = short = unit(short, (1,))
        y = self.conv0(mp_silu(x))
        gain = self.affine(emb, self.gain) + 1
        y = self.conv1(self.dropout(mp_silu(y * gain[:, :, None, None].to(y.dtype))))
        x = mp_sum(short, y, BALANCE)
        x = x if self.attention is None else self.attention(x)
        return x.clamp(-LARGEST, LARGEST)


class MPUNet(nn.Module):
    """Magnitude-preserving U-Net with noise, class and augmentation conditioning, for c_noise of the order of one.

    Train it without weight decay and at a learning rate of about 0.01, which falls towards the end.

    Args:
        in_channels: Channels of the image.
        image_size: Height and width of the images it is meant for; others work if the levels divide them.
        num_classes: Number of classes, 0 for an unconditional network. Label `num_classes` is the null class.
        model_channels: Channels of the first level; level l has model_channels * channel_mult[l].
        channel_mult: Width of each level; the number of entries is the number of levels.
        num_blocks: Blocks per level on the way down; there is one more on the way up.
        attention_resolutions: Sizes of the feature maps whose blocks are followed by attention; -1 is the smallest.
        head_channels: Most channels that an attention head may have.
        dropout: Dropout probability in the blocks.
        patch_size: Side of the squares of pixels that are folded into channels; 1 for none.
        out_channels: Channels of the output; None for those of the image.
        augment_dim: Length of the augmentation labels, 0 for none.
        activation_checkpointing: Keep only the maps between blocks for the backward pass.

    Raises:
        ValueError: An argument is out of range, or the levels do not divide the image size.

    Source: Karras et al. 2024, arXiv 2312.02696, section 2, configuration G.
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int = 32,
        num_classes: int = 0,
        model_channels: int = 64,
        channel_mult: tuple[int, ...] = (1, 2, 2),
        num_blocks: int = 2,
        attention_resolutions: tuple[int, ...] = (),
        head_channels: int = 64,
        dropout: float = 0.0,
        patch_size: int = 1,
        out_channels: int | None = None,
        augment_dim: int = 0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        check_count(in_channels=in_channels, image_size=image_size, out_channels=out_channels)
        check_count(num_blocks=num_blocks, patch_size=patch_size, head_channels=head_channels)
        check_count(4, model_channels=model_channels)
        check_count(0, num_classes=num_classes, augment_dim=augment_dim)
        check_number(least=0, below=1, dropout=dropout)
        self.in_channels, self.out_channels, self.image_size = in_channels, out_channels, image_size
        self.num_classes, self.augment_dim, self.patch_size = num_classes, augment_dim, patch_size
        self.activation_checkpointing = activation_checkpointing
        self.size_multiple = require_level_sizes(image_size, patch_size, channel_mult)
        widths = [model_channels * mult for mult in channel_mult]
        sizes = [image_size // patch_size // 2**level for level in range(len(widths))]
        attends = require_levels("attention_resolutions", attention_resolutions, sizes)
        emb_channels = 4 * model_channels
        self.conditioning = MPConditioning(2 * (model_channels // 2), emb_channels, num_classes, augment_dim)
        self.stem = MPConv(in_channels * patch_size**2 + 1, model_channels, 3)

        def block(cin: int, cout: int, down: bool, size: int, turn: str = "", attend: bool | None = None) -> MPBlock:
            attend = size in attends if attend is None else attend
            mix = MPAttention(cout, head_channels) if attend else None
            resample = Resample("down" if turn == "down" else "up") if turn else None
            return MPBlock(cin, cout, emb_channels, down, resample, mix, dropout)

        channels, skips = model_channels, [model_channels]
        self.encoder = nn.ModuleList()
        for level, (width, size) in enumerate(zip(widths, sizes, strict=True)):
            if level:
                self.encoder.append(block(channels, channels, True, size, "down", False))
                skips.append(channels)
            for _ in range(num_blocks):
                self.encoder.append(block(channels, width, True, size))
                channels = width
                skips.append(channels)
        self.middle = nn.ModuleList(
            [block(channels, channels, False, 0, "", bool(attends)), block(channels, channels, False, 0, "", False)]
        )
        self.decoder = nn.ModuleList()
        self.takes_skip: list[bool] = []
        for level in reversed(range(len(widths))):
            for _ in range(num_blocks + 1):
                self.decoder.append(block(channels + skips.pop(), widths[level], False, sizes[level]))
                self.takes_skip.append(True)
                channels = widths[level]
            if level:
                self.decoder.append(block(channels, channels, False, sizes[level], "up", False))
                self.takes_skip.append(False)
        self.out = MPConv(channels, out_channels * patch_size**2, 3)
        self.out_gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, noise: Tensor, label: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """Predict (B, out_channels, H, W) from noisy images of unit variance; see `UNet.forward`."""
        require_image(x, self.in_channels, self.size_multiple)
        emb = self.conditioning(noise, label, augment)
        x = F.pixel_unshuffle(x, self.patch_size)
        x = self.stem(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))
        skips = [x]
        for layer in self.encoder:
            x = self.run(layer, x, emb)
            skips.append(x)
        for layer in self.middle:
            x = self.run(layer, x, emb)
        for layer, takes_skip in zip(self.decoder, self.takes_skip, strict=True):
            x = self.run(layer, x, emb, skips.pop() if takes_skip else None)
        return F.pixel_shuffle(self.out(x, self.out_gain), self.patch_size)

    def run(self, layer: nn.Module, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        """Run a block; activation checkpointing keeps only what it is given."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return recomputed(layer, x, emb, skip)
        made: Tensor = layer(x, emb, skip)
        return made
