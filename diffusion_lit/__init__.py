"""diffusion-lit: training, sampling and measuring image diffusion models with PyTorch Lightning."""
