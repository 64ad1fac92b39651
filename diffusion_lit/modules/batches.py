"""Checks of the first training batch: users' data often has another range or shape."""

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from diffusion_lit.words import article

FORM = '{"image": float (B, C, H, W) in [-1, 1], "label": int64 (B,)}, the last only where there are classes'
OVERSHOOT = 0.01  # beyond [-1, 1] without a word
ABSURD = 8.0  # beyond this, values are no images at any usual scale


def check_batch(batch: Any, image_shape: tuple[int, ...] | None = None, num_classes: int = 0) -> None:
    """Refuses a batch that no model can be trained on, and warns of images in an unusual range.

    Args:
        batch: The batch, on the training device.
        image_shape: Shape (C, H, W) that the model is made for, where it is known.
        num_classes: Number of the model's classes, 0 for an unconditional one.

    Raises:
        ValueError: If it has another form, shape or dtype, values that are not finite or far from [-1, 1], or labels
            that are no classes of the model.
    """
    if not isinstance(batch, dict) or not isinstance(batch.get("image"), Tensor):
        keys = f" with {', '.join(map(str, batch))}" if isinstance(batch, dict) else ""
        raise ValueError(f"A batch of the data is {article(batch)}{keys}; it must be {FORM}.")
    images: Tensor = batch["image"]
    if not images.is_floating_point():
        raise ValueError(f"The images of a batch are {images.dtype}; make them float32 in [-1, 1]: x / 127.5 - 1.")
    if images.ndim != 4 or (image_shape is not None and tuple(images.shape[1:]) != tuple(image_shape)):
        wanted = "C, H, W" if image_shape is None else ", ".join(map(str, image_shape))
        raise ValueError(f"The images of a batch have the shape {tuple(images.shape)}; it must be (B, {wanted}).")
    _check_range(images)
    _check_labels(batch.get("label"), len(images), num_classes)


def _check_range(images: Tensor) -> None:
    low, high = (float(value) for value in images.detach().float().aminmax())
    told = f"The images of the first batch go from {low:.4g} to {high:.4g}"
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        raise ValueError(f"{told}; they must be finite numbers in [-1, 1].")
    if max(-low, high) > ABSURD:
        way = "x / 127.5 - 1" if low >= 0 and high <= 255 else "scale them"
        raise ValueError(f"{told}; models expect [-1, 1]: {way}.")
    if max(-low, high) > 1 + OVERSHOOT:
        rank_zero_warn(f"{told}; models expect [-1, 1], to which samples are cut when they are drawn.")
    elif low >= 0 and high > 0.5:
        rank_zero_warn(f"{told}: are they in [0, 1]? Models expect [-1, 1]: x * 2 - 1.")


def _check_labels(labels: Any, count: int, num_classes: int) -> None:
    if num_classes == 0:
        return
    if labels is None:
        raise ValueError(f"The model has {num_classes} classes, and a batch of the data no label; it must be {FORM}.")
    if not isinstance(labels, Tensor) or labels.shape != (count,) or labels.dtype != torch.int64:
        form = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"The labels of a batch are {form}; they must be an int64 tensor of the shape ({count},).")
    low, high = (int(value) for value in labels.aminmax())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise ValueError(f"A batch has the label {wrong}; the model's classes go from 0 to {num_classes - 1}.")
