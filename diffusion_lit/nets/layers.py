"""Layers of the networks: normalisation, attention, resampling and the embedding of the conditions.

Everything acts on feature maps of shape (B, C, H, W). Two numerical rules let a network train in float32 and under bf16
autocast:

- statistics (the mean and variance of a group norm, the softmax of an attention) are accumulated in at least float32;
- the embedding of the noise level, the class and the augmentation is computed in at least float32, outside autocast:
  bfloat16 holds integers exactly only up to 256, so the steps 900 and 901 would be one step.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeVar, get_args

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diffusion_lit.checks import check_numbers
from diffusion_lit.nets.checks import require_one_of

NoiseEmbeddingName = Literal["positional", "fourier", "none"]
Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)
ResampleName = Literal["conv", "pool", "unshuffle", "block"]


class GroupNorm(nn.GroupNorm):
    """Group normalisation with at most 32 groups of at least 4 channels, safe in half precision.

    At least 4 channels share a group: a group of one channel would remove the channel's mean, and with it every bias
    and embedding. The number of groups is the largest within these bounds that divides the channels.

    Args:
        channels: Channels of the feature map.

    Source: Wu & He 2018, arXiv 1803.08494.
    """

    def __init__(self, channels: int) -> None:
        most = max(1, min(32, channels // 4))
        super().__init__(next(g for g in range(most, 0, -1) if channels % g == 0), channels)

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """Normalise x (B, C, H, W), and modulate it to norm(x) * (1 + scale) + shift where these (B, C) are given.

        The statistics are in float32 or wider, the result has x's dtype.
        """
        if scale is None or shift is None:
            return self.normalise(x)
        gain, shift = scale.to(self.weight.dtype) + 1, shift.to(self.weight.dtype)
        if x.device.type == "cpu" and x.is_contiguous() and not torch.compiler.is_compiling():
            # As one image of B C channels, each with a gain and an offset of its own, which the kernel applies in its
            # one pass over memory. A pass for the modulation alone took 3 times as long as that (bf16, Xeon with AMX).
            batch, channels = x.shape[:2]
            joined = x.reshape(1, batch * channels, *x.shape[2:])
            weight, bias = (self.weight * gain).flatten(), torch.addcmul(shift, self.bias, gain).flatten()
            return F.group_norm(joined, batch * self.num_groups, weight, bias, self.eps).view_as(x)
        shift, gain = (v.to(x.dtype)[:, :, None, None] for v in (shift, gain))
        return torch.addcmul(shift, self.normalise(x), gain)

    def normalise(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, H, W)."""
        if not x.is_contiguous() and not torch.compiler.is_compiling() and is_dual(x):
            x = x.contiguous()  # torch 2.11 takes it for that where it derives
        if x.dtype in (torch.bfloat16, torch.float16) and x.device.type != "cpu":
            # CUDA keeps the statistics of a bfloat16 input in bfloat16; the CPU kernel keeps them in float32.
            return super().forward(x.float()).to(x.dtype)
        return super().forward(x)


