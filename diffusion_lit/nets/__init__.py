"""Networks: torch only. Each maps (x, noise, label, augment) to a prediction of shape (B, out_channels, H, W)."""

from diffusion_lit.nets.unet import UNet

__all__ = ["UNet"]
