"""MeanFlow: a denoiser that learns to take noise to images in one step, from data alone (Geng 2025, arXiv 2505.13447).

The network is given the end of a step. Without it, it is a flow-matching model, which every other sampler works with.
"""

from typing import Any

from torch import nn

from diffusion_lit.diffusion import Denoiser, FlowPreconditioning, LevelPairs, MeanFlowLoss, Preconditioning, Sampling
from diffusion_lit.modules.base import DiffusionModule


class MeanFlow(DiffusionModule):
    """Trains the average velocity between two noise levels on a straight path.

    Guidance is learned with the map (`TrainingGuidance` in the loss). `cfg_scale` above 1 at sampling mixes the maps of
    label and null class, which is guidance in the limit of many steps only, and doubles the calls of the network.

    Args:
        net: The network, built with `takes_until: true`; its noise input is the flow time in [0, 1].
        scaling: Prediction type; by default the velocity n - x0.
        noise_levels: Distribution that training draws pairs of noise levels from.
        loss: The MeanFlow loss, with its weight and guidance.
        sampling: How images are drawn; by default in one step.
        options: Further arguments of `DiffusionModule`.

    Raises:
        ValueError: If the network takes no second noise level.
    """

    def __init__(
        self,
        net: nn.Module,
        scaling: Preconditioning | None = None,
        noise_levels: LevelPairs | None = None,
        loss: MeanFlowLoss | None = None,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> None:
        denoiser = Denoiser(net, scaling or FlowPreconditioning())
        if not denoiser.takes_until:
            raise ValueError(
                f"MeanFlow tells its network where a step ends, and {type(net).__name__} was built without; set "
                "takes_until: true in the network's init_args (UNet and DiT have it)."
            )
        super().__init__(
            denoiser,
            noise_levels or LevelPairs(),
            loss or MeanFlowLoss(),
            sampling or Sampling(sampler="meanflow", num_steps=1, grid="trailing"),
            condition=None,
            **options,
        )
