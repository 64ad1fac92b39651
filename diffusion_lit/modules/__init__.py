"""LightningModules: thin wrappers that train what `diffusion_lit.diffusion` and `diffusion_lit.nets` define."""

from diffusion_lit.modules.base import DiffusionModule
from diffusion_lit.modules.classifier import Classifier
from diffusion_lit.modules.ddpm import DDPM
from diffusion_lit.modules.edm import EDM
from diffusion_lit.modules.optim import Trapezoid

__all__ = ["DDPM", "EDM", "Classifier", "DiffusionModule", "Trapezoid"]
