"""Editing: what a trained denoiser can do beyond sampling, a short function per task, for every model and sampler.

Each function takes a model (a `PixelModel` or `LatentModel`, such as any `DiffusionModule`) and images in [-1, 1],
takes labels, seeds and a `Sampling` by keyword, and returns images.
"""

from diffusion_lit.diffusion.editing.common import device_of, need_pixels
from diffusion_lit.diffusion.editing.composites import Anagram, Hybrid, anagram, gaussian_blur, hybrid
from diffusion_lit.diffusion.editing.image_views import VIEWS, ImageView, make_view, permutation
from diffusion_lit.diffusion.editing.measurements import (
    Measurement,
    blurred,
    grey_of,
    keep_grey,
    keep_known,
    keep_small,
    known_pixels,
    small_of,
)
from diffusion_lit.diffusion.editing.restoration import (
    Consistent,
    Posterior,
    colorize,
    deblur,
    from_measurement,
    inpaint,
    restore,
    revising,
    super_resolve,
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
from diffusion_lit.diffusion.images import to_grey

__all__ = [
    "VIEWS",
    "Anagram",
    "Consistent",
    "Hybrid",
    "ImageView",
    "Measurement",
    "NoiseBetween",
    "Posterior",
    "anagram",
    "blurred",
    "colorize",
    "deblur",
    "denoise",
    "denoise_once",
    "device_of",
    "forward",
    "from_measurement",
    "gaussian_blur",
    "grey_of",
    "guidance_sweep",
    "hybrid",
    "img2img",
    "inpaint",
    "interpolate",
    "invert",
    "keep_grey",
    "keep_known",
    "keep_small",
    "known_pixels",
    "make_view",
    "need_pixels",
    "permutation",
    "restore",
    "revising",
    "slerp",
    "small_of",
    "start_level",
    "strided",
    "super_resolve",
    "to_grey",
    "visible",
]
