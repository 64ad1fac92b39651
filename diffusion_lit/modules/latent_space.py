"""The latent space of the second stage: a frozen autoencoder, its hash, and the scale of the latents.

    z = mean(x) + std(x) n,        u = (z - mu_c) / s_c

with n standard normal, and mu_c, s_c per channel the mean and standard deviation of z over the whole training set:

    mu_c = E[mean],        s_c^2 = E[std^2 + mean^2] - mu_c^2        (over images and positions; n needs no draw)

The diffusion model sees only u, of mean 0 and variance 1. The autoencoder is not registered in the module that uses it,
so that optimizer, average and precision leave it alone.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_lit.modules.autoencoders import build, describe
from diffusion_lit.nets.autoencoder import Posterior
from diffusion_lit.storage.hashing import weights_hash

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Frozen:
    """A frozen network, hidden from the registry of the module that uses it.

    Args:
        net: The network; it is put in eval mode, and its parameters take no gradient.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net.eval().requires_grad_(False)

    def on(self, device: torch.device) -> Any:
        """The network, moved to a device.

        Args:
            device: Where it shall work.

        Returns:
            The network.
        """
        return self.net.to(device)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Frozen":
        return self  # an average of the module shares it


class LatentSpace(Frozen):
    """A frozen autoencoder with the scale of its latents.

    Args:
        net: The autoencoder: `encode`, `decode`, `in_channels`, `latent_channels`, `factor`, `config`.
        image_shape: Shape (C, H, W) of the images.
        precision: What it computes in: float32, bfloat16 or float16.

    Raises:
        ValueError: If the autoencoder is made for other images, or there is no such precision.
    """

    def __init__(self, net: nn.Module, image_shape: tuple[int, int, int], precision: str = "float32") -> None:
        if precision not in DTYPES:
            raise ValueError(f"vae_precision is {precision!r}; choose one of {', '.join(DTYPES)}.")
        super().__init__(net.to(DTYPES[precision]))
        self.image_shape = image_shape
        self.shape = latent_shape(net, image_shape)
        self.precision = precision
        self.sha256 = weights_hash(self.net.state_dict())
        self.encoder_sha256 = encoder_hash(self.net.state_dict())
        self.mean: Tensor | None = None
        self.std: Tensor | None = None

    def take_decoder(self, net: nn.Module, name: str) -> None:
        """Decodes with another decoder from here on.

        Args:
            net: An autoencoder with the same encoder, as `VAE.frozen_encoder` trains it.
            name: What it is called in the refusal.

        Raises:
            ValueError: If its encoder is another one.
        """
        if encoder_hash(net.to(DTYPES[self.precision]).state_dict()) != self.encoder_sha256:
            raise ValueError(
                f"{name} has another encoder than the autoencoder with the hash {self.sha256[:12]}, on whose latents "
                "the model was trained, so that its decoder does not know them; give one that was trained with "
                "frozen_encoder, or train anew."
            )
        self.net.load_state_dict(net.state_dict())
        self.sha256 = weights_hash(self.net.state_dict())

    def set_scale(self, mean: Tensor, std: Tensor) -> None:
        """Takes the scale of the latents.

        Args:
            mean: Mean of each channel, shape (c,).
            std: Standard deviation of each channel, shape (c,), positive.

        Raises:
            ValueError: If a channel does not vary.
        """
        if not bool((std > 0).all()):
            raise ValueError(
                f"Channel {int((std <= 0).nonzero()[0])} of the latents is the same for all training images, so that "
                "it cannot be standardised; train the VAE for longer or with fewer latent_channels."
            )
        self.mean, self.std = mean.double().cpu().reshape(-1, 1, 1), std.double().cpu().reshape(-1, 1, 1)

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.mean is None or self.std is None:
            raise ValueError(
                "The scale of the latents is not known before training has begun; load a trained checkpoint or run fit."
            )
        return self.mean.to(like.device, torch.float32), self.std.to(like.device, torch.float32)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Posterior:
        """The distribution of the latents of images, as the autoencoder gives it.

        Args:
            images: Images (B, C, H, W) in [-1, 1].

        Returns:
            Mean and standard deviation (B, *shape), float32.
        """
        net = self.on(images.device)
        with torch.autocast(images.device.type, enabled=False):
            posterior = net.encode(images.to(DTYPES[self.precision]))
        return Posterior(posterior.mean.float(), posterior.std.float())

    def standardise(self, z: Tensor) -> Tensor:
        """Latents of the autoencoder at the scale that the diffusion model sees.

        Args:
            z: Shape (B, *shape).

        Returns:
            (z - mean) / std per channel.
        """
        mean, std = self._scale(z)
        return (z - mean) / std

    @torch.no_grad()
    def _decode(self, z: Tensor) -> Tensor:
        """Images of latents as the autoencoder gives them."""
        net = self.on(z.device)
        with torch.autocast(z.device.type, enabled=False):
            images: Tensor = net.decode(z.to(DTYPES[self.precision]))
        return images.float()

    def decode(self, u: Tensor) -> Tensor:
        """Images of standardised latents.

        Args:
            u: Shape (B, *shape).

        Returns:
            Images (B, C, H, W), float32, in [-1, 1] up to overshoot.
        """
        mean, std = self._scale(u)
        return self._decode(u * std + mean)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images, encoded to the mean of their latents and decoded: the best that a model of the latents can reach.

        Args:
            images: Images (B, C, H, W) in [-1, 1].

        Returns:
            The same shape, float32.
        """
        return self._decode(self.encode(images).mean)

    def state(self) -> dict[str, Any]:
        """All that is needed to rebuild it, as tensors and plain values."""
        return {
            **describe(self.net),
            "image_shape": list(self.image_shape),
            "precision": self.precision,
            "sha256": self.sha256,
            "state_dict": {name: tensor.detach().cpu() for name, tensor in self.net.state_dict().items()},
            "mean": self.mean,
            "std": self.std,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "LatentSpace":
        """Builds the space that a checkpoint carries.

        Args:
            state: From `state`.

        Returns:
            The space.

        Raises:
            ValueError: If the weights are not those that the hash names.
        """
        net = build(state)
        net.load_state_dict(state["state_dict"])
        channels, height, width = state["image_shape"]
        space = cls(net, (channels, height, width), state["precision"])
        if space.sha256 != state["sha256"]:
            raise ValueError("The autoencoder in the checkpoint has other weights than its hash says; it is damaged.")
        if state["mean"] is not None:
            space.set_scale(state["mean"], state["std"])
        return space


def encoder_hash(weights: Mapping[str, Tensor]) -> str:
    """The hash of the weights that latents depend on: all but the decoder's.

    Args:
        weights: Those of the autoencoder by name.

    Returns:
        A SHA-256.
    """
    apart = {"decoder", "post_quant_conv"}  # as diffusers' autoencoders name them too
    return weights_hash({name: value for name, value in weights.items() if not apart & set(name.split("."))})


def latent_shape(net: Any, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Shape of the latents of an autoencoder.

    Args:
        net: The autoencoder.
        image_shape: Shape (C, H, W) of the images.

    Returns:
        (c, h, w).

    Raises:
        ValueError: If the autoencoder is made for other images or does not divide them.
    """
    channels, height, width = image_shape
    made_for = (net.in_channels, getattr(net, "image_size", None) or height)
    if made_for != (channels, height):
        raise ValueError(
            f"The autoencoder is made for images of {made_for[0]} channels and {made_for[1]} pixels, and the data's "
            f"have {channels} and {height}; train one on this data."
        )
    if height % net.factor or width % net.factor:
        raise ValueError(
            f"Images of {height}x{width} do not divide by {net.factor}, the autoencoder's factor; resize them."
        )
    return (int(net.latent_channels), height // net.factor, width // net.factor)


def interpolate(
    encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor], first: Tensor, last: Tensor, shares: Tensor
) -> Tensor:
    """Decodes linear interpolations of the latents of pairs of images.

    Args:
        encode: Images to latents.
        decode: Latents to images.
        first: Images (B, C, H, W) in [-1, 1] where the ways begin.
        last: Images (B, C, H, W) where they end.
        shares: Places on a way, shape (S,), 0 being the first image and 1 the last.

    Returns:
        Images (B, S, C, H, W).
    """
    z = torch.lerp(encode(first)[:, None], encode(last)[:, None], shares.reshape(1, -1, 1, 1, 1))
    made = decode(z.flatten(0, 1))
    return made.reshape(*z.shape[:2], *made.shape[1:])
