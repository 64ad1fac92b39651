"""Checks that every network makes of its arguments and of its images; each raises a ValueError of one sentence."""

from torch import Tensor


def require_positive(**values: int) -> None:
    """Refuse any named value below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value} is too small; it must be at least 1.")


def require_not_negative(**values: int) -> None:
    """Refuse any named value below 0."""
    for name, value in values.items():
        if value < 0:
            raise ValueError(f"{name}={value} is negative; use 0 for none.")


def require_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not one of the allowed words."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(allowed)}.")


def require_image_size(image_size: int, multiple: int, because: str) -> None:
    """Refuse an image size that the network's levels do not divide."""
    if image_size % multiple:
        lower = image_size // multiple * multiple
        nearest = f"{lower} or {lower + multiple}" if lower else f"{multiple}"
        raise ValueError(
            f"image_size={image_size} is not a multiple of {multiple} ({because}): "
            f"take images of {nearest}, or change these."
        )


def require_image(x: Tensor, channels: int, multiple: int) -> None:
    """Refuse anything but images (B, channels, H, W) with H and W multiples of what the network divides by."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"The network takes images of shape (B, {channels}, H, W), not {tuple(x.shape)}.")
    if x.shape[2] % multiple or x.shape[3] % multiple:
        raise ValueError(
            f"Images of {x.shape[2]}x{x.shape[3]} have a side that is not a multiple of {multiple}, by which "
            f"this network divides them: resize or pad them, or build the network with fewer levels or smaller patches."
        )
