"""This project and its peers at the same work, for `throughput` and `time_to_quality`.

A contender is a library's own U-Net under the library's own training step and sampler:

| name                        | network     | training step                          | sampler                  |
| --------------------------- | ----------- | -------------------------------------- | ------------------------ |
| diffusion-lit               | UNet        | `diffusion-lit fit` with all its callbacks | Euler                    |
| diffusers                   | UNet2DModel | train_unconditional.py's loop          | DDIMScheduler            |
| denoising-diffusion-pytorch | Unet        | Trainer.train's loop with its average  | GaussianDiffusion's DDIM |
| smalldiffusion              | Unet        | training_loop                          | samples                  |

The peers are handed their batches ready made, which is in their favour: `diffusion-lit fit` cuts, normalises and draws
its own. A library that is not installed takes no part.
"""

import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_lit.callbacks.cost import network_cost

OURS = "diffusion-lit"
MODULES = {
    OURS: "diffusion_lit",
    "diffusers": "diffusers",
    "denoising-diffusion-pytorch": "denoising_diffusion_pytorch",
    "smalldiffusion": "smalldiffusion",
}
MULTIPLES = {OURS: 4, "diffusers": 32, "denoising-diffusion-pytorch": 8, "smalldiffusion": 32}


def installed() -> list[str]:
    """The contenders that can take part here, this project first."""
    return [name for name, module in MODULES.items() if find_spec(module) is not None]


def build(name: str, width: int, channels: int, size: int) -> nn.Module:
    """A library's U-Net: three levels of `width` times (1, 2, 2), two blocks each, attention on the smallest maps.

    denoising-diffusion-pytorch has its own four levels and its own places for attention.
    """
    if name == OURS:
        from diffusion_lit.nets import UNet

        return UNet(channels, size, **our_net(width, size))
    if name == "diffusers":
        from diffusers import UNet2DModel

        made: nn.Module = UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=2,
            block_out_channels=(width, 2 * width, 2 * width),
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        )
        return made
    if name == "smalldiffusion":
        import smalldiffusion

        return smalldiffusion.Scaled(smalldiffusion.Unet)(
            size, channels, channels, ch=width, ch_mult=(1, 2, 2), attn_resolutions=(size // 4,)
        )
    from denoising_diffusion_pytorch import Unet

    net: nn.Module = Unet(dim=width, channels=channels)
    return net


def our_net(width: int, size: int) -> dict[str, Any]:
    """The options of this project's U-Net in the comparison."""
    return {
        "model_channels": width,
        "channel_mult": (1, 2, 2),
        "num_blocks": 2,
        "attention_resolutions": (size // 4,),
        "noise_embedding": "fourier",
    }


class Called(nn.Module):
    """A contender's network, called on noisy images (B, C, H, W) and t (B,) in (0, 1].

    Args:
        name: The contender.
        net: Its network.
    """

    def __init__(self, name: str, net: nn.Module) -> None:
        super().__init__()
        self.name, self.net = name, net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Calls the network as its library does."""
        if self.name == OURS:
            made: Tensor = self.net(x, t)
        elif self.name == "smalldiffusion":
            made = self.net(x, t[:, None, None, None])
        elif self.name == "diffusers":
            made = self.net(x, (999 * t).long()).sample
        else:
            made = self.net(x, (999 * t).long())
        return made


@dataclass
class Cost:
    """What a network costs: its width, parameters, and floating-point operations per image."""

    width: int
    parameters: int
    forward: int
    training: int


def cost(name: str, width: int, channels: int, size: int) -> Cost:
    """Counts a contender's parameters, and the operations of a forward and of a step."""
    with torch.device("meta"):  # the counts depend on shapes only
        found = network_cost(Called(name, build(name, width, channels, size)), (channels, size, size))
    return Cost(width, found.parameters, found.forward, found.training)


def nearest(name: str, gflops: float, channels: int, size: int) -> Cost:
    """The width whose training step is closest to a number of operations.

    Args:
        name: The contender.
        gflops: Wanted, in 10^9 per image, forward and backward.
        channels: Channels of an image.
        size: Its side.
    """
    step = MULTIPLES[name]
    first = cost(name, max(step, 32), channels, size)
    guess = first.width * math.sqrt(gflops * 1e9 / first.training)
    widths = {max(step, step * (round(guess / step) + shift)) for shift in (-1, 0, 1)}
    costs = [cost(name, width, channels, size) for width in sorted(widths)]
    return min(costs, key=lambda found: abs(math.log(found.training / (gflops * 1e9))))


@dataclass
class BenchmarkJob:
    """The work of a contender's process.

    Args:
        name: The contender.
        precision: `32-true` or `bf16-mixed`.
        width: Channels of the first level.
        channels: Channels of an image.
        size: Its side.
        batch_size: Images per step.
        nfe: Steps of the sampler.
        device: `cpu` or `cuda`.
        threads: Threads of torch on a CPU.
        documented: Whether a peer trains with the settings of its own examples and not with its code's defaults.
    """

    name: str
    precision: str
    width: int
    channels: int
    size: int
    batch_size: int
    nfe: int
    device: str
    threads: int
    documented: bool = False

    @property
    def title(self) -> str:
        """Name and precision."""
        return title_of(self.name, self.precision)


def title_of(name: str, precision: str) -> str:
    """A contender's name and precision."""
    return f"{name}, {'bf16' if precision == 'bf16-mixed' else 'float32'}"
