"""EDM: a preconditioned denoiser on log-normal noise levels (Karras 2022, arXiv 2206.00364)."""

from typing import Any

from torch import nn

from diffusion_lit.diffusion import (
    Denoiser,
    DenoisingLoss,
    EDMPreconditioning,
    LogNormal,
    NoiseLevels,
    Preconditioning,
    Sampling,
)
from diffusion_lit.modules.base import DiffusionModule


class EDM(DiffusionModule):
    """Preconditioned denoising on continuous noise levels.

    Args:
        net: The network, called with ln(sigma)/4 as its noise input.
        scaling: Prediction type; by default EDM's preconditioning with sigma_data 0.5.
        noise_levels: Distribution that training draws sigma from; by default log-normal with P_mean -1.2, P_std 1.2.
        loss: Denoising loss with its weight; by default 1/c_out^2, which is EDM's own.
        sampling: How images are drawn; by default 18 steps of Heun's method on the Karras grid.
        options: Further arguments of `DiffusionModule`.
    """

    def __init__(
        self,
        net: nn.Module,
        scaling: Preconditioning | None = None,
        noise_levels: NoiseLevels | None = None,
        loss: DenoisingLoss | None = None,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            Denoiser(net, scaling or EDMPreconditioning()),
            noise_levels or LogNormal(),
            loss or DenoisingLoss(),
            sampling or Sampling(),
            **options,
        )
