"""LightningModules: thin wrappers that train what `diffusion_lit.diffusion` and `diffusion_lit.nets` define."""

from diffusion_lit.modules.adversary import Adversary
from diffusion_lit.modules.base import DiffusionModule
from diffusion_lit.modules.classifier import Classifier
from diffusion_lit.modules.cold import ColdDiffusion
from diffusion_lit.modules.consistency import Consistency, LatentConsistency
from diffusion_lit.modules.ddpm import DDPM
from diffusion_lit.modules.edm import EDM
from diffusion_lit.modules.latent import LatentDiffusion
from diffusion_lit.modules.meanflow import MeanFlow
from diffusion_lit.modules.muon import MuonAdamW
from diffusion_lit.modules.optim import Trapezoid, WarmupStableDecay
from diffusion_lit.modules.perceptual import LPIPS, ClassifierPerceptual, EfficientNetPerceptual
from diffusion_lit.modules.reconstruction import L1, L2, DiscretisedGaussian, DiscretisedLogistic
from diffusion_lit.modules.teacher import Teacher
from diffusion_lit.modules.vae import VAE

__all__ = [
    "DDPM",
    "EDM",
    "L1",
    "L2",
    "LPIPS",
    "VAE",
    "Adversary",
    "Classifier",
    "ClassifierPerceptual",
    "ColdDiffusion",
    "Consistency",
    "DiffusionModule",
    "DiscretisedGaussian",
    "DiscretisedLogistic",
    "EfficientNetPerceptual",
    "LatentConsistency",
    "LatentDiffusion",
    "MeanFlow",
    "MuonAdamW",
    "Teacher",
    "Trapezoid",
    "WarmupStableDecay",
]
