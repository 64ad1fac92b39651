"""Views of an image for anagrams: orthogonal transforms with an exact inverse, each checked when it is made.

A denoiser is trained on x0 + sigma n with n ~ N(0, I). A view v turns this into v x0 + sigma v n, and v n is N(0, I)
only if v is orthogonal; a view that scales, smears or drops noise gives the denoiser inputs it was not trained on.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_lit.diffusion.rng import keyed_generator

Change = Callable[[Tensor], Tensor]
"""Changes images (B, C, H, W), keeping their shape."""

PROBES = 8
TOLERANCE = 1e-6
PIECES = 4  # of a jigsaw, along each side


class ImageView:
    """A linear, orthogonal change of images and its inverse.

    Args:
        name: What to call it.
        apply: Changes images (B, C, H, W) in any floating precision.
        inverse: Changes them back.
        image_shape: Shape (C, H, W) of the images.

    Raises:
        ValueError: If `inverse` does not undo `apply`, or `apply` changes shapes, is not linear or not orthogonal.
    """

    def __init__(self, name: str, apply: Change, inverse: Change, image_shape: tuple[int, int, int]) -> None:
        self.name, self.apply, self.inverse = name, apply, inverse
        self.image_shape = tuple(image_shape)
        self._check()

    def _check(self) -> None:
        """Checks the defining properties on random images; a transform that lacks one fails with probability 1."""
        generator = keyed_generator("picture view")
        x = torch.randn(PROBES, *self.image_shape, generator=generator, dtype=torch.float64)
        try:
            y = self.apply(x)
            back = self.inverse(y) if y.shape == x.shape else None
            total = self.apply(x[:1] - 2 * x[1:2])
        except RuntimeError as error:
            raise self._refusal(f"cannot be applied to images {self.image_shape}") from error
        if y.shape != x.shape:
            raise self._refusal(f"turns images {self.image_shape} into {tuple(y.shape[1:])}")
        if back is None or back.shape != x.shape or not _alike(back, x):
            raise self._refusal("is not undone by its inverse")
        if not _alike(total, y[:1] - 2 * y[1:2]):
            raise self._refusal("is not linear")
        if not _alike(_products(y), _products(x)):
            raise self._refusal("is not orthogonal: it changes lengths or angles, and with them the noise")

    def _refusal(self, why: str) -> ValueError:
        return ValueError(
            f"The view {self.name} {why}; a view must be linear, orthogonal and exactly invertible, such as "
            f"{', '.join(VIEWS)}."
        )


def _alike(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= TOLERANCE * b.abs().max())


def _products(x: Tensor) -> Tensor:
    """The inner products of all pairs of images."""
    return x.flatten(1) @ x.flatten(1).T


def _places(image_shape: tuple[int, int, int]) -> Tensor:
    """Pixel indices as an image, shape (1, 1, H, W); applying a view to it shows where each pixel goes."""
    _, height, width = image_shape
    return torch.arange(height * width).reshape(1, 1, height, width)


def _rearrange(order: Tensor) -> Change:
    """The change that puts pixel `order[i]` at place i."""

    def change(x: Tensor) -> Tensor:
        return x.flatten(2)[:, :, order.to(x.device)].reshape(x.shape)

    return change


def permutation(name: str, order: Tensor, image_shape: tuple[int, int, int]) -> ImageView:
    """A rearrangement of pixels as a view.

    Args:
        name: What to call it.
        order: Place i shows pixel `order[i]`, both counted row by row, shape (H * W,).
        image_shape: Shape (C, H, W) of the images.

    Returns:
        The view.

    Raises:
        ValueError: If a pixel is missing or comes twice.
    """
    return ImageView(name, _rearrange(order), _rearrange(order.argsort()), image_shape)


def _turned(quarters: int) -> Callable[[str, tuple[int, int, int]], ImageView]:
    def make(name: str, image_shape: tuple[int, int, int]) -> ImageView:
        return ImageView(
            name, lambda x: x.rot90(quarters, (-2, -1)), lambda x: x.rot90(-quarters, (-2, -1)), image_shape
        )

    return make


def _flipped(dim: int) -> Callable[[str, tuple[int, int, int]], ImageView]:
    return lambda name, image_shape: ImageView(name, lambda x: x.flip(dim), lambda x: x.flip(dim), image_shape)


def _identity(name: str, image_shape: tuple[int, int, int]) -> ImageView:
    return ImageView(name, lambda x: x, lambda x: x, image_shape)


def _negative(name: str, image_shape: tuple[int, int, int]) -> ImageView:
    return ImageView(name, torch.neg, torch.neg, image_shape)


def _permute(name: str, image_shape: tuple[int, int, int]) -> ImageView:
    size = image_shape[1] * image_shape[2]
    return permutation(name, torch.randperm(size, generator=keyed_generator("permute", size)), image_shape)


def _jigsaw(name: str, image_shape: tuple[int, int, int]) -> ImageView:
    """4x4 square pieces, each moved to another place and turned by a quarter, a half or three quarters."""
    _, height, width = image_shape
    if height != width or height % PIECES:
        raise ValueError(f"The view jigsaw cuts squares into {PIECES}x{PIECES} pieces, which {height}x{width} is not.")
    side = height // PIECES
    cut = _places(image_shape)[0, 0].unfold(0, side, side).unfold(1, side, side).flatten(0, 1)  # (pieces, side, side)
    generator = keyed_generator("jigsaw")
    order = torch.randperm(PIECES**2, generator=generator)
    turns = torch.randint(4, (PIECES**2,), generator=generator).tolist()
    laid = torch.stack([cut[piece].rot90(turn) for piece, turn in zip(order.tolist(), turns, strict=True)])
    rows = laid.reshape(PIECES, PIECES, side, side).transpose(1, 2)
    return permutation(name, rows.flatten(), image_shape)


VIEWS: dict[str, Callable[[str, tuple[int, int, int]], ImageView]] = {
    "identity": _identity,
    "flip_horizontal": _flipped(-1),
    "flip_vertical": _flipped(-2),
    "rotate_90": _turned(1),
    "rotate_180": _turned(2),
    "rotate_270": _turned(3),
    "jigsaw": _jigsaw,
    "permute": _permute,
    "negative": _negative,
}


def make_view(name: str, image_shape: tuple[int, int, int]) -> ImageView:
    """A view by its name.

    Args:
        name: A key of `VIEWS`. Rotations are counterclockwise; flip_horizontal swaps left and right; jigsaw moves and
            turns 4x4 square pieces and permute every pixel, each by a fixed random order.
        image_shape: Shape (C, H, W) of the images.

    Returns:
        The view.

    Raises:
        ValueError: If there is no such view, or it does not suit images of this shape.
    """
    if name not in VIEWS:
        raise ValueError(f"There is no view {name!r}; choose among {', '.join(VIEWS)}.")
    return VIEWS[name](name, image_shape)
