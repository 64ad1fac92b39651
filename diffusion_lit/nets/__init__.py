"""Networks: torch only. Each maps (x, noise, label, augment) to a prediction of shape (B, out_channels, H, W)."""

from diffusion_lit.nets.dit import DiT
from diffusion_lit.nets.presets import DDPMCIFAR10, DDPMpp, DiT_B_2, DiT_S_2, PlainUNet
from diffusion_lit.nets.unet import UNet

__all__ = ["DDPMCIFAR10", "DDPMpp", "DiT", "DiT_B_2", "DiT_S_2", "PlainUNet", "UNet"]
