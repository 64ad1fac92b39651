"""The commands of `lightning`, which is also called `diffusion-lit`: one file each."""
