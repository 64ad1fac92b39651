"""EDM: a preconditioned denoiser on log-normal noise levels (Karras 2022, arXiv 2206.00364)."""

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from diffusion_lit.diffusion import (
    Denoiser,
    DenoisingLoss,
    EDMPreconditioning,
    ImageCondition,
    LogNormal,
    NoiseLevels,
    Preconditioning,
    Sampling,
)
from diffusion_lit.modules.base import DiffusionModule
from diffusion_lit.nets.augment import Augment


class EDM(DiffusionModule):
    """Preconditioned denoising on continuous noise levels.

    Args:
        net: The network, called with ln(sigma)/4 as its noise input.
        scaling: Prediction type; by default EDM's preconditioning with sigma_data 0.5.
        noise_levels: Distribution that training draws sigma from; by default log-normal with P_mean -1.2, P_std 1.2.
        loss: Denoising loss with its weight; by default 1/c_out^2, which is EDM's own.
        sampling: How images are drawn; by default 18 steps of Heun's method on the Karras grid.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning-rate schedule from the optimizer, stepped each training step.
        label_dropout: Probability in [0, 1] of training a sample without its label.
        augment: Non-leaky augmentation of training images (appendix F.2); the network needs `augment_dim: 9`.
        condition: The image that the network is given, such as a degraded one; it needs its `condition_channels`.
    """

    def __init__(
        self,
        net: nn.Module,
        scaling: Preconditioning | None = None,
        noise_levels: NoiseLevels | None = None,
        loss: DenoisingLoss | None = None,
        sampling: Sampling | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        label_dropout: float = 0.1,
        augment: Augment | None = None,
        condition: ImageCondition | None = None,
    ) -> None:
        super().__init__(
            Denoiser(net, scaling or EDMPreconditioning()),
            noise_levels or LogNormal(),
            loss or DenoisingLoss(),
            sampling or Sampling(),
            optimizer,
            lr_scheduler,
            label_dropout,
            augment,
            condition,
        )