class Attention(nn.Module):
    """Residual multi-head self-attention over the positions of a feature map: x + proj(softmax(q k^T / sqrt(d)) v).

    Args:
        channels: Channels of the feature map.
        head_channels: Most channels that a head may have; each has the largest divisor of `channels` within this.
        skip_scale: Factor on the sum of the input and the attention's result (DDPM++: sqrt(1/2)).

    Source: Vaswani 2017, arXiv 1706.03762, eq. 1; in a U-Net Ho 2020, arXiv 2006.11239, appendix B.
    """

    def __init__(self, channels: int, head_channels: int = 64, skip_scale: float = 1.0) -> None:
        super().__init__()
        self.heads = next(n for n in range(1, channels + 1) if channels % n == 0 and channels // n <= head_channels)
        self.skip_scale = skip_scale
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = zero_init(nn.Conv2d(channels, channels, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix the values: q, k, v of shape (B, heads, positions, d) to the same shape."""
        return attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        """Return the feature map (B, C, H, W) with what each position gathered from all others added."""
        height = x.shape[2]
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (t n d) h w -> t b n (h w) d", t=3, n=self.heads).unbind(0)
        y = rearrange(self.attend(q, k, v), "b n (h w) d -> b (n d) h w", h=height)
        return scaled_sum(x, self.proj(y), self.skip_scale)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v for q, k, v of shape (B, heads, positions, d), through a fused kernel.

    The fused kernels need the d values of a position to be contiguous; otherwise torch falls back to products that keep
    the whole matrix of positions by positions. The CPU's bfloat16 kernel repacks its input, which at the 64 positions
    of a small map took 3 times as long as float32 (22 ms against 7, both passes, one core of a Xeon with AMX), so on a
    CPU attention is in float32.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        with no_autocast(q.device):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v)


class LinearAttention(Attention):
    """Self-attention whose cost grows linearly with the number of positions: softmax_d(q) (softmax_N(k)^T v).

    The queries are normalised over the channels of a head and the keys over the positions, so that the d x d context
    softmax_N(k)^T v is computed once for all queries. Suits the high resolutions where full attention, quadratic in
    the positions, costs too much.

    Source: Shen 2018, arXiv 1812.01243, eq. 4 with softmax normalisation.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix the values: q, k, v of shape (B, heads, positions, d) to the same shape."""
        wide = torch.promote_types(q.dtype, torch.float32)
        context = k.softmax(dim=-2, dtype=wide).to(v.dtype).mT @ v
        return q.softmax(dim=-1, dtype=wide).to(v.dtype) @ context


class Conditioning(nn.Module):
    """Embeds the conditions (noise level, class, augmentation) as one vector per image.

    silu(W2 silu(W1 (noise features + labels))) with labels_join "before" (EDM), and
    silu(W2 silu(W1 noise features) + labels) with "after" (ADM, DiT), where labels is the class's row of a table plus a
    linear map of the augmentation labels. The noise features of c_noise are cosines and sines:

    - "positional": of c_noise / 10000^(i / (n - 1)), i = 0 .. n - 1, for steps t in [0, 1000) (Ho 2020);
    - "fourier": of 2 pi f_i c_noise, with f_i the quantiles of |N(0, 1)|, for c_noise of the order of one, such as
      ln(sigma) / 4 or a flow time in [0, 1] (Karras 2024, arXiv 2312.02696, appendix B, where the f_i are random);
    - "none": there is no noise embedding, and c_noise is ignored.

    Args:
        features: Number of noise features, an even number.
        channels: Length of the resulting vector.
        noise_embedding: "positional", "fourier" or "none".
        num_classes: Number of classes, 0 for none. Row `num_classes` of the table is the null class.
        augment_dim: Length of the augmentation labels, 0 for none.
        labels_join: Whether class and augmentation join "before" or "after" the two linear layers.
        takes_until: Whether there is a second noise level. A linear map of the features of c_noise - until joins
            before the two layers; it starts at zero, so that a network trained without starts as it was.
    """

    def __init__(
        self,
        features: int,
        channels: int,
        noise_embedding: NoiseEmbeddingName,
        num_classes: int,
        augment_dim: int,
        labels_join: Literal["before", "after"] = "before",
        takes_until: bool = False,
    ) -> None:
        super().__init__()
        require_one_of("noise_embedding", noise_embedding, get_args(NoiseEmbeddingName))
        if takes_until and noise_embedding == "none":
            raise ValueError("takes_until needs a noise embedding, and noise_embedding is 'none'; use 'fourier'.")
        if features < 4 or features % 2:
            raise ValueError(f"The noise embedding has {features} features; choose an even number of at least 4.")
        self.features = features
        self.noise_embedding = noise_embedding
        self.num_classes = num_classes
        self.augment_dim = augment_dim
        self.labels_join = labels_join
        width = features if labels_join == "before" else channels
        self.label = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.augment = nn.Linear(augment_dim, width, bias=False) if augment_dim else None
        self.until = zero_init(nn.Linear(features, features, bias=False)) if takes_until else None
        self.hidden = nn.Linear(features, channels)
        self.out = nn.Linear(channels, channels)

    def noise_features(self, noise: Tensor) -> Tensor:
        """Cosines and sines of c_noise (B,), as (B, features) in float32 or wider."""
        half = self.features // 2
        dtype = torch.promote_types(noise.dtype, torch.float32)
        steps = torch.arange(half, dtype=dtype, device=noise.device)
        if self.noise_embedding == "positional":
            frequency = torch.exp(steps * (-math.log(10000) / (half - 1)))
        else:
            frequency = torch.erfinv((steps + 0.5) / half) * (2 * math.pi * math.sqrt(2))
        angle = noise.to(dtype)[:, None] * frequency
        return torch.cat([angle.cos(), angle.sin()], dim=1)

    def forward(
        self, noise: Tensor, label: Tensor | None, augment: Tensor | None, until: Tensor | None = None
    ) -> Tensor:
        """Embed the conditions as (B, channels).

        Args:
            noise: c_noise, shape (B,).
            label: Class indices int64, shape (B,), or None.
            augment: Augmentation labels, shape (B, augment_dim), or None.
            until: c_noise of the second noise level, shape (B,); None for the first one.

        Raises:
            ValueError: A condition is given to a network that was built without.
        """
        if label is not None and self.label is None:
            raise ValueError("A label was given to a network without classes; build it with num_classes or drop it.")
        if augment is not None and self.augment is None:
            raise ValueError("Augmentation labels were given to a network with augment_dim=0; set augment_dim.")
        if until is not None and self.until is None:
            raise ValueError("A second noise level was given to a network without; build it with takes_until.")
        dtype = self.hidden.weight.dtype
        with no_autocast(noise.device):
            if self.noise_embedding == "none":
                x = noise.new_zeros((noise.shape[0], self.features), dtype=dtype)
            else:
                x = self.noise_features(noise).to(dtype)
            if self.until is not None:
                x = x + self.until(self.noise_features(noise - (noise if until is None else until)).to(dtype))
            if self.labels_join == "before":
                return F.silu(self.out(F.silu(self.hidden(self.add_labels(x, label, augment)))))
            return F.silu(self.add_labels(self.out(F.silu(self.hidden(x))), label, augment))

    def add_labels(self, x: Tensor, label: Tensor | None, augment: Tensor | None) -> Tensor:
        """Add the class's row and the augmentation's features to x (B, D)."""
        if self.label is not None:
            null = torch.full((x.shape[0],), self.num_classes, device=x.device)
            x = x + self.label(null if label is None else label)
        if self.augment is not None and augment is not None:
            x = x + self.augment(augment.to(x.dtype))
        return x


class Resample(nn.Module):
    """Halve or double a feature map with a separable filter and no weights.

    Down: convolve each channel with the normalised filter and keep every second position. Up: the transpose of it,
    times 4, so that a constant map stays itself away from the border. The filter (1, 1) is 2x2 average pooling
    downwards and nearest-neighbour upwards; (1, 3, 3, 1) is smoother.

    Args:
        direction: "down" or "up".
        taps: The filter; an even number of positive values.

    Raises:
        ValueError: The number of taps is odd, or their sum is not positive.

    Source: Zhang 2019, arXiv 1904.11486; in DDPM++ Song 2021, arXiv 2011.13456, appendix H.
    """

    taps: Tensor

    def __init__(self, direction: Literal["down", "up"], taps: tuple[float, ...] = (1, 1)) -> None:
        super().__init__()
        check_numbers("resample_filter", taps)
        if len(taps) < 2 or len(taps) % 2 or sum(taps) <= 0:
            raise ValueError(f"resample_filter={tuple(taps)} needs an even number of taps with a positive sum: (1, 1).")
        self.direction = direction
        self.is_box = tuple(taps) == (1, 1)
        row = torch.tensor(taps, dtype=torch.float32) / sum(taps)
        self.register_buffer("taps", torch.outer(row, row), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H / 2, W / 2) or (B, C, 2 H, 2 W) from (B, C, H, W)."""
        if self.is_box:
            return F.avg_pool2d(x, 2) if self.direction == "down" else F.interpolate(x, scale_factor=2.0)
        channels = x.shape[1]
        pad = len(self.taps) // 2 - 1
        kernel = self.taps.to(x.dtype).expand(channels, 1, -1, -1)
        if self.direction == "down":
            return F.conv2d(x, kernel, stride=2, padding=pad, groups=channels)
        return F.conv_transpose2d(x, kernel * 4, stride=2, padding=pad, groups=channels)


def downsample(channels: int, kind: ResampleName, taps: tuple[float, ...] = (1, 1)) -> nn.Module:
    """Return a layer (B, C, H, W) -> (B, C, H / 2, W / 2).

    Args:
        channels: Channels C.
        kind: "conv" (3x3 convolution of stride 2), "pool" (the filter, no weights) or "unshuffle" (each 2x2 square of
            positions becomes channels, then a 1x1 convolution; no position is lost).
        taps: The filter of "pool".
    """
    if kind == "conv":
        return nn.Conv2d(channels, channels, 3, stride=2, padding=1)
    if kind == "unshuffle":
        return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * channels, channels, 1))
    return Resample("down", taps)


def upsample(channels: int, kind: ResampleName, taps: tuple[float, ...] = (1, 1)) -> nn.Module:
    """Return the counterpart of `downsample`, a layer (B, C, H, W) -> (B, C, 2 H, 2 W).

    "conv" is nearest-neighbour and a 3x3 convolution, "unshuffle" a 1x1 convolution and a pixel shuffle.
    """
    if kind == "conv":
        return nn.Sequential(Resample("up", taps), nn.Conv2d(channels, channels, 3, padding=1))
    if kind == "unshuffle":
        return nn.Sequential(nn.Conv2d(channels, 4 * channels, 1), nn.PixelShuffle(2))
    return Resample("up", taps)


def is_dual(x: Tensor) -> bool:
    """Return whether x carries a derivative in forward mode."""
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context without autocast; the device meta has none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def recomputed(function: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
    """Return function(*args), recomputed in the backward pass from its arguments (activation checkpointing).

    Source: Chen 2016, arXiv 1604.06174.
    """
    made: Tensor = checkpoint(function, *args, use_reentrant=False)
    return made


def zero_init(layer: Layer) -> Layer:
    """Mark a convolution or a linear layer for `initialise` to zero, so that its branch starts at zero."""
    layer.starts_at_zero = True  # type: ignore[assignment]
    return layer


def initialise(net: nn.Module) -> None:
    """Draw the weights of every convolution and linear layer (Glorot uniform, zero bias), and zero the marked ones."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            if getattr(layer, "starts_at_zero", False):
                nn.init.zeros_(layer.weight)
            else:
                nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def scaled_sum(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """Return (x + y) * scale, without a multiplication where scale is 1."""
    return x + y if scale == 1.0 else (x + y) * scale
