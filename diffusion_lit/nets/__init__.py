"""Networks: torch only. Each maps (x, noise, label, augment) to a prediction of shape (B, out_channels, H, W)."""

from diffusion_lit.nets.augment import AUGMENT_DIM, Augment, augment_images
from diffusion_lit.nets.autoencoder import Autoencoder, Posterior
from diffusion_lit.nets.bottlenecks import FSQ, VQ
from diffusion_lit.nets.classifier import ConvClassifier
from diffusion_lit.nets.discriminator import PatchDiscriminator
from diffusion_lit.nets.dit import DiT
from diffusion_lit.nets.magnitude import force_norms
from diffusion_lit.nets.mp_unet import MPUNet
from diffusion_lit.nets.presets import DDPMCIFAR10, DDPMpp, DiT_B_2, DiT_S_2, PlainUNet
from diffusion_lit.nets.unet import UNet

__all__ = [
    "AUGMENT_DIM",
    "DDPMCIFAR10",
    "FSQ",
    "VQ",
    "Augment",
    "Autoencoder",
    "ConvClassifier",
    "DDPMpp",
    "DiT",
    "DiT_B_2",
    "DiT_S_2",
    "MPUNet",
    "PatchDiscriminator",
    "PlainUNet",
    "Posterior",
    "UNet",
    "augment_images",
    "force_norms",
]
