r"""The U-Net: residual blocks conditioned on the noise level, with attention at low resolutions.

    image -> stem -> level 0 -> down -> level 1 -> ... -> middle -> ... -> level 1 -> up -> level 0 -> out
                        \________________ skip connections (concatenated) ________________/

One class holds the family that the field uses; its options span DDPM (Ho 2020), DDPM++ (Song 2021; Karras 2022), the
adaptive group norm of ADM (Dhariwal & Nichol 2021) and a pixel-unshuffle stem, and presets.py names the settings of the
papers. Each residual block computes

    y   = conv0(silu(norm(x)))                        (after resampling, where the block resamples)
    y   = (1 + scale(emb)) * norm(y) + shift(emb)     adaptive, or norm(y + shift(emb)) where adaptive_scale is off
    out = (shortcut(x) + conv1(dropout(silu(y)))) * skip_scale

and conv1, the attention's projection and the last convolution start at zero, so that blocks start as the identity and a
new network predicts zero.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_lit.checks import check_count, check_number, check_numbers
from diffusion_lit.nets.checks import require_image, require_level_sizes, require_levels, require_one_of, with_condition
from diffusion_lit.nets.layers import (
    Attention,
    Conditioning,
    GroupNorm,
    LinearAttention,
    NoiseEmbeddingName,
    Resample,
    ResampleName,
    downsample,
    initialise,
    recomputed,
    scaled_sum,
    upsample,
    zero_init,
)


class ResBlock(nn.Module):
    """Residual block of two 3x3 convolutions, modulated by the embedding.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        emb_channels: Length of the embedding, 0 for an unconditional block.
        dropout: Probability of dropping an activation before the second convolution.
        adaptive_scale: Modulate the normalised map by a scale and a shift (ADM), or add a shift before it (DDPM).
        skip_scale: Factor on the sum of the two branches.
        resample: A weightless resampling of both branches, whose shortcut is then always a 1x1 convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        dropout: float = 0.0,
        adaptive_scale: bool = True,
        skip_scale: float = 1.0,
        resample: Resample | None = None,
    ) -> None:
        super().__init__()
        self.adaptive_scale = adaptive_scale
        self.skip_scale = skip_scale
        self.resample = resample
        self.norm0 = GroupNorm(in_channels)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(emb_channels, out_channels * (2 if adaptive_scale else 1)) if emb_channels else None
        self.norm1 = GroupNorm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        keeps = in_channels == out_channels and resample is None
        self.shortcut = nn.Identity() if keeps else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor | None) -> Tensor:
        """Return (B, out_channels, H', W') from x (B, in_channels, H, W) and emb (B, emb_channels)."""
        y = F.silu(self.norm0(x))
        if self.resample is not None:
            x, y = self.resample(x), self.resample(y)
        y = self.modulate(self.conv0(y), emb)
        y = self.conv1(self.dropout(F.silu(y)))
        return scaled_sum(self.shortcut(x), y, self.skip_scale)

    def modulate(self, y: Tensor, emb: Tensor | None) -> Tensor:
        """Normalise y (B, C, H, W) under the embedding."""
        if self.affine is None:
            normalised: Tensor = self.norm1(y)
        elif self.adaptive_scale:
            normalised = self.norm1(y, *self.affine(emb).chunk(2, dim=1))
        else:
            normalised = self.norm1(y + self.affine(emb)[:, :, None, None].to(y.dtype))
        return normalised


class Stage(nn.Module):
    """A residual block, with or without attention after it."""

    def __init__(self, block: ResBlock, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, emb: Tensor | None) -> Tensor:
        """Return the feature map after the block and the attention."""
        x = self.block(x, emb)
        return x if self.attention is None else self.attention(x)


