"""VAE: an autoencoder with a KL term or codes, which is a baseline and the first stage of latent diffusion.

With D values in an image, the loss is

    (reconstruction(x_hat, x) + kl_weight * KL(q(z|x) || p(z))) / D,         x_hat = decode(z),  z ~ q(z|x)
    + the bottleneck's penalty + weight * perceptual distance + adversary

Under a likelihood and kl_weight 1 the first line is -ELBO in nats per value (Kingma & Welling 2014, arXiv 1312.6114),
and divided by ln 2 a bound on the bits per dimension of 8-bit images. The bottleneck is the network's: a Gaussian with
the prior N(0, 1), z = mean + std * noise, or codes. `modules.perceptual` and `modules.adversary` make images sharp that
a distance of pixels alone would blur.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from diffusion_lit.checks import check_count, check_number
from diffusion_lit.diffusion.generate import check_labels
from diffusion_lit.diffusion.images import psnr
from diffusion_lit.diffusion.models import evaluating
from diffusion_lit.diffusion.rng import run_seed
from diffusion_lit.modules.adversary import Adversary
from diffusion_lit.modules.autoencoders import describe, part_of, vae_checkpoint
from diffusion_lit.modules.base import BaseModule
from diffusion_lit.modules.latent_space import interpolate, latent_shape
from diffusion_lit.modules.perceptual import LPIPS, Perceptual
from diffusion_lit.modules.prior import PriorSampling
from diffusion_lit.modules.protocols import ImageSource
from diffusion_lit.modules.quality import LatentUse, ssim
from diffusion_lit.modules.reconstruction import DiscretisedLogistic, Reconstruction
from diffusion_lit.runtime.internals import data_of, trainer_of
from diffusion_lit.runtime.ranks import over_ranks, rank_zero_first


class Terms(NamedTuple):
    """The terms of the loss of a batch.

    Args:
        mean: Mean of the latents (B, c, h, w).
        reconstruction: Distance summed over each image, shape (B,).
        kl: Divergence of each image's latent in nats, shape (B,).
        perceptual: Perceptual distance of each image with its weight, shape (B,); 0 where it is off.
        penalty: Of the bottleneck, shape (B,).
        x_hat: The reconstructions.
    """

    mean: Tensor
    reconstruction: Tensor
    kl: Tensor
    perceptual: Tensor
    penalty: Tensor
    x_hat: Tensor

    def fidelity(self) -> Tensor:
        """The distance of reconstructions from their images in the terms of the loss; a scalar."""
        return self.reconstruction.mean() / self.x_hat[0].numel() + self.perceptual.mean()


class VAE(BaseModule):
    """Variational autoencoder of images.

    Args:
        net: The autoencoder, such as `diffusion_lit.nets.Autoencoder`; its bottleneck is a Gaussian, FSQ or VQ.
        reconstruction: Distance of images; by default a discretised logistic likelihood with a learned scale per
            channel.
        kl_weight: Weight of the divergence; 1 with a likelihood bounds the bits per dimension.
        kl_warmup_steps: Training steps over which that weight rises from 0.
        lpips_weight: Weight of the perceptual distance LPIPS, short for `perceptual`; 0 for none. Its weights are
            downloaded by torchvision.
        lpips_net: Network behind LPIPS: `vgg`, `alex` or `squeeze`.
        perceptual: A perceptual distance with its weight: `ClassifierPerceptual`, which needs no download, or `LPIPS`.
        adversary: A discriminator that is trained against the autoencoder, or none.
        frozen_encoder: A second phase: checkpoint of a `VAE`, or the folder of its runs. Its autoencoder is what
            training begins with, its encoder stays as it is and the decoder alone is trained, so that latents, and all
            that was trained on them, stay valid.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning-rate schedule from the optimizer, stepped each training step.

    Raises:
        ValueError: If a weight or a number of steps is negative, or the network lacks what the others ask of it.
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
        perceptual: Perceptual | None = None,
        adversary: Adversary | None = None,
        frozen_encoder: str | None = None,
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
        lpips = [LPIPS(lpips_weight, lpips_net)] if lpips_weight else []
        self._perceptual: list[Perceptual] = [*lpips, *([] if perceptual is None else [perceptual])]
        self.adversary = adversary
        if adversary is not None:
            _require(net, "last_layer", "an adversary")
            adversary.attach(self.image_shape)
        self.frozen_encoder = frozen_encoder
        self._is_restored = False
        if frozen_encoder is not None:
            _require(net, "encoder", "frozen_encoder")
            for part in ("encoder", "bottleneck"):
                getattr(net, part, nn.Identity()).requires_grad_(False)
        self._use = LatentUse()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image."""
        return (int(self.net.in_channels), int(self.net.image_size), int(self.net.image_size))

    @property
    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """The autoencoder's parameters, and the adversary's with its ratio of learning rates."""
        apart = self.unaveraged
        own = [each for each in self.parameters() if each.requires_grad and not any(each is one for one in apart)]
        return [(own, 1.0), *([] if self.adversary is None else [(apart, self.adversary.lr_ratio)])]

    @property
    def unaveraged(self) -> list[nn.Parameter]:
        """The adversary's parameters: the average is of the autoencoder alone."""
        return [] if self.adversary is None else list(self.adversary.parameters())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes that the weights are there; see `BaseModule.on_load_checkpoint`."""
        super().on_load_checkpoint(checkpoint)
        self._is_restored = True

    def on_fit_start(self) -> None:
        """Takes over the weights of the first phase, and loads the networks of the perceptual distances.

        Raises:
            ValueError: If `frozen_encoder` is none, or another autoencoder than this one.
        """
        if self.frozen_encoder is not None and not self._is_restored:
            first = vae_checkpoint(self.frozen_encoder)
            try:
                self.net.load_state_dict(part_of(first["state_dict"], "net"))
            except RuntimeError as error:
                raise ValueError(
                    f"frozen_encoder {self.frozen_encoder} is another autoencoder than this run's net; give net the "
                    f"same arguments, {first['autoencoder']['init_args']}."
                ) from error
            with suppress(RuntimeError):  # the scale of a likelihood; another distance has none, or its own
                self.reconstruction.load_state_dict(part_of(first["state_dict"], "reconstruction"))
        self._load_perceptual()

    def on_validation_start(self) -> None:
        """Loads them for `diffusion-lit validate` and `test` too."""
        self._load_perceptual()

    on_test_start = on_validation_start

    def _load_perceptual(self) -> None:
        for one in self._perceptual:
            if one.frozen is None:
                data = cast(ImageSource, data_of(trainer_of(self)))
                rank_zero_first(partial(one.load, data), "the perceptual distance")

    def terms(self, image: Tensor, *key: int | str, index: Tensor | None = None) -> Terms:
        """The terms of the loss.

        Args:
            image: Images (B, C, H, W) in [-1, 1].
            key: Names the draw of the posterior's noise.
            index: Rows of the split for held-out images; see `keyed_noise`.

        Returns:
            The terms, the divergence not yet weighted.
        """
        if self.frozen_encoder is not None:
            self.net.encoder.eval()  # its dropout would change the latents
        posterior = self.net.encode(image)
        noise = self.keyed_noise(posterior.mean.shape, "posterior", *key, index=index)
        x_hat = self.net.decode(posterior.sample(noise))
        kl = posterior.kl().flatten(1).sum(1)
        perceptual = torch.zeros_like(kl)
        for one in self._perceptual:
            perceptual = perceptual + one.weight * one(x_hat, image)
        return Terms(*(posterior.mean, self.reconstruction(x_hat, image), kl, perceptual, posterior.penalty(), x_hat))

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
        return bound + (terms.perceptual + terms.penalty).mean()

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
        figures = {"train/loss": loss.detach(), "train/kl": terms.kl.detach().mean()}
        if self.adversary is not None:
            contest = self.adversary(
                image, terms.x_hat, terms.fidelity(), self.net.last_layer, self.global_step, self.over_ranks
            )
            loss = loss + contest.loss
            figures |= {f"train/{name}": value for name, value in contest.figures.items()}
        self.log_step(figures, len(image))
        return loss

    def over_ranks(self, value: Tensor, how: str = "mean") -> Tensor:
        """The mean, or the sum, of a detached tensor over ranks."""
        return over_ranks(trainer_of(self), value, how)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Leaves the adversary unchanged until its start."""
        if self.adversary is not None:
            self.adversary.rest(self.global_step)

    def held_out(self, split: str, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs the loss and the quality of reconstructions; see `BaseModule.held_out`."""
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
        if self._perceptual:
            figures["perceptual"] = sum((one(restored, image).mean() for one in self._perceptual), image.new_zeros(()))
        if self.reconstruction.is_likelihood:
            figures["bits_per_dim"] = (terms.reconstruction + terms.kl).mean() / (values * math.log(2))
        for name, value in figures.items():
            shown = name in ("loss", "psnr") and split == "val"
            self.log(f"{split}/{name}", value, prog_bar=shown, batch_size=len(image), sync_dist=True)
        self._use.add(terms.mean, getattr(self.net, "bottleneck", None))

    def on_validation_epoch_end(self) -> None:
        """Logs how much of the latents is in use."""
        super().on_validation_epoch_end()
        self._log_use("val")

    def on_test_epoch_end(self) -> None:
        """Logs how much of the latents is in use."""
        self._log_use("test")

    def _log_use(self, split: str) -> None:
        for name, value in self._use.figures(partial(self.over_ranks, how="sum")).items():
            self.log(f"{split}/{name}", value, batch_size=1, sync_dist=True)  # of all ranks already

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Images, encoded to the mean of their latents and decoded.

        Args:
            images: Images (B, C, H, W) in [-1, 1].

        Returns:
            The same shape, in [-1, 1] up to overshoot.
        """
        with evaluating(self):
            made: Tensor = self.net.decode(self.net.encode(images).mean)
        return made

    @torch.no_grad()
    def interpolate(self, first: Tensor, last: Tensor, shares: Tensor) -> Tensor:
        """Decoded linear interpolations of latents; see `modules.latent_space.interpolate`."""
        with evaluating(self):
            made = interpolate(lambda x: self.net.encode(x).mean, self.net.decode, first, last, shares)
        return made

    @torch.no_grad()
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One sample per image of the batch, its index as the seed; (B, C, H, W)."""
        return self.generate(batch["index"].tolist())

    @torch.no_grad()
    def generate(
        self,
        seeds: Sequence[int],
        labels: Tensor | None = None,
        sampling: PriorSampling | None = None,
        callback: object = None,
    ) -> Tensor:
        """Draws one image per seed by decoding a draw from the prior.

        Args:
            seeds: One seed per image.
            labels: None; a VAE has no classes.
            sampling: The prior; by default the module's own.
            callback: Never called, since there are no steps.

        Returns:
            Images (B, C, H, W), in [-1, 1] up to overshoot.

        Raises:
            ValueError: If labels are given.
        """
        check_labels(labels, 0, len(seeds))
        prior = (sampling or self.sampling).prior
        z = prior.draw(self.net, latent_shape(self.net, self.image_shape), seeds, self.device)
        with evaluating(self):
            made: Tensor = self.net.decode(z)
        return made

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Records how to build the autoencoder, for the second stage."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["autoencoder"] = describe(self.net)


def _require(net: nn.Module, name: str, what: str) -> None:
    """Refuses a network that lacks what an option asks for."""
    if not hasattr(net, name):
        raise ValueError(
            f"{type(net).__name__} has no {name}, which {what} asks for; take diffusion_lit.nets.Autoencoder, or leave "
            f"{what} out."
        )
