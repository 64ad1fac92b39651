"""Checks of a network's arguments and images; each raises a ValueError of one sentence."""

from typing import Any

import torch
from torch import Tensor

from diffusion_lit.checks import check_counts


def arguments_in(names: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a constructor out of its `locals()`, taken before it sets any other name."""
    return {name: value for name, value in names.items() if name not in ("self", "__class__")}


def require_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not one of the allowed words."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(allowed)}.")


def require_levels(name: str, wanted: tuple[int, ...], sizes: list[int]) -> set[int]:
    """Return the requested sizes of feature maps, -1 being the smallest; refuse those that no level has."""
    for size in wanted:
        if size not in sizes and not (isinstance(size, int) and -len(sizes) <= size < 0):
            raise ValueError(
                f"{name} has {size!r}, but the feature maps have sizes {', '.join(map(str, sizes))}; take these, or "
                "-1 for the smallest, -2 for the one before it, and so on."
            )
    return {size if size > 0 else sizes[size] for size in wanted}


def require_image_size(image_size: int, multiple: int, because: str) -> None:
    """Refuse an image size that the network's levels do not divide."""
    if image_size % multiple:
        lower = image_size // multiple * multiple
        nearest = f"{lower} or {lower + multiple}" if lower else f"{multiple}"
        raise ValueError(
            f"image_size={image_size} is not a multiple of {multiple} ({because}): "
            f"take images of {nearest}, or change these."
        )


def require_level_sizes(image_size: int, patch_size: int, channel_mult: tuple[int, ...]) -> int:
    """Return what a stem of patches and halvings between levels divide an image by; refuse a size that they do not."""
    check_counts("channel_mult", channel_mult, empty=False)
    multiple: int = patch_size * 2 ** (len(channel_mult) - 1)
    require_image_size(image_size, multiple, f"patch_size={patch_size} and {len(channel_mult)} levels of channel_mult")
    return multiple


def require_image(x: Tensor, channels: int, multiple: int) -> None:
    """Refuse anything but images (B, channels, H, W) with H and W multiples of what the network divides by."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"The network takes images of shape (B, {channels}, H, W), not {tuple(x.shape)}.")
    if x.shape[2] % multiple or x.shape[3] % multiple:
        raise ValueError(
            f"Images of {x.shape[2]}x{x.shape[3]} have a side that is not a multiple of {multiple}, by which "
            f"this network divides them: resize or pad them, or build the network with fewer levels or smaller patches."
        )


def with_condition(x: Tensor, condition: Tensor | None, channels: int) -> Tensor:
    """Return the images x (B, C, H, W) followed by the channels of their condition, zeros where there is none."""
    if channels == 0:
        if condition is not None:
            raise ValueError("This network was built without a condition image; set condition_channels.")
        return x
    shape = (len(x), channels, *x.shape[2:])
    if condition is None:
        condition = x.new_zeros(shape)
    if condition.shape != shape:
        raise ValueError(f"The network takes a condition of shape {shape}, not {tuple(condition.shape)}.")
    return torch.cat([x, condition], dim=1)
