"""Shared by the tasks: checks of arguments, and the device of a model.

The tasks take and return images. A model of latents encodes and decodes; for a pixel model both are the identity. The
model must be in eval mode.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_lit.diffusion.generate import Sampling, check_labels, refuse_clipping
from diffusion_lit.diffusion.models import LatentModel, PixelModel
from diffusion_lit.words import counted


def need_pixels(model: PixelModel, task: str) -> None:
    """Refuses a model of latents.

    Args:
        model: The model.
        task: What was asked for, to begin the sentence with.

    Raises:
        ValueError: If the model denoises latents.
    """
    if isinstance(model, LatentModel):
        raise ValueError(
            f"{task} needs a model of pixels, since a latent turned round or blurred is not the latent of the image "
            "turned round or blurred; give a checkpoint of DDPM or EDM."
        )


def device_of(model: PixelModel) -> torch.device:
    """Where a model's weights are."""
    tensors = [*model.denoiser.parameters(), *model.denoiser.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def settings(model: PixelModel, sampling: Sampling | None) -> Sampling:
    """The settings given, or the model's own.

    Args:
        model: The model.
        sampling: Other settings than its own.

    Returns:
        The settings.

    Raises:
        ValueError: If they clip the latents of a model of latents.
    """
    sampling = sampling or model.sampling
    if isinstance(model, LatentModel):
        refuse_clipping(sampling)
    return sampling


def check_images(model: PixelModel, images: Tensor) -> Tensor:
    """Images on the model's device.

    Args:
        model: The model.
        images: Images (B, C, H, W) in [-1, 1].

    Returns:
        The same there.

    Raises:
        ValueError: If they have another shape than the model's images.
    """
    if images.ndim != 4 or tuple(images.shape[1:]) != tuple(model.image_shape):
        raise ValueError(
            f"Images of shape {tuple(images.shape)} were given to a model of images {tuple(model.image_shape)}; "
            "fit them to (B, C, H, W) first."
        )
    return images.to(device_of(model))


def check_seeds(seeds: Sequence[int] | None, count: int) -> Sequence[int]:
    """One seed per image: those given, or 0, 1, 2, ...

    Args:
        seeds: The seeds, or None.
        count: Number of images.

    Returns:
        The seeds.

    Raises:
        ValueError: If their number is another.
    """
    if seeds is None:
        return range(count)
    if len(seeds) != count:
        raise ValueError(
            f"{counted(count, 'image', 'needs', 'need')} {counted(count, 'seed')}, one each, but {len(seeds)} came."
        )
    return seeds


def labels_for(model: PixelModel, labels: Tensor | None, count: int) -> Tensor | None:
    """Labels checked and on the CPU; see `generate.check_labels`."""
    return check_labels(labels, model.denoiser.num_classes, count)
