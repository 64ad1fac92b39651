"""Magnitude-preserving layers: of inputs of unit variance each makes outputs of unit variance, in expectation.

No layer has a bias, and no map is normalised by its statistics; instead the weights are (Karras 2024, section 2):

    conv       w * x with w_i <- w_i / |w_i| for each output channel i, so that sum w_ij^2 = 1
    silu       silu(x) / 0.596, its root mean square under a standard normal x
    sum        ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)
    cat        a and b scaled so that each contributes as much, and the whole has unit variance
    fourier    sqrt(2) cos and sqrt(2) sin

Since a weight's length does not count, training would let it grow, and the learning rate would fade; so the stored
weights are brought back to the length sqrt(fan in) after each step (`force_norms`, which `fit` calls).

Source: Karras et al. 2024, arXiv 2312.02696, equations 47 to 110.
"""

import math
from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_lit.nets.layers import attention, no_autocast

SILU = 0.596  # root mean square of silu(x), x standard normal
TINY = 1e-4
BALANCE = 0.3  # share of a residual branch in the sum with its input


def unit(x: Tensor, dims: Iterable[int]) -> Tensor:
    """X over its root mean square along some dimensions, which is taken in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return x / (wide.square().mean(dim=tuple(dims), keepdim=True).sqrt() + TINY).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU that keeps the variance (eq. 81)."""
    return F.silu(x) / SILU


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(1 - t) a + t b at unit variance, for independent a and b (eq. 88)."""
    return torch.lerp(a, b, t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """The channels of a and b, weighted 1 - t and t, whatever their numbers (eq. 103)."""
    first, second = a.shape[1], b.shape[1]
    scale = math.sqrt((first + second) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale * (1 - t) / first**0.5), b * (scale * t / second**0.5)], dim=1)


class MPConv(nn.Module):
    """Convolution, or for kernel 0 a linear map, by weights of unit length, without a bias (eq. 47 and 66).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel: Side of the kernel, an odd number; 0 for a linear map.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *((kernel, kernel) if kernel else ())))
        self.force()

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """Return (B, out_channels, ...), times a gain."""
        dims = range(1, self.weight.ndim)
        weight = unit(self.weight, dims) * (gain / math.prod(self.weight.shape[1:]) ** 0.5)
        weight = weight.to(x.dtype)
        if self.weight.ndim == 2:
            return F.linear(x, weight)
        return F.conv2d(x, weight, padding=self.weight.shape[-1] // 2)

    @torch.no_grad()
    def force(self) -> None:
        """Bring the stored weights of each output channel to the length sqrt(fan in) (forced weight normalisation)."""
        self.weight.copy_(unit(self.weight, range(1, self.weight.ndim)))


def force_norms(net: nn.Module) -> None:
    """Bring the weights of every magnitude-preserving layer back to their length; to be called after each step."""
    for layer in net.modules():
        if isinstance(layer, MPConv):
            layer.force()


class MPAttention(nn.Module):
    """Self-attention over the positions of a feature map, by queries, keys and values of unit length (section 2.3).

    Args:
        channels: Channels of the feature map.
        head_channels: Most channels of a head; each has the largest divisor of `channels` within this.
    """

    def __init__(self, channels: int, head_channels: int = 64) -> None:
        super().__init__()
        self.heads = next(n for n in range(1, channels + 1) if channels % n == 0 and channels // n <= head_channels)
        self.qkv = MPConv(channels, 3 * channels, 1)
        self.proj = MPConv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the feature map (B, C, H, W) with what each position gathered."""
        height = x.shape[2]
        parts = rearrange(self.qkv(x), "b (t n d) h w -> t b n (h w) d", t=3, n=self.heads)
        q, k, v = unit(parts, (-1,)).unbind(0)
        y = rearrange(attention(q, k, v), "b n (h w) d -> b (n d) h w", h=height)
        return mp_sum(x, self.proj(y), BALANCE)


class MPConditioning(nn.Module):
    """Embeds c_noise, the class and the augmentation as one vector per image, at unit variance (eq. 74 to 80).

    Frequencies are 2 pi times the quantiles of |N(0, 1)|, as in `Conditioning`, where the paper draws them.

    Args:
        features: Number of noise features, an even number.
        channels: Length of the vector.
        num_classes: Number of classes, 0 for none; class `num_classes` is the null class.
        augment_dim: Length of the augmentation labels, 0 for none.
    """

    frequency: Tensor

    def __init__(self, features: int, channels: int, num_classes: int, augment_dim: int) -> None:
        super().__init__()
        half = features // 2
        quantiles = torch.erfinv((torch.arange(half) + 0.5) / half) * (2 * math.pi * math.sqrt(2))
        self.register_buffer("frequency", quantiles, persistent=False)
        self.num_classes = num_classes
        self.noise = MPConv(features, channels)
        self.label = MPConv(num_classes + 1, channels) if num_classes else None
        self.augment = MPConv(augment_dim, channels) if augment_dim else None

    def forward(self, noise: Tensor, label: Tensor | None, augment: Tensor | None) -> Tensor:
        """Embed noise (B,), label (B,) int64 or None, and augment (B, augment_dim) or None, as (B, channels).

        Raises:
            ValueError: A label or an augmentation label is given to a network that was built without.
        """
        if label is not None and self.label is None:
            raise ValueError("A label was given to a network without classes; build it with num_classes or drop it.")
        if augment is not None and self.augment is None:
            raise ValueError("Augmentation labels were given to a network with augment_dim=0; set augment_dim.")
        with no_autocast(noise.device):
            angle = noise.to(self.noise.weight.dtype)[:, None] * self.frequency
            emb: Tensor = self.noise(torch.cat([angle.cos(), angle.sin()], dim=1) * math.sqrt(2))
            if self.label is not None:
                null = torch.full((len(noise),), self.num_classes, device=noise.device)
                chosen = F.one_hot(null if label is None else label, self.num_classes + 1).to(emb)
                emb = mp_sum(emb, self.label(chosen * (self.num_classes + 1) ** 0.5), 0.5)
            if self.augment is not None and augment is not None:
                emb = emb + self.augment(augment.to(emb))
            return mp_silu(emb)
