"""Networks with the settings of the papers, by name, for `class_path: diffusion_lit.nets.NAME` in a config.

A test checks each parameter count to the digits that the paper prints:

| name        | for                            | parameters | source                                        |
| ----------- | ------------------------------ | ---------- | --------------------------------------------- |
| DDPMCIFAR10 | CIFAR-10, t in [0, 1000)       | 35.7M      | Ho 2020, arXiv 2006.11239, appendix B         |
| DDPMpp      | CIFAR-10, EDM's "DDPM++"       | 55.7M      | Karras 2022, arXiv 2206.00364, table 7        |
| DiT_S_2     | latents of ImageNet            | 33M        | Peebles & Xie 2023, arXiv 2212.09748, table 1 |
| DiT_B_2     | latents of ImageNet            | 130M       | as above                                      |

The counts hold for the paper's image channels, classes and augmentation labels, which the data set's settings override.
What a preset leaves open are arguments of `UNet` or `DiT`.
"""

from typing import Any

from diffusion_lit.nets.dit import DiT
from diffusion_lit.nets.unet import UNet


def _at_16(image_size: int, channel_mult: tuple[int, ...]) -> tuple[int, ...]:
    """Attention at feature maps of 16, or none where images of this size have no such map."""
    return (16,) if 16 in [image_size // 2**level for level in range(len(channel_mult))] else ()


class DDPMCIFAR10(UNet):
    """The U-Net of DDPM on CIFAR-10: 128 to 256 channels at 32, 16, 8 and 4 pixels, attention at 16. 35.7M parameters.

    Args:
        in_channels: Channels of the image.
        image_size: Height and width of the images, a multiple of 8.
        num_classes: Number of classes, 0 for unconditional as in the paper.
        dropout: Dropout probability; the paper's is 0.1.
        options: Further arguments of `UNet`.

    Source: Ho 2020, arXiv 2006.11239, appendix B.
    """

    def __init__(
        self, in_channels: int = 3, image_size: int = 32, num_classes: int = 0, dropout: float = 0.1, **options: Any
    ) -> None:
        super().__init__(
            in_channels=in_channels,
            image_size=image_size,
            num_classes=num_classes,
            model_channels=128,
            channel_mult=(1, 2, 2, 2),
            num_blocks=2,
            attention_resolutions=_at_16(image_size, (1, 2, 2, 2)),
            head_channels=256,
            dropout=dropout,
            adaptive_scale=False,
            resample="conv",
            decoder_attention="all",
            **options,
        )


class DDPMpp(UNet):
    """The "DDPM++" U-Net as the EDM paper trains it on CIFAR-10: 256 channels at 32, 16 and 8 pixels. 55.7M parameters.

    Four residual blocks per level, attention of one head at 16, resampling inside residual blocks, residual sums scaled
    by sqrt(1/2), augmentation labels. For the paper's 64x64 data sets: channel_mult (1, 2, 2, 2), dropout 0.05 to 0.25.
    Its noise embedding is "positional", also for c_noise = ln(sigma) / 4.

    Args:
        in_channels: Channels of the image.
        image_size: Height and width of the images.
        num_classes: Number of classes, 0 for unconditional.
        dropout: Dropout probability; the paper's is 0.13 on CIFAR-10.
        channel_mult: Width of each level, in units of 128 channels.
        augment_dim: Length of the augmentation labels; the paper's is 9, and 0 leaves them out.
        options: Further arguments of `UNet`.

    Source: Song 2021, arXiv 2011.13456, appendix H; Karras 2022, arXiv 2206.00364, table 7 and appendix F.2.
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int = 32,
        num_classes: int = 0,
        dropout: float = 0.13,
        channel_mult: tuple[int, ...] = (2, 2, 2),
        augment_dim: int = 9,
        **options: Any,
    ) -> None:
        super().__init__(
            in_channels=in_channels,
            image_size=image_size,
            num_classes=num_classes,
            model_channels=128,
            channel_mult=channel_mult,
            num_blocks=4,
            attention_resolutions=_at_16(image_size, channel_mult),
            head_channels=256,
            dropout=dropout,
            augment_dim=augment_dim,
            adaptive_scale=False,
            resample="block",
            resample_filter=(1, 1),
            skip_scale=0.5**0.5,
            decoder_attention="last",
            **options,
        )


class PlainUNet(UNet):
    """A U-Net without a noise embedding: the same network at every sigma.

    For single-step denoisers and degradations without sigma. It takes c_noise and ignores it.

    Args:
        in_channels: Channels of the image.
        image_size: Height and width of the images.
        num_classes: Number of classes, 0 for an unconditional network.
        model_channels: Channels of the first level.
        attention_resolutions: Sizes of the feature maps with self-attention; empty for a purely convolutional network.
        options: Further arguments of `UNet`.
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int = 32,
        num_classes: int = 0,
        model_channels: int = 32,
        attention_resolutions: tuple[int, ...] = (),
        **options: Any,
    ) -> None:
        super().__init__(
            in_channels=in_channels,
            image_size=image_size,
            num_classes=num_classes,
            model_channels=model_channels,
            attention_resolutions=attention_resolutions,
            noise_embedding="none",
            **options,
        )


class _DiT_2(DiT):
    """A DiT of 12 blocks over patches of 2x2 whose heads have 64 channels.

    Args:
        in_channels: Channels of the image or latent.
        image_size: Height and width of it, a multiple of 2.
        num_classes: Number of classes, 0 for an unconditional network.
        options: Further arguments of `DiT`.
    """

    heads: int

    def __init__(self, in_channels: int = 4, image_size: int = 32, num_classes: int = 1000, **options: Any) -> None:
        super().__init__(
            in_channels=in_channels,
            image_size=image_size,
            num_classes=num_classes,
            patch_size=2,
            hidden_channels=64 * self.heads,
            depth=12,
            num_heads=self.heads,
            **options,
        )


class DiT_S_2(_DiT_2):
    """DiT-S/2: 12 blocks of 384 channels and 6 heads over patches of 2x2. 33M parameters.

    The defaults are the paper's: latents of 4x32x32, the 1,000 classes of ImageNet. The paper also learns the variance:
    out_channels=8.

    Source: Peebles & Xie 2023, arXiv 2212.09748, table 1.
    """

    heads = 6


class DiT_B_2(_DiT_2):
    """DiT-B/2: 12 blocks of 768 channels and 12 heads over patches of 2x2. 130M parameters; see `DiT_S_2`.

    Source: Peebles & Xie 2023, arXiv 2212.09748, table 1.
    """

    heads = 12
