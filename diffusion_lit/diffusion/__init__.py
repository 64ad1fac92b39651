"""The mathematics of diffusion, in the coordinates x = x0 + sigma * n; torch only."""

from diffusion_lit.diffusion.denoiser import Denoiser, LearnedVarianceDenoiser
from diffusion_lit.diffusion.generate import Sampling
from diffusion_lit.diffusion.grids import GRIDS
from diffusion_lit.diffusion.guidance import Autoguidance, ClassifierFreeGuidance, ClassifierGuidance
from diffusion_lit.diffusion.loss import (
    DenoisingLoss,
    HybridLoss,
    LearnedUncertainty,
    LossWeight,
    MinSNR,
    PaperWeight,
    UnitWeight,
)
from diffusion_lit.diffusion.noise import (
    Constant,
    ContinuousVP,
    CosineSchedule,
    DiscreteUniform,
    LinearSchedule,
    LogitNormal,
    LogNormal,
    NoiseLevels,
    ScaledLinearSchedule,
    Schedule,
    SigmoidSchedule,
    UniformT,
)
from diffusion_lit.diffusion.rng import SeededNoise, keyed_generator, keyed_seed
from diffusion_lit.diffusion.samplers import SAMPLERS
from diffusion_lit.diffusion.scaling import EDMScaling, EpsScaling, FlowScaling, Scaling, VScaling, X0Scaling
from diffusion_lit.diffusion.views import as_eps, as_score, as_v, as_velocity, as_x0
from diffusion_lit.diffusion.wrappers import ClipX0, Conditioned, DenoiserWrapper

__all__ = [
    "GRIDS",
    "SAMPLERS",
    "Autoguidance",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "ClipX0",
    "Conditioned",
    "Constant",
    "ContinuousVP",
    "CosineSchedule",
    "Denoiser",
    "DenoiserWrapper",
    "DenoisingLoss",
    "DiscreteUniform",
    "EDMScaling",
    "EpsScaling",
    "FlowScaling",
    "HybridLoss",
    "LearnedUncertainty",
    "LearnedVarianceDenoiser",
    "LinearSchedule",
    "LogNormal",
    "LogitNormal",
    "LossWeight",
    "MinSNR",
    "NoiseLevels",
    "PaperWeight",
    "Sampling",
    "ScaledLinearSchedule",
    "Scaling",
    "Schedule",
    "SeededNoise",
    "SigmoidSchedule",
    "UniformT",
    "UnitWeight",
    "VScaling",
    "X0Scaling",
    "as_eps",
    "as_score",
    "as_v",
    "as_velocity",
    "as_x0",
    "keyed_generator",
    "keyed_seed",
]
