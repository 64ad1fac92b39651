"""The scale of the latents of a training set: sums over all images, which ranks share, and what follows from them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusion_lit.diffusion.images import from_uint8
from diffusion_lit.modules.latent_space import LatentSpace
from diffusion_lit.nets.autoencoder import Posterior

CHUNK = 256  # images encoded at a time; the same on every rank, so that their number changes no digit


def encode_all(
    space: LatentSpace,
    images: Any,
    mirrored: bool,
    device: torch.device,
    ranks: tuple[int, int] = (1, 0),
    keep: Callable[[int, int, Posterior], object] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Encodes this rank's share of a set of images and sums the moments of its latents.

    Args:
        space: Where to.
        images: Array-like of uint8 images (N, C, H, W).
        mirrored: Whether each image is encoded a second time, mirrored.
        device: Where to compute.
        ranks: Number of ranks, and this one.
        keep: Called as `keep(copy, start, posterior)` with each chunk, copy 1 being the mirrored one.
        progress: Called with the number of images after each chunk.

    Returns:
        Float64 sums of mean and of std^2 + mean^2 per channel, shape (chunks, 2, c), 0 where another rank has them; to
        be added over ranks.
    """
    jobs = [(copy, start) for copy in range(2 if mirrored else 1) for start in range(0, len(images), CHUNK)]
    sums = torch.zeros(len(jobs), 2, space.shape[0], dtype=torch.float64)
    world, rank = ranks
    for number in range(rank, len(jobs), world):
        copy, start = jobs[number]
        chunk = from_uint8(torch.as_tensor(images[start : start + CHUNK]).to(device))
        posterior = space.encode(chunk.flip(-1) if copy else chunk)
        mean, std = posterior.mean.double().cpu(), posterior.std.double().cpu()
        sums[number, 0] = mean.sum(dim=(0, 2, 3))
        sums[number, 1] = (std.square() + mean.square()).sum(dim=(0, 2, 3))
        if keep is not None:
            keep(copy, start, posterior)
        if progress is not None:
            progress(len(chunk))
    return sums


def scale_of(sums: Tensor, latents: int, positions: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel.

    Args:
        sums: Of all ranks, shape (chunks, 2, c).
        latents: Number of latents that went into them.
        positions: Positions h * w of a latent.

    Returns:
        Two float64 tensors of shape (c,).
    """
    first, second = sums.sum(0) / (latents * positions)
    return first, (second - first.square()).clamp(min=0).sqrt()
