"""Which samples are measured: seeds, classes, and the shards that ranks share and a restart finds again."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion_lit.diffusion.rng import keyed_generator


def class_frequencies(data: Any, num_classes: int) -> Tensor | None:
    """How often each class occurs in the training split.

    Args:
        data: The data set, set up.
        num_classes: Number of the model's classes, 0 for an unconditional model.

    Returns:
        Float64 shares of shape (num_classes,) that sum to 1, or None for an unconditional model; uniform where the data
        has no labels.

    Raises:
        ValueError: If the data has more classes than the model.
    """
    if num_classes == 0:
        return None
    labels = data.reference_labels("train")
    if labels is None:
        return torch.full((num_classes,), 1 / num_classes, dtype=torch.float64)
    counts = torch.bincount(labels, minlength=num_classes).double()
    if len(counts) > num_classes:
        raise ValueError(
            f"The data has {len(counts)} classes and the model {num_classes}; they do not belong together."
        )
    return counts / counts.sum()


def draw_labels(seeds: Sequence[int], frequencies: Tensor | None) -> Tensor | None:
    """Draws the class of each sample with the sample's own generator.

    Args:
        seeds: One seed per sample.
        frequencies: Share of each class, as from `class_frequencies`, or None.

    Returns:
        Class indices int64 (N,), a function of each seed alone, or None without classes.
    """
    if frequencies is None:
        return None
    edges = frequencies.cumsum(0)
    draws = [torch.rand((), generator=keyed_generator("class", seed), dtype=torch.float64) for seed in seeds]
    drawn = torch.searchsorted(edges, torch.stack(draws) * edges[-1], right=True)
    return drawn.clamp(max=int(frequencies.nonzero().max()))
