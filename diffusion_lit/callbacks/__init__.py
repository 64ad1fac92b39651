"""Callbacks: the average of the weights, images and measurements while training."""

from diffusion_lit.callbacks.checkpoint import LastCheckpoint
from diffusion_lit.callbacks.cost import Cost
from diffusion_lit.callbacks.ema import EMA
from diffusion_lit.callbacks.fid import FID
from diffusion_lit.callbacks.guard import NonFiniteGuard
from diffusion_lit.callbacks.noise_levels import LossByNoiseLevel
from diffusion_lit.callbacks.predictions import KeepPredictions
from diffusion_lit.callbacks.progress import LayerTable, ProgressBar, RunSummary, Throughput
from diffusion_lit.callbacks.psnr import ImagePSNR, PicturePSNR
from diffusion_lit.callbacks.reconstructions import Interpolations, ReconstructionFID, Reconstructions
from diffusion_lit.callbacks.samples import SampleGrid, Trajectory
from diffusion_lit.callbacks.tf32 import TF32
from diffusion_lit.callbacks.watchdog import Watchdog

__all__ = [
    "EMA",
    "FID",
    "TF32",
    "Cost",
    "ImagePSNR",
    "Interpolations",
    "KeepPredictions",
    "LastCheckpoint",
    "LayerTable",
    "LossByNoiseLevel",
    "NonFiniteGuard",
    "PicturePSNR",
    "ProgressBar",
    "ReconstructionFID",
    "Reconstructions",
    "RunSummary",
    "SampleGrid",
    "Throughput",
    "Trajectory",
    "Watchdog",
]
