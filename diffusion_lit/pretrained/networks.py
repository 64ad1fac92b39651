"""diffusers' U-Nets as networks of a `Denoiser`: called as `net(image, step, label) -> prediction`.

The step is that of the model's schedule, and real-valued where a sampler asks between two of them, as these networks'
sinusoidal embeddings allow. A label is a class, or the row of a prompt's embedding in a table whose last row, the null
class, is the embedding of the empty or negative prompt.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

WHOLE = 1e-3  # of a step: what is nearer to a whole one than this is that one, which float32 levels miss by less


class PlainNet(nn.Module):
    """A U-Net without conditions.

    Args:
        unet: diffusers' UNet2DModel.
        channels: Channels of its output that are read: C, or 2 C where it learned the variance.

    Attributes:
        num_classes: 0.
    """

    def __init__(self, unet: nn.Module, channels: int) -> None:
        super().__init__()
        self.unet: Any = unet
        self.channels = channels
        self.num_classes = 0

    def forward(self, x: Tensor, step: Tensor, label: Tensor | None = None) -> Tensor:
        """Predicts.

        Args:
            x: Noisy images x_t of unit variance, shape (B, C, H, W).
            step: Steps of the schedule, shape (B,).
            label: Classes (B,), or None for the null class.

        Returns:
            The prediction, shape (B, channels, H, W).
        """
        nearest = step.round()
        step = torch.where((step - nearest).abs() < WHOLE, nearest, step)
        output: Tensor = self.unet(*self.image(x), step, **self.condition(x, label), return_dict=False)[0]
        return output[:, : self.channels]

    def image(self, x: Tensor) -> tuple[Tensor]:
        """What the U-Net sees of the image."""
        return (x,)

    def condition(self, x: Tensor, label: Tensor | None) -> dict[str, Tensor]:
        """What the U-Net is given beside image and step."""
        return {}


class ClassNet(PlainNet):
    """A U-Net with an embedding of classes, none of which is a null class.

    Args:
        unet: diffusers' UNet2DModel with num_class_embeds.
        channels: As for `PlainNet`.
        num_classes: Number of its classes.
    """

    def __init__(self, unet: nn.Module, channels: int, num_classes: int) -> None:
        super().__init__(unet, channels)
        self.num_classes = num_classes

    def condition(self, x: Tensor, label: Tensor | None) -> dict[str, Tensor]:
        """The classes.

        Raises:
            ValueError: If there are none, or one is the null class.
        """
        if label is None or bool((label == self.num_classes).any()):
            raise ValueError(
                f"This pretrained model has {self.num_classes} classes and no null class: name a class for every "
                "image, and leave cfg_scale at 1."
            )
        return {"class_labels": label}


class TextNet(PlainNet):
    """A U-Net conditioned on prompts.

    Args:
        unet: diffusers' UNet2DConditionModel.
        channels: As for `PlainNet`.
        embeddings: One for each prompt and the null one as the last, shape (P + 1, L, D).
    """

    embeddings: Tensor

    def __init__(self, unet: nn.Module, channels: int, embeddings: Tensor) -> None:
        super().__init__(unet, channels)
        self.num_classes = len(embeddings) - 1
        self.register_buffer("embeddings", embeddings, persistent=False)

    def condition(self, x: Tensor, label: Tensor | None) -> dict[str, Tensor]:
        """The prompts' embeddings."""
        chosen = torch.full((len(x),), self.num_classes, device=x.device) if label is None else label
        return {"encoder_hidden_states": self.embeddings[chosen].to(x.dtype)}


class UpsamplingNet(TextNet):
    """A U-Net conditioned on prompts and on the small image that it enlarges.

    Args:
        unet: diffusers' UNet2DConditionModel with 2 C input channels and class_embed_type "timestep".
        channels: As for `PlainNet`.
        embeddings: As for `TextNet`.
    """

    def __init__(self, unet: nn.Module, channels: int, embeddings: Tensor) -> None:
        super().__init__(unet, channels, embeddings)
        self.small: Tensor | None = None
        self.level = 0

    def show(self, small: Tensor, level: int) -> None:
        """Binds the images of the batch that will be sampled.

        Args:
            small: The small images, enlarged and noised, shape (B, C, H, W).
            level: The step of the schedule that they were noised to.
        """
        self.small, self.level = small, level

    def image(self, x: Tensor) -> tuple[Tensor]:
        """The image beside the small image; guidance calls with the whole batch twice over."""
        assert self.small is not None and len(x) % len(self.small) == 0
        return (torch.cat([x, self.small.to(x).repeat(len(x) // len(self.small), 1, 1, 1)], dim=1),)

    def condition(self, x: Tensor, label: Tensor | None) -> dict[str, Tensor]:
        """The prompts' embeddings and the noise level of the small image."""
        levels = torch.full((len(x),), self.level, device=x.device)
        return {**super().condition(x, label), "class_labels": levels}


def enlarge(images: Tensor, height: int, width: int) -> Tensor:
    """Small images at the size of large ones, as IF's second stage is trained to see them.

    Args:
        images: Shape (B, C, h, w).
        height: Height of the large ones.
        width: Their width.

    Returns:
        Shape (B, C, height, width), bilinear between the centres of the corner pixels.
    """
    return interpolate(images, (height, width), mode="bilinear", align_corners=True)
