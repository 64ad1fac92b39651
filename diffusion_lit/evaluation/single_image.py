"""Metrics of models of a single image, for which a distance between sets of images has no meaning.

PSNR measures similarity to the training image, `10 log10(255^2 / mse)`. The patch distance measures similarity of
small parts: the Fréchet distance between the Gaussians of all p x p patches of the samples and of the image.
Diversity is the standard deviation of a pixel over the samples, divided by that over the image (Shaham 2019, arXiv
1905.01164, section 3).
"""

from typing import Any

import torch
from torch import Tensor

from diffusion_lit.diffusion.images import psnr
from diffusion_lit.diffusion.rng import keyed_generator
from diffusion_lit.evaluation.metrics import Statistics, frechet_distance

PATCH = 7
MOST_PATCHES = 100_000


def is_single(images: Any) -> bool:
    """Whether a split holds one image, be it many times.

    Args:
        images: Array-like uint8 images (N, C, H, W).

    Returns:
        True where all are equal.
    """
    first = torch.as_tensor(images[0])
    return all(torch.equal(torch.as_tensor(images[index]), first) for index in range(1, len(images)))


def patches(images: Tensor, size: int = PATCH) -> Tensor:
    """All patches of images, or a fixed random choice where there are very many.

    Args:
        images: Images uint8 (N, C, H, W).
        size: Side of a patch, at most that of the images.

    Returns:
        Patches (M, C * size * size), float64 in [0, 1].
    """
    size = min(size, *images.shape[-2:])
    windows = images.unfold(2, size, 1).unfold(3, size, 1)
    rows, columns = windows.shape[2:4]
    total = len(images) * rows * columns
    chosen = torch.arange(total)
    if total > MOST_PATCHES:
        chosen = torch.randint(total, (MOST_PATCHES,), generator=keyed_generator("patches"))
    image, place = chosen // (rows * columns), chosen % (rows * columns)
    return windows[image, :, place // columns, place % columns].flatten(1).double() / 255


def psnr_to(samples: Tensor, image: Tensor, flips: bool = False) -> Tensor:
    """PSNR of samples to the one training image; arguments as of `single_image_metrics`.

    Returns:
        Decibels (N,).
    """
    return torch.stack([psnr(samples, target) for target in _targets(image, flips)]).amax(0)


def _targets(image: Tensor, flips: bool) -> Tensor:
    """What samples may be, (1 or 2, C, H, W)."""
    return torch.stack([image, image.flip(-1)] if flips else [image])


def single_image_metrics(samples: Tensor, image: Tensor, flips: bool = False) -> dict[str, float]:
    """Figures of samples of a model of one image.

    Args:
        samples: Images uint8 (N, C, H, W).
        image: The image, uint8 (C, H, W).
        flips: Whether training mirrored half of its copies: a sample is then compared with the nearer of the two.

    Returns:
        Mean PSNR, patch distance at full and at half size, and diversity, unless the image is of one grey level.
    """
    figures = {"psnr": float(psnr_to(samples, image, flips).mean())}
    targets = _targets(image, flips)
    for scale in (1, 2):
        made, real = (_shrink(images, scale) for images in (samples, targets))
        if min(made.shape[-2:]) >= PATCH:
            distance = frechet_distance(Statistics.of(patches(made)), Statistics.of(patches(real)))
            figures[f"fd_patches{PATCH}" + ("" if scale == 1 else "_half_size")] = distance
    spread = image.double().std(correction=0)
    if spread > 0:
        figures["diversity"] = float(samples.double().std(0, correction=0).mean() / spread)
    return figures


def _shrink(images: Tensor, scale: int) -> Tensor:
    """Images averaged over scale x scale pixels."""
    return images if scale == 1 else torch.nn.functional.avg_pool2d(images.double(), scale).round().to(torch.uint8)
