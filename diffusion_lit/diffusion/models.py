"""Models that generate images: a denoiser with settings, shapes, and the map between images and what is denoised.

`PixelModel` denoises images, `LatentModel` latents of an autoencoder. Modules trained here and models of other
libraries share them, so that sampling and editing treat both the same.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from diffusion_lit.checks import check_count
from diffusion_lit.diffusion.conditions import ImageCondition
from diffusion_lit.diffusion.denoiser import Denoiser
from diffusion_lit.diffusion.generate import Sampling, StepCallback, refuse_clipping


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within this context a module is in eval mode, afterwards in the mode that it was in."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


class PixelModel(nn.Module):
    """A denoiser of images and its default sampling settings.

    Attributes:
        denoiser: The model, `(x, sigma, label) -> x0_hat`.
        sampling: How images are drawn unless told otherwise.
        drawn_size: Height and width of what is denoised where another size than the network's own is drawn.
        condition: What the network is given of an image; None where it is given none.
        class_names: Names of the classes by their numbers, or prompts.
        prompts: What label i asks a text model for; None where the model reads no text.
        label_dropout: Share of the training without labels; None where it is not known.
        init_from: Record of its initial weights, if the training did not draw them at random.
    """

    denoiser: Denoiser
    sampling: Sampling
    condition: ImageCondition | None
    class_names: list[str]
    prompts: list[str] | None = None
    label_dropout: float | None = None
    init_from: dict[str, Any] | None = None
    drawn_size: tuple[int, int] | None = None

    @property
    def net(self) -> nn.Module:
        """The network inside the denoiser."""
        return self.denoiser.net

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 for an unconditional model."""
        return self.denoiser.num_classes

    @property
    def x_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of what is denoised."""
        net: Any = self.net
        height, width = self.drawn_size or (net.image_size, net.image_size)
        return (int(net.in_channels), int(height), int(width))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of the images that the model makes."""
        return self.x_shape

    def draw_size(self, height: int, width: int) -> None:
        """Draws images of another size from now on; a network of convolutions and attention can.

        Args:
            height: Pixels.
            width: Pixels.

        Raises:
            ValueError: If the network's or the autoencoder's factor does not divide them.
        """
        net: Any = self.net
        factor = self.image_shape[1] // self.x_shape[1]
        multiple = factor * int(getattr(net, "size_multiple", None) or getattr(net, "patch_size", None) or 1)
        check_count(height=height, width=width)
        if height % multiple or width % multiple:
            raise ValueError(f"size is {height}x{width}; this model draws sides that divide by {multiple}.")
        self.drawn_size = (height // factor, width // factor)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] as what is denoised: themselves, unless a subclass works on latents."""
        return images

    def decode(self, x: Tensor) -> Tensor:
        """The images of what was denoised; the inverse of `encode`."""
        return x

    def shrink_mask(self, known: Tensor) -> Tensor:
        """Which entries of what is denoised depend on known pixels alone.

        Args:
            known: 1 where a pixel is known and 0 elsewhere, shape (B, 1, H, W).

        Returns:
            The same at the size of what is denoised; the mask itself here.
        """
        return known

    def generate(
        self,
        seeds: Sequence[int],
        labels: Tensor | None = None,
        sampling: Sampling | None = None,
        callback: StepCallback | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Draws one image per seed.

        Args:
            seeds: One seed per image.
            labels: Class indices of shape (B,), or None for unconditional sampling.
            sampling: Other settings than the model's own.
            callback: Called as `callback(step, x, x0_hat, sigma)` at each step.
            condition: Condition images (B, C', H, W) for models that are given one, or None for the null condition.

        Returns:
            Images (B, C, H, W), in [-1, 1] up to the model's own overshoot.

        Raises:
            ValueError: If a label is outside the model's classes, or the model has none.
        """
        with evaluating(self):
            x = (sampling or self.sampling).generate(self.denoiser, self.x_shape, seeds, labels, callback, condition)
        return self.decode(x)


class LatentModel(PixelModel):
    """A denoiser of the latents of an autoencoder; a subclass says `image_shape`, `encode` and `decode`."""

    def shrink_mask(self, known: Tensor) -> Tensor:
        """Marks a latent position as known where all pixels of its square are; see `PixelModel.shrink_mask`.

        The encoder's receptive field is larger than that square, so such latents are only nearly known; an editor
        pastes the known pixels back.
        """
        return -max_pool2d(-known, self.image_shape[1] // self.x_shape[1])

    def generate(
        self,
        seeds: Sequence[int],
        labels: Tensor | None = None,
        sampling: Sampling | None = None,
        callback: StepCallback | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Draws one image per seed; see `PixelModel.generate`. The callback sees decoded images.

        Raises:
            ValueError: As there, or if predictions are to be clipped, which latents cannot be.
        """
        refuse_clipping(sampling or self.sampling)
        decoded = None if callback is None else self._decoded(callback)
        return super().generate(seeds, labels, sampling, decoded, condition)

    def _decoded(self, callback: StepCallback) -> StepCallback:
        """Wraps a callback so that it gets images: x0_hat decoded, and x decoded after scaling to unit variance.

        Where it has rows to `keep`, a slice or a list, the others are not decoded, and stay 0.
        """
        keep = getattr(callback, "keep", slice(None))

        def whole(images: Tensor, count: int) -> Tensor:
            placed = images.new_zeros(count, *images.shape[1:])
            placed[keep] = images
            return placed

        def decoded(step: int, x: Tensor, x0_hat: Tensor, sigma: Tensor) -> None:
            spread = torch.as_tensor(sigma).to(x).square().add(1).sqrt().expand(len(x))[keep].reshape(-1, 1, 1, 1)
            noisy, clean = self.decode(x[keep] / spread) * spread, self.decode(x0_hat[keep])
            callback(step, whole(noisy, len(x)), whole(clean, len(x)), sigma)

        return decoded
