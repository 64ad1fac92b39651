"""DDPM: a denoiser on the discrete noise levels of a variance-preserving schedule (Ho 2020, arXiv 2006.11239)."""

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from diffusion_lit.diffusion import (
    Denoiser,
    DenoisingLoss,
    DiscreteUniform,
    EpsPreconditioning,
    HybridLoss,
    ImageCondition,
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
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning-rate schedule from the optimizer, stepped each training step.
        label_dropout: Probability in [0, 1] of training a sample without its label.
        condition: The image that the network is given, such as a degraded one; it needs its `condition_channels`.

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
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        label_dropout: float = 0.1,
        condition: ImageCondition | None = None,
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
            optimizer,
            lr_scheduler,
            label_dropout,
            condition=condition,
        )
