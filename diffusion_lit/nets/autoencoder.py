"""The autoencoder: images to latents, a Gaussian or codes, and latents back to images.

    encoder:     x (B, C, H, W) -> h (B, k c, H/f, W/f)
    bottleneck:  h -> the distribution of z (B, c, H/f, W/f), by default mean and log-variance of a Gaussian (k = 2)
    decoder:     z -> x (B, C, H, W)

Both are residual stages, self-attention at the bottom. The spatial factor f is patch_size * 2^(levels - 1): a stem
folds squares of patch_size pixels into channels, which costs least on a CPU, and each level beyond the first halves the
map once more.

With q = N(mean, std^2) and the prior N(0, 1) the divergence has a closed form, summed over the entries of z:

    KL(q || p) = sum (mean^2 + std^2 - 1 - ln std^2) / 2        (Kingma & Welling 2014, arXiv 1312.6114, appendix B)

Any network with `encode(x) -> Posterior`, `decode(z) -> x`, the attributes in_channels, latent_channels and factor, and
`config` (its constructor's arguments) can replace this one. A second training phase (`VAE.frozen_encoder`) also asks
for its `encoder`, an adversary for `last_layer`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from diffusion_lit.checks import check_count, check_number
from diffusion_lit.nets.bottlenecks import Bottleneck, Codes, GaussianBottleneck
from diffusion_lit.nets.bottlenecks import Posterior as Posterior
from diffusion_lit.nets.checks import arguments_in, require_image, require_level_sizes
from diffusion_lit.nets.layers import Attention, GroupNorm, downsample, initialise, upsample
from diffusion_lit.nets.unet import ResBlock


class Half(nn.Module):
    """Base of encoder and decoder: residual blocks per level, resampling between, attention at the bottom.

    Args:
        widths: Channels of each level in the order of passage.
        num_blocks: Residual blocks per level.
        down: Whether the map is halved (encoder) or doubled (decoder) between levels.
        attention: Whether the bottom has self-attention.
        head_channels: Most channels of an attention head.
        dropout: Dropout probability of the residual blocks.
    """

    def __init__(
        self, widths: list[int], num_blocks: int, down: bool, attention: bool, head_channels: int, dropout: float
    ) -> None:
        super().__init__()
        bottom_width = widths[-1] if down else widths[0]
        bottom: list[nn.Module] = [ResBlock(bottom_width, bottom_width, 0, dropout)]
        if attention:
            bottom.append(Attention(bottom_width, head_channels))
        stages: list[nn.Module] = []
        channels = widths[0]
        for level, width in enumerate(widths):
            if level:
                stages.append((downsample if down else upsample)(channels, "conv"))
            for _ in range(num_blocks):
                stages.append(ResBlock(channels, width, 0, dropout))
                channels = width
        self.layers = nn.ModuleList([*stages, *bottom] if down else [*bottom, *stages])

    def forward(self, x: Tensor) -> Tensor:
        """Returns the feature map at the other end."""
        for layer in self.layers:
            x = layer(x, None) if isinstance(layer, ResBlock) else layer(x)
        return x


class Autoencoder(nn.Module):
    """Residual convolutional autoencoder.

    Args:
        in_channels: Channels of an image, any number.
        image_size: Side of the images in pixels, a multiple of the spatial factor.
        latent_channels: Channels c of a latent.
        model_channels: Channels of the first level; level l has model_channels * channel_mult[l].
        channel_mult: Width of each level; each beyond the first halves the map.
        num_blocks: Residual blocks per level, in the encoder and in the decoder.
        patch_size: Side of the squares of pixels that the stem folds into channels; 1 for none.
        attention: Whether the bottom has self-attention.
        head_channels: Most channels of an attention head.
        dropout: Dropout probability in the residual blocks.
        bottleneck: What stands between encoder and decoder: `FSQ` or `VQ` for codes; by default a Gaussian (KL).

    Raises:
        ValueError: If an argument is out of range or the spatial factor does not divide the image size.

    Source: Rombach 2022, arXiv 2112.10752, section 3.1 and appendix G (whose stem and widths these are not).
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int = 32,
        latent_channels: int = 4,
        model_channels: int = 32,
        channel_mult: tuple[int, ...] = (1, 2, 2),
        num_blocks: int = 1,
        patch_size: int = 1,
        attention: bool = True,
        head_channels: int = 32,
        dropout: float = 0.0,
        bottleneck: Bottleneck | None = None,
    ) -> None:
        super().__init__()
        self.config = arguments_in(locals())
        self.config |= {
            "channel_mult": list(channel_mult),
            "bottleneck": None if bottleneck is None else part(bottleneck),
        }
        check_count(
            in_channels=in_channels,
            image_size=image_size,
            latent_channels=latent_channels,
            model_channels=model_channels,
            num_blocks=num_blocks,
            patch_size=patch_size,
            head_channels=head_channels,
        )
        check_number(least=0, below=1, dropout=dropout)
        self.in_channels = in_channels
        self.image_size = image_size
        self.latent_channels = latent_channels
        self.patch_size = patch_size
        self.factor = require_level_sizes(image_size, patch_size, channel_mult)
        self.bottleneck = bottleneck or GaussianBottleneck()
        self.bottleneck.attach(latent_channels)

        widths = [model_channels * mult for mult in channel_mult]
        pixels = in_channels * patch_size**2
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(patch_size),
            nn.Conv2d(pixels, widths[0], 3, padding=1),
            Half(widths, num_blocks, True, attention, head_channels, dropout),
            GroupNorm(widths[-1]),
            nn.SiLU(),
            nn.Conv2d(widths[-1], self.bottleneck.width * latent_channels, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, widths[-1], 3, padding=1),
            Half(widths[::-1], num_blocks, False, attention, head_channels, dropout),
            GroupNorm(widths[0]),
            nn.SiLU(),
            nn.Conv2d(widths[0], pixels, 3, padding=1),
            nn.PixelShuffle(patch_size),
        )
        initialise(self)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (c, h, w) of the latent of an image of `image_size`."""
        side = self.image_size // self.factor
        return (self.latent_channels, side, side)

    @property
    def last_layer(self) -> Tensor:
        """The weight of the decoder's last convolution."""
        convolution = self.decoder[-2]
        assert isinstance(convolution, nn.Conv2d)
        return convolution.weight

    def encode(self, x: Tensor) -> Posterior | Codes:
        """The distribution of the latent of each image.

        Args:
            x: Images (B, in_channels, H, W) in [-1, 1], H and W multiples of `factor`.

        Returns:
            Mean and standard deviation, each (B, latent_channels, H / factor, W / factor), in float32 or wider.

        Raises:
            ValueError: If the images have another number of channels or a side that the factor does not divide.
        """
        require_image(x, self.in_channels, self.factor)
        h = self.encoder(x)
        made: Posterior | Codes = self.bottleneck(h.to(torch.promote_types(h.dtype, torch.float32)))
        return made

    def decode(self, z: Tensor) -> Tensor:
        """Images from latents.

        Args:
            z: Latents (B, latent_channels, h, w); of a bottleneck of codes the nearest ones are taken.

        Returns:
            Images (B, in_channels, h * factor, w * factor), in [-1, 1] up to overshoot.

        Raises:
            ValueError: If the latents have another number of channels.
        """
        require_image(z, self.latent_channels, 1)
        x: Tensor = self.decoder(self.bottleneck.nearest(z))
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W), encoded to the mean of their latents and decoded."""
        return self.decode(self.encode(x).mean)


def part(built: Any) -> dict[str, Any]:
    """The description of a part of a network, as plain values.

    Args:
        built: The part, whose `config` holds its arguments.

    Returns:
        `class_path` and `init_args`.
    """
    return {"class_path": f"{type(built).__module__}.{type(built).__qualname__}", "init_args": dict(built.config)}
