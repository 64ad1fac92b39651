"""LightningDataModules of images; they know nothing of diffusion."""
