"""Pretrained models that sample and edit like the ones trained here, and the two stages of a cascade."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_lit.checks import check_number
from diffusion_lit.diffusion.denoiser import Denoiser, LearnedVarianceDenoiser
from diffusion_lit.diffusion.generate import Sampling, StepCallback, check_labels
from diffusion_lit.diffusion.models import LatentModel, PixelModel
from diffusion_lit.diffusion.rng import SeededNoise, keyed_seed
from diffusion_lit.diffusion.schedules import Schedule
from diffusion_lit.pretrained.autoencoders import PretrainedAutoencoder
from diffusion_lit.pretrained.networks import UpsamplingNet, enlarge

Shape = tuple[int, int, int]


class PretrainedModel(PixelModel):
    """Another library's denoiser of images.

    Args:
        name: What it was loaded as.
        denoiser: The denoiser.
        sampling: How its own pipeline samples.
        shape: Shape (C, H, W) of what it denoises.
        prompts: What label i asks a text model for; None where it reads no text.

    Attributes:
        class_names: The prompts, or the numbers of the classes.
    """

    def __init__(
        self, name: str, denoiser: Denoiser, sampling: Sampling, shape: Shape, prompts: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        self.name = name
        self.denoiser = denoiser
        self.sampling = sampling
        self.condition = None
        self.shape = shape
        self.prompts = None if prompts is None else list(prompts)
        self.class_names = [str(index) for index in range(self.num_classes)] if self.prompts is None else self.prompts
        self.eval()

    @property
    def x_shape(self) -> Shape:
        """Shape (C, H, W) of what is denoised."""
        return self.shape


class PretrainedLatentModel(LatentModel, PretrainedModel):
    """Another library's denoiser of latents, with their autoencoder.

    Args:
        autoencoder: The autoencoder.
        scale: What its latents are multiplied by before they are noised, so that they have unit variance.
        arguments: Those of `PretrainedModel`.
    """

    def __init__(self, autoencoder: PretrainedAutoencoder, scale: float, *arguments: Any) -> None:
        super().__init__(*arguments)
        check_number(above=0, scale=scale)
        self.autoencoder = autoencoder.requires_grad_(False)
        self.scale = scale

    @property
    def image_shape(self) -> Shape:
        """Shape (C, H, W) of the images."""
        _, height, width = self.x_shape
        return (self.autoencoder.in_channels, height * self.autoencoder.factor, width * self.autoencoder.factor)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, c, h, w) of images (B, C, H, W) in [-1, 1], the means of their posteriors."""
        return self.autoencoder.encode(images).mean * self.scale

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) of latents (B, c, h, w)."""
        return self.autoencoder.decode(x / self.scale)


class Upsampler(nn.Module):
    """The second stage of a cascade: makes small images large, told the prompts of the first.

    Args:
        denoiser: A denoiser whose network is an `UpsamplingNet`.
        sampling: How its own pipeline samples.
        shape: Shape (C, H, W) of the large images.
        noising: The schedule by whose steps the small images are noised.
        noise_level: To which step of it they are, from 0.

    Raises:
        ValueError: If there is no such step.

    Source: Saharia et al. 2022 (arXiv 2205.11487), section 2.4 (noise conditioning augmentation).
    """

    def __init__(
        self, denoiser: Denoiser, sampling: Sampling, shape: Shape, noising: Schedule, noise_level: int = 250
    ) -> None:
        super().__init__()
        check_number(least=0, most=noising.num_steps - 1, whole=True, noise_level=noise_level)
        self.denoiser, self.sampling, self.shape = denoiser, sampling, shape
        self.noising, self.noise_level = noising, noise_level
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor, seeds: Sequence[int], labels: Tensor | None = None) -> Tensor:
        """Makes images large.

        Args:
            images: Small images (B, C, h, w) in [-1, 1].
            seeds: One seed per image, which may be that of the image itself.
            labels: What the images were drawn for, shape (B,), or None.

        Returns:
            Large images (B, C, H, W), in [-1, 1] up to overshoot.

        Raises:
            ValueError: If a label is outside the prompts, or their numbers differ.
        """
        labels = check_labels(labels, self.denoiser.num_classes, len(seeds))
        noise = SeededNoise(keyed_seed("stage 2", int(seed)) for seed in seeds)
        start = self.sampling.start(self.denoiser.scaling, noise(images.new_empty(len(images), *self.shape)))
        large = enlarge(images, *self.shape[1:])
        signal = float(self.noising.alpha_bar[self.noise_level])
        net = self.denoiser.net
        assert isinstance(net, UpsamplingNet)
        net.show(signal**0.5 * large + (1 - signal) ** 0.5 * noise(large), self.noise_level)
        x = self.sampling.run(self.sampling.wrap(self.denoiser, labels), start, noise=noise)
        return self.sampling.finish(self.denoiser.scaling, x)


class Cascade(PretrainedModel):
    """A pretrained model whose images are made large by a second one.

    What is denoised and edited is the first stage's; `generate` gives the second's images.

    Args:
        first: The first stage.
        second: The second.

    Raises:
        ValueError: If the second makes images of other channels.
    """

    def __init__(self, first: PretrainedModel, second: Upsampler) -> None:
        super().__init__(first.name, first.denoiser, first.sampling, first.shape, first.prompts)
        if first.image_shape != first.shape or first.shape[0] != second.shape[0]:
            raise ValueError(
                f"The second stage makes images of {second.shape[0]} channels of images as small, and {first.name} "
                f"denoises {first.shape}; give a first stage of pixels, such as IF-I's."
            )
        self.second = second

    @property
    def image_shape(self) -> Shape:
        """Shape (C, H, W) of the large images."""
        return self.second.shape

    def generate(
        self,
        seeds: Sequence[int],
        labels: Tensor | None = None,
        sampling: Sampling | None = None,
        callback: StepCallback | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Draws one large image per seed; see `PixelModel.generate`. Settings and callback are the first stage's."""
        images = super().generate(seeds, labels, sampling, callback, condition)
        large: Tensor = self.second(images, seeds, labels)
        return large


def make_denoiser(net: nn.Module, scaling: Any, learned: bool) -> Denoiser:
    """A denoiser of a network that did or did not learn the variance of its steps.

    Args:
        net: The network, giving 2 C channels where it did.
        scaling: Its prediction type.
        learned: Whether it did.

    Returns:
        The denoiser.
    """
    return LearnedVarianceDenoiser(net, scaling) if learned else Denoiser(net, scaling)
