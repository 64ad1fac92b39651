"""A discriminator that judges patches of an image: the adversary of an autoencoder.

    x (B, C, H, W) -> logits (B, 1, H / 2^levels, W / 2^levels), high where a patch looks like a photograph's

Each logit sees a patch alone, so that it judges texture and sharpness and leaves the content to the reconstruction. It
has group norm instead of batch norm: an image's logits depend on no other image, and so neither on ranks nor on the
batch that it came in.
"""

import torch
from torch import Tensor, nn

from diffusion_lit.checks import check_count
from diffusion_lit.nets.checks import require_image
from diffusion_lit.nets.layers import GroupNorm

SLOPE = 0.2


class PatchDiscriminator(nn.Module):
    """Strided convolutions from an image to a map of logits.

    Args:
        in_channels: Channels of an image.
        model_channels: Channels of the first level; each further one has twice as many, at most 8 times.
        levels: Levels, each of which halves the map; 2 give logits of patches of 26 pixels, 3 of 54.

    Raises:
        ValueError: If a number is out of range.

    Source: Isola 2017, arXiv 1611.07004, section 3.2.2 (whose widths these are not).
    """

    def __init__(self, in_channels: int, model_channels: int = 32, levels: int = 2) -> None:
        super().__init__()
        check_count(in_channels=in_channels, model_channels=model_channels, levels=levels)
        self.in_channels = in_channels
        self.factor = 2**levels
        widths = [model_channels * min(2**level, 8) for level in range(levels + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        for level in range(1, levels + 1):
            kernel, stride = (4, 2) if level < levels else (3, 1)
            layers.append(nn.Conv2d(widths[level - 1], widths[level], kernel, stride, padding=1))
            layers += [GroupNorm(widths[level]), nn.LeakyReLU(SLOPE)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the patches of images.

        Args:
            x: Images (B, in_channels, H, W) in [-1, 1], H and W multiples of `factor`.

        Returns:
            Logits (B, 1, H / factor, W / factor), float32.

        Raises:
            ValueError: If the images have another number of channels or a side that the factor does not divide.
        """
        require_image(x, self.in_channels, self.factor)
        logits: Tensor = self.layers(x)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
