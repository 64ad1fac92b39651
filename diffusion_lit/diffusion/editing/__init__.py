"""Editing: what a trained denoiser can do beyond sampling, a short function per task, for every model and sampler.

Each function takes a model (a `PixelModel` or `LatentModel`, such as any `DiffusionModule`) and images in [-1, 1],
takes labels, seeds and a `Sampling` by keyword, and returns images.
"""

from diffusion_lit.diffusion.editing.common import device_of, need_pixels
from diffusion_lit.diffusion.editing.composites import Anagram, Hybrid, anagram, gaussian_blur, hybrid
from diffusion_lit.diffusion.editing.image_views import VIEWS, ImageView, make_view, permutation
from diffusion_lit.diffusion.editing.restoration import (
    Consistent,
    colorize,
    inpaint,
    keep_grey,
    keep_known,
    keep_small,
    restore,
    revising,
    super_resolve,
    to_grey,
)
from diffusion_lit.diffusion.editing.sweeps import NoiseBetween, guidance_sweep, interpolate, slerp
from diffusion_lit.diffusion.editing.tasks import (
    denoise,
    denoise_once,
    forward,
    img2img,
    invert,
    start_level,
    strided,
    visible,
)

__all__ = [
    "VIEWS",
    "Anagram",
    "Consistent",
    "Hybrid",
    "ImageView",
    "NoiseBetween",
    "anagram",
    "colorize",
    "denoise",
    "denoise_once",
    "device_of",
    "forward",
    "gaussian_blur",
    "guidance_sweep",
    "hybrid",
    "img2img",
    "inpaint",
    "interpolate",
    "invert",
    "keep_grey",
    "keep_known",
    "keep_small",
    "make_view",
    "need_pixels",
    "permutation",
    "restore",
    "revising",
    "slerp",
    "start_level",
    "strided",
    "super_resolve",
    "to_grey",
    "visible",
]
