"""VAE: an autoencoder with a KL term, which is a baseline and the first stage of latent diffusion.

With D values in an image, the loss is

    (reconstruction(x_hat, x) + kl_weight * KL(q(z|x) || N(0, 1))) / D  (+ lpips_weight * LPIPS(x_hat, x)),
    x_hat = decode(mean + std * noise)

Under a likelihood and kl_weight 1 it is -ELBO in nats per value (Kingma & Welling 2014, arXiv 1312.6114), and divided
by ln 2 a bound on the bits per dimension of 8-bit images.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from diffusion_lit.checks import check_count, check_number
from diffusion_lit.diffusion.generate import check_labels
from diffusion_lit.diffusion.images import psnr
from diffusion_lit.diffusion.rng import SeededNoise
from diffusion_lit.modules.autoencoders import describe
from diffusion_lit.modules.base import BaseModule, run_seed
from diffusion_lit.modules.latent_space import Frozen, interpolate, latent_shape
from diffusion_lit.modules.perceptual import load_lpips
from diffusion_lit.modules.reconstruction import DiscretisedLogistic, Reconstruction

ACTIVE_VARIANCE = 0.01


@dataclass(frozen=True)
class PriorSampling:
    """How a VAE draws: from the prior, in one pass through the decoder. It stands where others have their `Sampling`.

    Args:
        sampler: The name, for receipts.
        num_steps: 1.
        cfg_scale: 1, since there are no classes.
    """

    sampler: str = "prior"
    num_steps: int = 1
    cfg_scale: float = 1.0

    @property
    def nfe(self) -> int:
        """Passes through the decoder."""
        return 1

    def replace(self, **changes: Any) -> "PriorSampling":
        """Itself; there is nothing to change.

        Args:
            changes: Options of samplers, all None.

        Returns:
            Itself.

        Raises:
            ValueError: If one is given.
        """
        for name, value in changes.items():
            if value is not None:
                raise ValueError(f"A VAE draws from its prior in one pass and has no {name}; leave --{name} out.")
        return self

    def record(self) -> dict[str, Any]:
        """The settings as plain values, for receipts."""
        return asdict(self)


class Terms(NamedTuple):
    """The terms of the loss of a batch.

    Args:
        mean: Mean of the latents (B, c, h, w).
        reconstruction: Distance summed over each image, shape (B,).
        kl: Divergence of each image's latent in nats, shape (B,).
        lpips: Mean perceptual distance, 0 where it is off.
    """

    mean: Tensor
    reconstruction: Tensor
    kl: Tensor
    lpips: Tensor


class VAE(BaseModule):
    """Variational autoencoder of images.

    Args:
        net: The autoencoder, such as `diffusion_lit.nets.Autoencoder`.
        reconstruction: Distance of images; by default a discretised logistic likelihood with a learned scale per
            channel.
        kl_weight: Weight of the divergence; 1 with a likelihood bounds the bits per dimension.
        kl_warmup_steps: Training steps over which that weight rises from 0.
        lpips_weight: Weight of the perceptual distance LPIPS (Zhang 2018, arXiv 1801.03924); 0 for none. Its weights
            are downloaded by torchvision.
        lpips_net: Network behind LPIPS: `vgg`, `alex` or `squeeze`.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning-rate schedule from the optimizer, stepped each training step.

    Raises:
        ValueError: If a weight or a number of steps is negative.
    """

    num_classes = 0
    sampling = PriorSampling()

    def __init__(
        self,
        net: nn.Module,
        reconstruction: Reconstruction | None = None,
        kl_weight: float = 1.0,
        kl_warmup_steps: int = 0,
        lpips_weight: float = 0.0,
        lpips_net: str = "vgg",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        check_number(least=0, kl_weight=kl_weight, lpips_weight=lpips_weight)
        check_count(0, kl_warmup_steps=kl_warmup_steps)
        # The command tells every network the number of classes, and an autoencoder has no such argument.
        self.hparams.get("net", {}).get("init_args", {}).pop("num_classes", None)
        self.net: Any = net
        self.reconstruction = reconstruction or DiscretisedLogistic(self.image_shape[0])
        self.kl_weight = kl_weight
        self.kl_warmup_steps = kl_warmup_steps
        self.lpips_weight = lpips_weight
        self._lpips = Frozen(load_lpips(lpips_net)) if lpips_weight else None
        self._moments: Tensor | None = None  # of the latents' means over a validation, for the count of active channels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image."""
        return (int(self.net.in_channels), int(self.net.image_size), int(self.net.image_size))

    def terms(self, image: Tensor, *key: int | str, index: Tensor | None = None) -> Terms:
        """The terms of the loss.

        Args:
            image: Images (B, C, H, W) in [-1, 1].
            key: Names the draw of the posterior's noise.
            index: Rows of the split for held-out images; see `keyed_noise`.

        Returns:
            The terms, not yet weighted.
        """
        posterior = self.net.encode(image)
        noise = self.keyed_noise(posterior.mean.shape, "posterior", *key, index=index)
        x_hat = self.net.decode(posterior.sample(noise))
        kl = posterior.kl().flatten(1).sum(1)
        lpips = kl.new_zeros(())
        if self._lpips is not None:
            lpips = self._lpips.on(image.device)(x_hat, image)
        return Terms(posterior.mean, self.reconstruction(x_hat, image), kl, lpips)

    def loss(self, terms: Terms, values: int, kl_weight: float) -> Tensor:
        """The terms put together.

        Args:
            terms: Of a batch.
            values: Number of values D in an image.
            kl_weight: Weight of the divergence now.

        Returns:
            A scalar.
        """
        bound = (terms.reconstruction + kl_weight * terms.kl).mean() / values
        return bound + self.lpips_weight * terms.lpips

    def current_kl_weight(self) -> float:
        """The weight of the divergence at this training step."""
        if self.kl_warmup_steps == 0:
            return self.kl_weight
        return self.kl_weight * min(1.0, (self.global_step + 1) / self.kl_warmup_steps)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch `{"image": (B, C, H, W) in [-1, 1]}`."""
        image = batch["image"]
        terms = self.terms(image, "train", run_seed(), self.current_epoch, batch_idx)
        loss = self.loss(terms, image[0].numel(), self.current_kl_weight())
        self.log_step({"train/loss": loss.detach(), "train/kl": terms.kl.detach().mean()}, len(image))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs the loss, with the same draws at every epoch, and the quality of reconstructions."""
        self._held_out("val", batch, batch_idx)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """The same on the test split."""
        self._held_out("test", batch, batch_idx)

    def _held_out(self, split: str, batch: dict[str, Tensor], batch_idx: int) -> None:
        image = batch["image"]
        values = image[0].numel()
        terms = self.terms(image, split, index=self.rows_of(batch, batch_idx))
        restored = self.net.decode(terms.mean).float().clamp(-1, 1)
        figures = {
            "loss": self.loss(terms, values, self.kl_weight),
            "psnr": psnr(restored, image).mean(),
            "ssim": ssim(restored, image),
            "kl": terms.kl.mean(),
            "kl_bits_per_dim": terms.kl.mean() / (values * math.log(2)),
        }
        if self.reconstruction.is_likelihood:
            figures["bits_per_dim"] = (terms.reconstruction + terms.kl).mean() / (values * math.log(2))
        for name, value in figures.items():
            shown = name in ("loss", "psnr") and split == "val"
            self.log(f"{split}/{name}", value, prog_bar=shown, batch_size=len(image), sync_dist=True)
        means = terms.mean.double() if image.device.type != "mps" else terms.mean
        sums = torch.stack([torch.ones_like(means[0]) * len(means), means.sum(0), means.square().sum(0)])
        self._moments = sums if self._moments is None else self._moments + sums

    def on_validation_epoch_end(self) -> None:
        """Logs the number of active latent channels."""
        super().on_validation_epoch_end()
        self._log_active("val")

    def on_test_epoch_end(self) -> None:
        """Logs the number of active latent channels."""
        self._log_active("test")

    def _log_active(self, split: str) -> None:
        if self._moments is not None:
            sums = self.trainer.strategy.reduce(self._moments, reduce_op="sum")
            self._moments = None
            assert isinstance(sums, Tensor)
            self.log(f"{split}/active_channels", active_channels(sums).float(), batch_size=1)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Images, encoded to the mean of their latents and decoded.

        Args:
            images: Images (B, C, H, W) in [-1, 1].

        Returns:
            The same shape, in [-1, 1] up to overshoot.
        """
        return self._evaluated(lambda: self.net.decode(self.net.encode(images).mean))

    @torch.no_grad()
    def interpolate(self, first: Tensor, last: Tensor, shares: Tensor) -> Tensor:
        """Decoded linear interpolations of latents; see `modules.latent_space.interpolate`."""
        return self._evaluated(
            lambda: interpolate(lambda x: self.net.encode(x).mean, self.net.decode, first, last, shares)
        )

    @torch.no_grad()
    def generate(
        self,
        seeds: Sequence[int],
        labels: Tensor | None = None,
        sampling: PriorSampling | None = None,
        callback: object = None,
    ) -> Tensor:
        """Draws one image per seed by decoding a draw from the prior N(0, 1).

        Args:
            seeds: One seed per image.
            labels: None; a VAE has no classes.
            sampling: There is but one way.
            callback: Never called, since there are no steps.

        Returns:
            Images (B, C, H, W), in [-1, 1] up to overshoot.

        Raises:
            ValueError: If labels are given.
        """
        check_labels(labels, 0, len(seeds))
        z = SeededNoise(seeds)(torch.empty(len(seeds), *latent_shape(self.net, self.image_shape), device=self.device))
        return self._evaluated(lambda: self.net.decode(z))

    def _evaluated(self, compute: Any) -> Tensor:
        training = self.training
        self.eval()
        try:
            made: Tensor = compute()
        finally:
            self.train(training)
        return made

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Records how to build the autoencoder, for the second stage."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["autoencoder"] = describe(self.net)


def ssim(x_hat: Tensor, x: Tensor) -> Tensor:
    """Mean structural similarity of images, with Gaussian windows of 11 pixels.

    Args:
        x_hat: Reconstructions (B, C, H, W) in [-1, 1], H and W at least 6.
        x: Images of the same shape.

    Returns:
        A scalar, 1 for equal images.

    Source: Wang 2004, Image quality assessment: from error visibility to structural similarity.
    """
    made = structural_similarity_index_measure(x_hat.float(), x.float(), data_range=(-1.0, 1.0))
    assert isinstance(made, Tensor)
    return made


def active_channels(sums: Tensor) -> Tensor:
    """Number of active latent channels.

    A channel is active where the variance over images of its posterior mean, averaged over positions, is above 0.01.

    Args:
        sums: Number, sum and sum of squares of the means over images, shape (3, c, h, w).

    Returns:
        Their number, a scalar.

    Source: Burda 2016, arXiv 1509.00519, section 5.2 (of single units; 0.01 is its threshold).
    """
    count, total, squares = sums
    variance = squares / count - (total / count).square()
    active: Tensor = variance.mean(dim=(1, 2)) > ACTIVE_VARIANCE
    return active.sum()
