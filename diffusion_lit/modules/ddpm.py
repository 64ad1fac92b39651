"""DDPM: a denoiser on the discrete noise levels of a variance-preserving schedule (Ho 2020, arXiv 2006.11239)."""

from typing import Any

from torch import nn

from diffusion_lit.diffusion import (
    Denoiser,
    DenoisingLoss,
    DiscreteUniform,
    EpsPreconditioning,
    HybridLoss,
    LearnedVarianceDenoiser,
    LinearSchedule,
    NoiseLevels,
    Sampling,
    Schedule,
    VPreconditioning,
    X0Preconditioning,
)
from diffusion_lit.modules.base import DiffusionModule

PREDICTIONS = {"eps": EpsPreconditioning, "x0": X0Preconditioning, "v": VPreconditioning}


class DDPM(DiffusionModule):
    """Denoising diffusion on T discrete steps.

    Args:
        net: The network, called with t in [0, T-1] as its noise input.
        schedule: The T noise levels; 1,000 linear betas by default.
        prediction: What the network predicts: `eps`, `x0` or `v` (Salimans & Ho 2022).
        noise_levels: Distribution that training draws sigma from; by default uniform over the schedule's steps.
        loss: Denoising loss with its weight; by default the paper's simple loss (Ho 2020, equation 14). A `HybridLoss`
            trains the variance of the steps as well (Nichol & Dhariwal 2021): give the network an `out_channels` of
            twice the images' channels, and sample with `sampler_options: {variance: learned}`.
        sampling: How images are drawn; by default ancestral sampling over all T steps, predicted images clipped.
        options: Further arguments of `DiffusionModule`.

    Raises:
        ValueError: If `prediction` is none of the three.
    """

    def __init__(
        self,
        net: nn.Module,
        schedule: Schedule | None = None,
        prediction: str = "eps",
        noise_levels: NoiseLevels | None = None,
        loss: DenoisingLoss | None = None,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> None:
        if prediction not in PREDICTIONS:
            raise ValueError(f"There is no prediction {prediction!r} here; choose one of {', '.join(PREDICTIONS)}.")
        schedule = schedule or LinearSchedule()
        denoiser = LearnedVarianceDenoiser if isinstance(loss, HybridLoss) else Denoiser
        super().__init__(
            denoiser(net, PREDICTIONS[prediction](schedule)),
            noise_levels or DiscreteUniform(schedule),
            loss or DenoisingLoss(),
            sampling or Sampling(sampler="ddpm", num_steps=schedule.num_steps, grid="trailing", clip_x0="static"),
            **options,
        )
