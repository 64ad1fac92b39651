"""Other libraries' autoencoders in the place of this project's own.

Autoencoders of Stable Diffusion's kind: `AutoencoderKL` (a Gaussian posterior, like `nets.Autoencoder`) and
`AutoencoderTiny` (a distilled one without noise: std 0). Both take and give images in [-1, 1]. The scale that their
configuration names (0.18215 and the like) is left out, since the latents are standardised over the training set anyway.

Weights are read from safetensors alone, and the configuration is kept, so that a checkpoint that carries such an
autoencoder is built again without its folder.
"""

import inspect
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffusion_lit.modules.autoencoders import LOADERS
from diffusion_lit.nets.autoencoder import Posterior
from diffusion_lit.pretrained.files import find_model, library, load_part, read_json
from diffusion_lit.words import article


class PretrainedAutoencoder(nn.Module):
    """Base of diffusers' autoencoders behind this project's interface.

    Args:
        config: The configuration in diffusers' own terms, as its config.json has it.

    Attributes:
        in_channels: Channels of an image.
        latent_channels: Channels of a latent.
        factor: Pixels per latent position along a side.
        config: The arguments that build it again.
    """

    kind: ClassVar[str]

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        kind = getattr(library("diffusers"), self.kind)
        known = inspect.signature(kind.__init__).parameters
        plain = {key: value for key, value in config.items() if key in known}
        self.config = {"config": plain}
        self.vae: Any = kind(**plain)
        self.in_channels = int(plain.get("in_channels", 3))
        self.latent_channels = int(plain.get("latent_channels", 4))
        self.factor = self._factor(plain)

    def _factor(self, config: dict[str, Any]) -> int:
        raise NotImplementedError

    def encode(self, x: Tensor) -> Posterior:
        """The distribution of the latents of images (B, C, H, W) in [-1, 1]."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] of latents (B, c, h, w)."""
        x: Tensor = self.vae.decode(z).sample
        return x


class AutoencoderKL(PretrainedAutoencoder):
    """diffusers' AutoencoderKL (Rombach 2022, arXiv 2112.10752)."""

    kind = "AutoencoderKL"

    def _factor(self, config: dict[str, Any]) -> int:
        return int(2 ** (len(config.get("block_out_channels", (64,))) - 1))

    def encode(self, x: Tensor) -> Posterior:
        """See `PretrainedAutoencoder.encode`."""
        posterior = self.vae.encode(x).latent_dist
        return Posterior(posterior.mean, posterior.std)


class AutoencoderTiny(PretrainedAutoencoder):
    """diffusers' AutoencoderTiny (TAESD), whose latents have no noise."""

    kind = "AutoencoderTiny"

    def _factor(self, config: dict[str, Any]) -> int:
        return int(2 ** (len(config.get("encoder_block_out_channels", (64,) * 4)) - 1))

    def encode(self, x: Tensor) -> Posterior:
        """See `PretrainedAutoencoder.encode`."""
        z = self.vae.encode(x).latents
        return Posterior(z, torch.zeros_like(z))


AUTOENCODERS: dict[str, type[PretrainedAutoencoder]] = {kind.kind: kind for kind in (AutoencoderKL, AutoencoderTiny)}


def load_pretrained_autoencoder(source: str) -> PretrainedAutoencoder:
    """Reads an autoencoder that diffusers saved.

    Args:
        source: A folder with config.json and safetensors weights, or a name on the Hugging Face hub, OWNER/NAME or
            OWNER/NAME/FOLDER.

    Returns:
        The autoencoder.

    Raises:
        ValueError: If diffusers or the model is not available, or is neither AutoencoderKL nor AutoencoderTiny.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        owner, name, *rest = [*source.split("/"), ""][:3]
        part = rest[0] if rest else ""
        folder = find_model(f"{owner}/{name}" if name else owner, (part,) if part else ()) / part
    config = read_json(folder / "config.json")
    kind = AUTOENCODERS.get(str(config.get("_class_name")))
    if kind is None:
        raise ValueError(
            f"{source} holds {article(str(config.get('_class_name', 'model without a name')))}; the autoencoders "
            f"that serve here are {' and '.join(AUTOENCODERS)}."
        )
    vae = load_part(getattr(library("diffusers"), kind.kind), folder, low_cpu_mem_usage=False)
    net = kind(dict(vae.config))
    net.vae.load_state_dict(vae.state_dict())
    return net.eval()


LOADERS["diffusers"] = load_pretrained_autoencoder
