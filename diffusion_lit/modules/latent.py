"""Latent diffusion: any prediction type, sampler, guidance and network, on the latents of a trained autoencoder.

Stage one trains `VAE`; here its autoencoder is frozen, and a denoiser is trained on its standardised latents (Rombach
2022, arXiv 2112.10752). `modules.latent_space` defines the standardisation and hides the autoencoder from optimizer,
average and precision; `modules.latent_cache` keeps latents on disk, so that training never encodes. The checkpoint
holds the autoencoder, its hash and the scale of the latents, which is all that sampling needs.
"""

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from diffusion_lit.diffusion import (
    Denoiser,
    DenoisingLoss,
    EDMPreconditioning,
    LogNormal,
    NoiseLevels,
    Preconditioning,
    Sampling,
)
from diffusion_lit.diffusion.generate import refuse_clipping
from diffusion_lit.diffusion.models import LatentModel
from diffusion_lit.diffusion.rng import run_seed
from diffusion_lit.modules.autoencoders import load_autoencoder
from diffusion_lit.modules.base import DiffusionModule
from diffusion_lit.modules.latent_cache import LatentCache, latent_cache
from diffusion_lit.modules.latent_scale import encode_all, scale_of
from diffusion_lit.modules.latent_space import LatentSpace, interpolate, latent_shape
from diffusion_lit.modules.protocols import DataSet, is_data_set
from diffusion_lit.runtime.internals import data_of
from diffusion_lit.runtime.ranks import over_ranks


