"""ColdDiffusion: a network that restores degraded images, and generates images from fully degraded ones.

    loss = mean |R(D(x0, t, n), t) - x0|,   t uniform in 1..T,   R(x, t) = x + net(x, 999 t / T)

(Bansal 2022, arXiv 2208.09392, equation 1.) A sample starts at D(g, T, n), with g from the normal distribution of the
training images' mean and leading principal components. If D keeps only a few components, such as the mean colour, this
is the source's Gaussian fit to degraded images (section 5.2). A little noise breaks the symmetry of neighbouring
pixels.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from diffusion_lit.diffusion.cold import RESTORERS, ColdSampling
from diffusion_lit.diffusion.degradations import Blur, Degradation
from diffusion_lit.diffusion.generate import StepCallback, check_labels
from diffusion_lit.diffusion.images import take
from diffusion_lit.diffusion.models import evaluating
from diffusion_lit.diffusion.rng import BLOCK, SeededNoise, drawn_by_index, keyed_generator, run_seed
from diffusion_lit.modules.base import BaseModule
from diffusion_lit.modules.protocols import HasImages
from diffusion_lit.runtime.internals import data_of

COMPONENTS = 64
MOST_IMAGES = 500  # that the components are taken of
SYMMETRY_NOISE = 0.002  # standard deviation


class ColdDiffusion(BaseModule):
    """Diffusion without noise: restoration of a deterministic degradation.

    Args:
        net: The network, called with 999 t / T in [0, 999] as its noise input. It is never told a class.
        degradation: What is done to images; blur by default.
        sampling: How images are restored; by default the improved sampler over all steps.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning-rate schedule from the optimizer, stepped each training step.
    """

    num_classes = 0
    mean: Tensor
    components: Tensor

    def __init__(
        self,
        net: nn.Module,
        degradation: Degradation | None = None,
        sampling: ColdSampling | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.net: Any = net
        self.degradation = degradation or Blur()
        sampling = sampling or ColdSampling()
        count = len(sampling.steps(self.degradation.num_steps)) - 1
        self.sampling = replace(sampling, num_steps=count)
        channels, height, width = self.image_shape
        self.register_buffer("mean", torch.zeros(channels, height, width))
        rows = min(COMPONENTS, channels * height * width)
        self.register_buffer("components", torch.full((rows, channels, height, width), torch.nan))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image."""
        return (int(self.net.in_channels), int(self.net.image_size), int(self.net.image_size))

    def forward(self, x: Tensor, t: Tensor | int) -> Tensor:
        """Restores images in one step.

        Args:
            x: Degraded images (B, C, H, W).
            t: How far they are degraded, steps of shape () or (B,).

        Returns:
            x0_hat (B, C, H, W).
        """
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        restored: Tensor = x + self.net(x, 999 * t.float() / self.degradation.num_steps)
        return restored

    def on_fit_start(self) -> None:
        """Takes the mean and the principal components of the training images."""
        data = data_of(self.trainer)
        if not isinstance(data, HasImages):
            raise ValueError(
                "ColdDiffusion takes the mean and covariance of the training images, from which its samples start, "
                f"and {type(data).__name__} does not give them; use one of datamodules."
            )
        images = data.reference_images("train")
        count = min(MOST_IMAGES, len(images))
        sample = take(images, torch.arange(count) * len(images) // count)
        mean, components = principal_components(sample.double() / 127.5 - 1, len(self.components))
        self.mean.copy_(mean)
        self.components.copy_(components)

    def loss(self, x0: Tensor, *key: int | str, index: Tensor | None = None) -> Tensor:
        """The mean absolute error of restored images, each degraded by its own number of steps.

        Args:
            x0: Images (B, C, H, W) in [-1, 1].
            key: Names the draw, which is made for the global batch.
            index: Rows of the split for held-out images; see `keyed_noise`.

        Returns:
            A scalar.
        """
        world, rank = self.ranks

        def steps(count: int, generator: torch.Generator) -> Tensor:
            return torch.randint(
                1, self.degradation.num_steps + 1, (count,), generator=generator, device=generator.device
            )

        if index is None:
            t = steps(len(x0) * world, keyed_generator("steps", *key, device=self.device))[rank::world]
        else:
            t = drawn_by_index(index.to(self.device), lambda draw: steps(BLOCK, draw), "steps", *key)
        noise = self.keyed_noise(x0[:, :1].shape, "degradation", *key, index=index)
        loss: Tensor = (self(self.degradation(x0, t, noise), t) - x0).abs().mean()
        return loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch `{"image": (B, C, H, W) in [-1, 1]}`."""
        image = batch["image"]
        loss = self.loss(image, "train", run_seed(), self.current_epoch, batch_idx)
        self.log_step({"train/loss": loss.detach()}, len(image))
        return loss

    def held_out(self, split: str, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs the loss; see `BaseModule.held_out`."""
        image = batch["image"]
        loss = self.loss(image, split, index=self.rows_of(batch, batch_idx))
        self.log(f"{split}/loss", loss, prog_bar=split == "val", batch_size=len(image), sync_dist=True)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The batch's images, fully degraded by the map of their index and restored; (B, C, H, W)."""
        return self.reconstruct(batch["image"], seeds=batch["index"].tolist())

    @torch.no_grad()
    def restore(
        self, x: Tensor, noise: Tensor, sampling: ColdSampling | None = None, callback: StepCallback | None = None
    ) -> Tensor:
        """Restores fully degraded images.

        Args:
            x: D(x0, T, noise), shape (B, C, H, W).
            noise: The map of each image's degradation, (B, 1, H, W).
            sampling: Other settings than the module's own.
            callback: Called as `callback(index, x, x0_hat, 0)` at each step.

        Returns:
            Restored images (B, C, H, W), in [-1, 1] up to overshoot.
        """
        sampling = sampling or self.sampling
        steps = sampling.steps(self.degradation.num_steps)

        def degrade(x0: Tensor, t: int) -> Tensor:
            degraded: Tensor = self.degradation(x0, t, noise)
            return degraded

        with evaluating(self):
            restored: Tensor = RESTORERS[sampling.sampler](self, degrade, x, steps, callback)
        return restored

    def degrade(self, images: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Degrades images fully.

        Args:
            images: Images (B, C, H, W) in [-1, 1].
            seeds: One seed per image, of which its degradation's map is a function.

        Returns:
            D(x0, T, noise) and the noise (B, 1, H, W).
        """
        noise = SeededNoise(seeds)(images[:, :1])
        return self.degradation(images, self.degradation.num_steps, noise), noise

    def reconstruct(
        self, images: Tensor, sampling: ColdSampling | None = None, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """Degrades images fully and restores them.

        Args:
            images: Images (B, C, H, W) in [-1, 1].
            sampling: Other settings than the module's own.
            seeds: One seed per image; 0, 1, 2, ... by default.

        Returns:
            Restored images of the same shape.
        """
        x, noise = self.degrade(images, range(len(images)) if seeds is None else seeds)
        return self.restore(x, noise, sampling)

    @torch.no_grad()
    def generate(
        self,
        seeds: Sequence[int],
        labels: Tensor | None = None,
        sampling: ColdSampling | None = None,
        callback: StepCallback | None = None,
    ) -> Tensor:
        """Draws one image per seed.

        Args:
            seeds: One seed per image.
            labels: None; there are no classes.
            sampling: Other settings than the module's own.
            callback: Called as `callback(index, x, x0_hat, 0)` at each step.

        Returns:
            Images (B, C, H, W), in [-1, 1] up to overshoot.

        Raises:
            ValueError: If labels are given, or the model was never trained.
        """
        check_labels(labels, 0, len(seeds))
        if self.components.isnan().any():
            raise ValueError("This ColdDiffusion has seen no training images to start its samples from; train it.")
        draw = SeededNoise(seeds)
        noise = draw(self.mean.new_empty(len(seeds), 1, *self.mean.shape[1:]))
        scores = draw(self.mean.new_empty(len(seeds), len(self.components)))
        x0 = self.mean + torch.einsum("bk,kchw->bchw", scores, self.components)
        x = self.degradation(x0, self.degradation.num_steps, noise)
        return self.restore(x + SYMMETRY_NOISE * draw(x), noise, sampling, callback)


def principal_components(images: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The mean of images and their leading principal components.

    Args:
        images: Shape (N, ...), N at least 1.
        count: Number K of components.

    Returns:
        The mean (...) and K components (K, ...), of length their standard deviation, largest first; those that N
        images do not have are 0. Mean + sum of z_k times component k, z ~ N(0, 1), has the mean of the images and
        the nearest covariance of rank K to theirs.
    """
    mean = images.mean(0)
    rows = (images - mean).flatten(1)
    vectors = torch.linalg.eigh(rows @ rows.T / max(1, len(rows) - 1)).eigenvectors.flip(1)[:, :count]
    made = vectors.T @ rows / max(1, len(rows) - 1) ** 0.5
    made = made * made.gather(1, made.abs().argmax(1, keepdim=True)).sign()  # which eigenvectors leave open
    padded = rows.new_zeros(count, rows.shape[1])
    padded[: len(made)] = made
    return mean, padded.reshape(count, *images.shape[1:])
