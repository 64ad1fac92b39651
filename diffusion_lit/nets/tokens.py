"""Layers of transformers over patches: rotary places, gated perceptrons and the normalisation of tokens."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def place_angles(height: int, width: int, count: int, base: float) -> tuple[Tensor, Tensor]:
    """Columns and rows of a grid times the frequencies base^(-i / count): two float64 (height * width, count)."""
    frequency = base ** (-torch.arange(count, dtype=torch.float64) / count)
    columns = torch.arange(width).repeat(height)[:, None] * frequency
    rows = torch.arange(height).repeat_interleave(width)[:, None] * frequency
    return columns, rows


def rotary_angles(height: int, width: int, channels: int) -> Tensor:
    """Angles of the places of a grid for `rotate`, shape (height * width, channels / 2), row by row.

    Half of them grow with the column and half with the row, at frequencies 100^(-i / n), i = 0 .. n - 1.

    Source: Su 2021, arXiv 2104.09864; along two axes Heo 2024, arXiv 2403.13298, section 3.2.
    """
    return torch.cat(place_angles(height, width, channels // 4, 100.0), dim=1).float()


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + d/2}) of x (..., N, d) by its angle (N, d / 2)."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class SwiGLU(nn.Module):
    """Gated perceptron W3 (silu(W1 x) * W2 x), its hidden width two thirds of a plain one's for as many weights.

    Args:
        channels: Width of the tokens.
        hidden: Hidden width of the plain perceptron.

    Source: Shazeer 2020, arXiv 2002.05202.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        hidden = max(1, round(2 * hidden / 3))
        self.gate = nn.Linear(channels, hidden)
        self.value = nn.Linear(channels, hidden)
        self.proj = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, N, channels) from x (B, N, channels)."""
        made: Tensor = self.proj(F.silu(self.gate(x)) * self.value(x))
        return made


def token_norm(channels: int, rms: bool) -> nn.Module:
    """A normalisation of tokens without parameters: a layer norm, or by the root mean square alone."""
    if rms:
        return nn.RMSNorm(channels, eps=1e-6, elementwise_affine=False)
    return nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
