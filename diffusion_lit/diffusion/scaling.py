"""The names that `preconditioning` had in version 0.1.0, for checkpoints and configs that give them."""

from diffusion_lit.diffusion.preconditioning import EDMPreconditioning as EDMScaling
from diffusion_lit.diffusion.preconditioning import EpsPreconditioning as EpsScaling
from diffusion_lit.diffusion.preconditioning import FlowPreconditioning as FlowScaling
from diffusion_lit.diffusion.preconditioning import Preconditioning as Scaling
from diffusion_lit.diffusion.preconditioning import VPreconditioning as VScaling
from diffusion_lit.diffusion.preconditioning import X0Preconditioning as X0Scaling

__all__ = ["EDMScaling", "EpsScaling", "FlowScaling", "Scaling", "VScaling", "X0Scaling"]
