"""Other libraries' models as denoisers and autoencoders; needs the extra `pretrained` (diffusers, transformers).

files         a name on the Hugging Face hub or a folder, as a folder of safetensors and JSON
schedulers    a scheduler's config as schedule, prediction type and settings of sampling
prompts       texts as embeddings, computed once and kept
networks      U-Nets behind this project's interface
models        all of it as a model that samples and edits like one trained here
autoencoders  the first stage of latent diffusion
"""

from diffusion_lit.pretrained.autoencoders import (
    AutoencoderKL,
    AutoencoderTiny,
    PretrainedAutoencoder,
    load_pretrained_autoencoder,
)
from diffusion_lit.pretrained.load import load_pretrained
from diffusion_lit.pretrained.models import Cascade, PretrainedLatentModel, PretrainedModel, Upsampler

__all__ = [
    "AutoencoderKL",
    "AutoencoderTiny",
    "Cascade",
    "PretrainedAutoencoder",
    "PretrainedLatentModel",
    "PretrainedModel",
    "Upsampler",
    "load_pretrained",
    "load_pretrained_autoencoder",
]