class LatentDiffusion(LatentModel, DiffusionModule):
    """Denoising on the latents of a frozen autoencoder.

    Args:
        net: The network; its channels and size are those of the latents.
        vae_ckpt: Checkpoint of `VAE`; the folder of its runs, `runs/NAME`, for the newest one there; or, with the extra
            `pretrained`, a folder of diffusers' AutoencoderKL or AutoencoderTiny or its name `hub:OWNER/NAME`.
        scaling: Prediction type; by default EDM's preconditioning with sigma_data 1, which standardised latents have.
        noise_levels: Distribution that training draws sigma from; by default log-normal with P_mean -0.5 and P_std 1.2,
            which is EDM's relative to the scale of the data.
        loss: Denoising loss with its weight; by default 1/c_out^2.
        sampling: How latents are drawn; by default 18 steps of Heun's method on the Karras grid.
        cache_latents: Whether latents are encoded once and kept on disk; otherwise each step runs the encoder.
        cache_dir: Folder of such caches; `latents` in the folder of all caches by default.
        vae_precision: What the autoencoder computes in: float32, bfloat16 or float16.
        options: Further arguments of `DiffusionModule`, but for `augment` and `condition`.
    """

    autoencoder_is_frozen = True

    def __init__(
        self,
        net: nn.Module,
        vae_ckpt: str,
        scaling: Preconditioning | None = None,
        noise_levels: NoiseLevels | None = None,
        loss: DenoisingLoss | None = None,
        sampling: Sampling | None = None,
        cache_latents: bool = True,
        cache_dir: str | None = None,
        vae_precision: str = "float32",
        **options: Any,
    ) -> None:
        super().__init__(
            Denoiser(net, scaling or EDMPreconditioning(sigma_data=1.0)),
            noise_levels or LogNormal(P_mean=-0.5, P_std=1.2),
            loss or DenoisingLoss(),
            sampling or Sampling(),
            augment=None,
            condition=None,
            **options,
        )
        self.vae_ckpt = vae_ckpt
        self.vae_precision = vae_precision
        self.cache_latents = cache_latents
        self.cache_dir = cache_dir
        self._space: LatentSpace | None = None
        self._caches: dict[str, LatentCache] = {}
        refuse_clipping(self.sampling)

    @classmethod
    def net_input(cls, image_shape: tuple[int, int, int], **init_args: Any) -> tuple[int, int, int]:
        """Shape of the latents of the autoencoder that `vae_ckpt` names; see `BaseModule.net_input`."""
        return latent_shape(load_autoencoder(init_args["vae_ckpt"]), image_shape)

    @property
    def space(self) -> LatentSpace:
        """The latent space, which `setup` or a checkpoint gives.

        Raises:
            ValueError: If neither was there.
        """
        if self._space is None:
            raise ValueError("The autoencoder is not loaded; load a checkpoint of LatentDiffusion, or run fit.")
        return self._space

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of the images."""
        if self.drawn_size is None:
            return self.space.image_shape
        factor = int(self.space.net.factor)  # type: ignore[arg-type]
        return (self.space.image_shape[0], self.drawn_size[0] * factor, self.drawn_size[1] * factor)

    def setup(self, stage: str) -> None:
        """Loads the autoencoder that `vae_ckpt` names.

        Args:
            stage: "fit", "validate", "test" or "predict".

        Raises:
            ValueError: If it is not available, or does not fit the data or the network.
        """
        super().setup(stage)
        if self._space is None:
            self._space = LatentSpace(load_autoencoder(self.vae_ckpt), self._data().image_shape, self.vae_precision)
        if self.space.shape != self.x_shape:
            raise ValueError(
                f"The latents have shape {self.space.shape} and the network is made for {self.x_shape}; give it "
                f"in_channels {self.space.shape[0]} and image_size {self.space.shape[1]}."
            )

    def on_fit_start(self) -> None:
        """Opens or makes the cache of latents, and computes their scale over all ranks."""
        super().on_fit_start()
        if (self.init_from or {}).get("encoder_sha256") not in (None, self.space.encoder_sha256):
            rank_zero_warn(
                "The weights that training begins from denoised latents of another encoder than vae_ckpt "
                f"{self.vae_ckpt} has, and know little of these; give theirs, with the same vae_precision."
            )
        data = self._data()
        mirrored = data.mirrored(0, 0) is not None if self.cache_latents else bool(data.random_flip)
        brief = bool(self.trainer.fast_dev_run)  # type: ignore[attr-defined]
        if self.cache_latents and not brief:
            self._caches = {
                split: latent_cache(
                    self.trainer, self.space, data, split, mirrored and split == "train", self.cache_dir, self.device
                )
                for split in ("train", "val")
                if len(data.reference_images(split))
            }
        if self.space.mean is None:
            images = data.reference_images("train")
            images = images[:256] if brief else images
            if self._caches:
                sums = self._caches["train"].sums
            else:
                sums = encode_all(self.space, images, mirrored, self.device, self.ranks)
                sums = over_ranks(self.trainer, sums, "sum")
            _, height, width = self.space.shape
            self.space.set_scale(*scale_of(sums, len(images) * (2 if mirrored else 1), height * width))
        for cache in self._caches.values():
            cache.to(self.device)

    def on_fit_end(self) -> None:
        """Closes the cache of latents."""
        self._caches = {}

    def _data(self) -> DataSet:
        data = data_of(self.trainer)
        if not is_data_set(data):
            raise ValueError("LatentDiffusion needs to see the whole training set; train it on one of datamodules.")
        return data

    def x0(self, batch: dict[str, Tensor], split: str, batch_idx: int) -> Tensor:
        """Standardised latents of a batch, drawn from their posteriors under a key; see `DiffusionModule.x0`."""
        cache = self._caches.get(split)
        if cache is None:
            posterior = self.space.encode(batch["image"])
        else:
            mirrored = self._data().mirrored(self.current_epoch, batch_idx) if split == "train" else None
            posterior = cache.posterior(batch["index"], mirrored)
        training = split == "train"
        key = (split, run_seed(), self.current_epoch, batch_idx) if training else (split,)
        index = None if training else self.rows_of(batch, batch_idx)
        noise = self.keyed_noise(posterior.mean.shape, "posterior", *key, index=index)
        return self.space.standardise(posterior.sample(noise))

    def encode(self, images: Tensor) -> Tensor:
        """Standardised latents of images, the means of their posteriors.

        Args:
            images: Images (B, C, H, W) in [-1, 1].

        Returns:
            Shape (B, c, h, w).
        """
        return self.space.standardise(self.space.encode(images).mean)

    def decode(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) of standardised latents (B, c, h, w)."""
        return self.space.decode(x)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), encoded and decoded."""
        return self.space.reconstruct(images)

    def interpolate(self, first: Tensor, last: Tensor, shares: Tensor) -> Tensor:
        """Decoded linear interpolations of latents; see `modules.latent_space.interpolate`."""
        return interpolate(self.encode, self.decode, first, last, shares)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the autoencoder, its hash and the scale of the latents."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["latent_space"] = self.space.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the latent space from the checkpoint.

        Raises:
            ValueError: If the checkpoint has none, or it was trained with another encoder than `vae_ckpt` has.
        """
        super().on_load_checkpoint(checkpoint)
        if "latent_space" not in checkpoint:
            raise ValueError("The checkpoint carries no autoencoder, so it is not one of LatentDiffusion.")
        trained = LatentSpace.from_state(checkpoint["latent_space"])
        if self._space is not None and self._space.sha256 != trained.sha256:
            trained.take_decoder(self._space.net, f"vae_ckpt {self.vae_ckpt}")
        self._space = trained