class UNet(nn.Module):
    """U-Net with noise, class and augmentation conditioning.

    Args:
        in_channels: Channels of the image, 1 or more.
        image_size: Height and width of the images it is meant for. Other sizes work in `forward` if the levels divide
            them; attention is placed by this one.
        num_classes: Number of classes, 0 for an unconditional network. Label `num_classes` is the null class.
        model_channels: Channels of the first level; level l has model_channels * channel_mult[l].
        channel_mult: Width of each level; the number of entries is the number of levels.
        num_blocks: Residual blocks per level on the way down; there is one more on the way up.
        attention_resolutions: Sizes of the feature maps (behind the stem, so image_size / patch_size is the largest)
            whose blocks are followed by self-attention; -1 is the smallest, -2 the one before it. None for 8 where a
            map has that size, and nowhere else. The middle has attention unless there is none at all.
        linear_attention_resolutions: The same, for attention of linear cost; suits the large feature maps.
        head_channels: Most channels that an attention head may have.
        dropout: Dropout probability in the residual blocks.
        patch_size: Side of the squares of pixels that the stem folds into channels (pixel unshuffle); 1 for none. Each
            doubling makes the network about four times cheaper.
        noise_embedding: "positional" for c_noise = t in [0, 1000), "fourier" for ln(sigma) / 4 or a flow time, "none"
            for a network that ignores c_noise.
        out_channels: Channels of the output; None for those of the image, twice as many for a learned variance.
        augment_dim: Length of the augmentation labels, 0 for none.
        adaptive_scale: Modulate by scale and shift (ADM) or by shift alone (DDPM).
        resample: "conv" (strided convolution down, nearest and convolution up), "pool" (average and nearest, no
            weights), "unshuffle" (pixel unshuffle and shuffle with 1x1 convolutions) or "block" (a residual block whose
            both branches are resampled).
        resample_filter: Filter of "pool" and "block", and of the upsampling in "conv"; (1, 1) is average and nearest.
        skip_scale: Factor on every residual sum: 1, or 0.7071 to keep the variance (DDPM++).
        decoder_attention: On the way up, attention behind "all" blocks of a level (DDPM) or its "last" (DDPM++).
        activation_checkpointing: Keep only the feature maps between blocks for the backward pass and compute what lies
            within a block again: less than half the memory, for about a third more time.
        takes_until: Whether the network is given a second noise level, the one that a step ends at (MeanFlow).
        condition_channels: Channels of a condition image, which is concatenated to the input; 0 for none.

    Raises:
        ValueError: An argument is out of range, or the levels do not divide the image size.

    Source: Ho 2020, arXiv 2006.11239, appendix B; Dhariwal & Nichol 2021, arXiv 2105.05233, section 3; Karras 2022,
    arXiv 2206.00364, appendix F.2 and table 7.
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int = 32,
        num_classes: int = 0,
        model_channels: int = 64,
        channel_mult: tuple[int, ...] = (1, 2, 2),
        num_blocks: int = 2,
        attention_resolutions: tuple[int, ...] | None = None,
        linear_attention_resolutions: tuple[int, ...] = (),
        head_channels: int = 32,
        dropout: float = 0.0,
        patch_size: int = 1,
        noise_embedding: NoiseEmbeddingName = "positional",
        out_channels: int | None = None,
        augment_dim: int = 0,
        adaptive_scale: bool = True,
        resample: ResampleName = "conv",
        resample_filter: tuple[float, ...] = (1, 1),
        skip_scale: float = 1.0,
        decoder_attention: Literal["all", "last"] = "all",
        activation_checkpointing: bool = False,
        takes_until: bool = False,
        condition_channels: int = 0,
    ) -> None:
        super().__init__()
        self.takes_until = takes_until
        self.activation_checkpointing = activation_checkpointing
        out_channels = in_channels if out_channels is None else out_channels
        check_count(
            in_channels=in_channels,
            image_size=image_size,
            out_channels=out_channels,
            model_channels=model_channels,
            num_blocks=num_blocks,
            patch_size=patch_size,
            head_channels=head_channels,
        )
        check_count(0, num_classes=num_classes, augment_dim=augment_dim, condition_channels=condition_channels)
        check_number(least=0, below=1, dropout=dropout)
        check_number(above=0, skip_scale=skip_scale)
        check_numbers("resample_filter", resample_filter)
        require_one_of("resample", resample, get_args(ResampleName))
        require_one_of("decoder_attention", decoder_attention, ("all", "last"))
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.image_size = image_size
        self.num_classes = num_classes
        self.augment_dim = augment_dim
        self.condition_channels = condition_channels
        self.patch_size = patch_size
        self.size_multiple = require_level_sizes(image_size, patch_size, channel_mult)

        informed = noise_embedding != "none" or num_classes > 0 or augment_dim > 0 or takes_until
        emb_channels = 4 * model_channels if informed else 0
        self.conditioning = (
            Conditioning(
                model_channels, emb_channels, noise_embedding, num_classes, augment_dim, takes_until=takes_until
            )
            if informed
            else None
        )

        def block(cin: int, cout: int, resample: Resample | None = None) -> ResBlock:
            return ResBlock(cin, cout, emb_channels, dropout, adaptive_scale, skip_scale, resample)

        def resampling(channels: int, direction: Literal["down", "up"]) -> nn.Module:
            if resample == "block":
                return Stage(block(channels, channels, Resample(direction, resample_filter)))
            return (downsample if direction == "down" else upsample)(channels, resample, resample_filter)

        def attention(channels: int, size: int) -> nn.Module | None:
            if size in full:
                return Attention(channels, head_channels, skip_scale)
            if size in linear:
                return LinearAttention(channels, head_channels, skip_scale)
            return None

        widths = [model_channels * mult for mult in channel_mult]
        sizes = [image_size // patch_size // 2**level for level in range(len(widths))]
        if attention_resolutions is None:
            attention_resolutions = (8,) if 8 in sizes else ()
        full = require_levels("attention_resolutions", attention_resolutions, sizes)
        linear = require_levels("linear_attention_resolutions", linear_attention_resolutions, sizes)
        self.stem = nn.Conv2d((in_channels + condition_channels) * patch_size**2, model_channels, 3, padding=1)
        channels = model_channels
        skips = [channels]
        self.encoder = nn.ModuleList()
        for level, (width, size) in enumerate(zip(widths, sizes, strict=True)):
            if level:
                self.encoder.append(resampling(channels, "down"))
                skips.append(channels)
            for _ in range(num_blocks):
                self.encoder.append(Stage(block(channels, width), attention(width, size)))
                channels = width
                skips.append(channels)

        middle = Attention(channels, head_channels, skip_scale) if full or linear else None
        self.middle = nn.ModuleList([Stage(block(channels, channels), middle), Stage(block(channels, channels))])

        self.decoder = nn.ModuleList()
        self.takes_skip: list[bool] = []
        for level in reversed(range(len(widths))):
            for index in range(num_blocks + 1):
                attends = decoder_attention == "all" or index == num_blocks
                self.decoder.append(
                    Stage(
                        block(channels + skips.pop(), widths[level]),
                        attention(widths[level], sizes[level]) if attends else None,
                    )
                )
                self.takes_skip.append(True)
                channels = widths[level]
            if level:
                self.decoder.append(resampling(channels, "up"))
                self.takes_skip.append(False)
        self.norm = GroupNorm(channels)
        self.out = zero_init(nn.Conv2d(channels, out_channels * patch_size**2, 3, padding=1))
        initialise(self)

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        label: Tensor | None = None,
        augment: Tensor | None = None,
        condition: Tensor | None = None,
        *,
        until: Tensor | None = None,
    ) -> Tensor:
        """Predict from noisy images.

        Args:
            x: Images, shape (B, in_channels, H, W), H and W multiples of `size_multiple`.
            noise: c_noise, shape (B,).
            label: Class indices int64, shape (B,), values 0 to num_classes; None for the null class.
            augment: Augmentation labels, shape (B, augment_dim); None for images that were not augmented.
            until: c_noise of the second noise level, shape (B,), for a network that takes it; None for the first one.
            condition: Condition images, shape (B, condition_channels, H, W); None for the null condition, zeros.

        Returns:
            The prediction, shape (B, out_channels, H, W).

        Raises:
            ValueError: The levels do not divide the image's size, the channels differ, or a condition is given that
                the network was built without.
        """
        require_image(x, self.in_channels, self.size_multiple)
        x = with_condition(x, condition, self.condition_channels)
        if self.conditioning is not None:
            emb = self.conditioning(noise, label, augment, until)
        elif label is None and augment is None and until is None:
            emb = None
        else:
            raise ValueError("This network was built without conditions; set num_classes, augment_dim or takes_until.")
        x = self.stem(F.pixel_unshuffle(x, self.patch_size))
        skips = [x]
        for layer in self.encoder:
            x = self.run(layer, emb, x)
            skips.append(x)
        for layer in self.middle:
            x = self.run(layer, emb, x)
        for layer, takes_skip in zip(self.decoder, self.takes_skip, strict=True):
            x = self.run(layer, emb, x, skips.pop() if takes_skip else None)
        return F.pixel_shuffle(self.out(F.silu(self.norm(x))), self.patch_size)

    def run(self, layer: nn.Module, emb: Tensor | None, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Run a stage or a resampling on x and a skip connection; activation checkpointing keeps only these.

        Args:
            layer: The stage or resampling.
            emb: The embedding of the conditions, shape (B, emb_channels).
            x: Feature map, shape (B, C, H, W).
            skip: Feature map that joins it, shape (B, C', H, W), or None.

        Returns:
            The feature map behind the layer.
        """

        def compute(x: Tensor, skip: Tensor | None) -> Tensor:
            x = x if skip is None else torch.cat([x, skip], dim=1)
            made: Tensor = layer(x, emb) if isinstance(layer, Stage) else layer(x)
            return made

        if self.activation_checkpointing and torch.is_grad_enabled():
            return recomputed(compute, x, skip)
        return compute(x, skip)
