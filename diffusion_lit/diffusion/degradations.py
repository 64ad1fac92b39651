"""Deterministic degradations of an image, which replace noise in cold diffusion: x_t = D(x0, t).

D(x0, 0) = x0, and each step up to T removes more of the image. The position of a hole or of the flakes comes from a
standard normal map n, fixed over all steps, so that D is a function of (x0, t, n). Blur and pixelation ignore n.

    blur       x_t = A_t x0 A_t',  A_t = C' diag(exp(-(pi k / H)^2 s_t^2 / 2)) C,  C the orthonormal DCT-II
    mask       x_t = m_t x0,  m_t = prod_{i <= t} (1 - exp(-r^2 / (2 w_i^2))),  r the distance from the hole's centre
    pixelate   x_t = x0 averaged over squares of 2^t pixels
    snow       x_t = x0, paled, under a_t = t / T of the flakes

Lengths are fractions of the image's side, so that settings carry over between sizes.

Source: Bansal et al. 2022, Cold Diffusion (arXiv 2208.09392), section 4; snow after Hendrycks & Dietterich 2019
(arXiv 1903.12261).
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_lit.checks import check_number
from diffusion_lit.words import counted


def cosines(size: int) -> Tensor:
    """The orthonormal DCT-II: float64 (size, size), a frequency in each row."""
    k = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi * k[:, None] * (k + 0.5) / size) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


class Degradation(nn.Module, ABC):
    """Base class: T steps of degradation.

    Args:
        num_steps: Number T of steps, at least 1.

    Raises:
        ValueError: If there is no step.
    """

    task = ""  # of `diffusion-lit edit`, which undoes it

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        check_number(least=1, most=10_000, whole=True, num_steps=num_steps)
        self.num_steps = num_steps
        self._tables: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def forward(self, x0: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        """Degrades images.

        Args:
            x0: Images (B, C, H, W) in [-1, 1], H = W.
            t: Steps in [0, T], whole numbers of shape () or (B,).
            noise: Standard normal map of each image, shape (B, 1, H, W).

        Returns:
            x_t of x0's shape; x0 itself where t is 0.

        Raises:
            ValueError: If a step is outside [0, T], or the images are not square.
        """
        steps = torch.as_tensor(t)
        # Looking at a value on an accelerator would wait for it.
        if steps.device.type == "cpu" and steps.numel() and not 0 <= steps.min() <= steps.max() <= self.num_steps:
            raise ValueError(f"Steps reach from {steps.min()} to {steps.max()}, but must be in [0, {self.num_steps}].")
        if x0.shape[-1] != x0.shape[-2]:
            raise ValueError(f"Images are {x0.shape[-2]}x{x0.shape[-1]}; degradations take square ones.")
        t = steps.to(x0.device).expand(len(x0))
        with torch.autocast(x0.device.type, enabled=False):  # degradations run without autocast
            return torch.where((t == 0)[:, None, None, None], x0, self.degrade(x0, t, noise))

    @abstractmethod
    def degrade(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t for t of shape (B,); rows with t = 0 are ignored; see `forward`."""

    def known(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Which pixels of the image a degraded image still shows.

        Args:
            x0: Images (B, C, H, W).
            t: Steps (B,).
            noise: As for `forward`.

        Returns:
            1 where all is known and 0 where nothing is, shape (B, 1, H, W); 1 everywhere here.
        """
        return torch.ones_like(x0[:, :1])

    def strengths(self, size: int) -> Tensor | None:
        """How much each step takes away, rising with t.

        Args:
            size: Side of the images in pixels.

        Returns:
            In pixels, shape (T+1,); None where there is no such number.
        """
        return None

    def tables(self, size: int) -> Tensor:
        """What is the same for all images of a size, computed once for each device and precision.

        Args:
            size: Side H of the images.

        Returns:
            Float64 (T+1, ...), by step.
        """
        raise NotImplementedError(f"{type(self).__name__} needs no tables.")

    def table(self, x0: Tensor) -> Tensor:
        """The tables for images x0, on their device and in their precision."""
        key = (x0.shape[-1], x0.device, x0.dtype)
        if key not in self._tables:
            self._tables[key] = self.tables(x0.shape[-1]).to(x0)
        return self._tables[key]


def _check_widths(first: float, last: float) -> None:
    check_number(above=0, first=first)
    check_number(least=first, last=last, hint=", first being the least")


class Blur(Degradation):
    """Gaussian blur that widens geometrically, with mirrored edges: the heat equation, exact on the pixels' cosines.

    Args:
        num_steps: Number T of steps.
        first: Standard deviation of the first step as a share of the side.
        last: That of step T; at 1 an image is its mean colour, at 0.1 its large shapes are left.

    Raises:
        ValueError: If the widths are not positive and rising.

    Source: Bansal 2022, section 4.1; as a heat equation Rissanen 2022 (arXiv 2206.13397), section 3.1.
    """

    task = "deblur"

    def __init__(self, num_steps: int = 20, first: float = 0.03, last: float = 0.3) -> None:
        super().__init__(num_steps)
        _check_widths(first, last)
        self.first, self.last = first, last

    def strengths(self, size: int) -> Tensor:
        """Standard deviation of each step in pixels; see `Degradation.strengths`."""
        return self.widths() * size

    def widths(self) -> Tensor:
        """Standard deviation of each step as a share of the side, 0 at step 0, float64 (T+1,)."""
        rising = torch.logspace(math.log10(self.first), math.log10(self.last), self.num_steps, dtype=torch.float64)
        return torch.cat([rising.new_zeros(1), rising])

    def tables(self, size: int) -> Tensor:
        """A_t of each step; see `Degradation.tables`.

        Returns:
            Float64 (T+1, H, H), the identity at step 0.
        """
        k = torch.arange(size, dtype=torch.float64)
        kept = torch.exp(-0.5 * (math.pi * k * self.widths()[:, None]) ** 2)
        return cosines(size).T @ (kept[:, :, None] * cosines(size))

    def degrade(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Blurs; see `Degradation.degrade`."""
        blur = self.table(x0)[t][:, None]
        return blur @ x0 @ blur.mT


class Mask(Degradation):
    """A soft round hole that grows over the image, grey (0) inside; its centre is any pixel, each as likely.

    Args:
        num_steps: Number T of steps.
        first: Standard deviation w_1 of the first step's Gaussian as a share of the side.
        last: That of step T; at 1 nothing of the image is left, at 0.2 all but a disc as wide as half of it is.

    Raises:
        ValueError: If the widths are not positive and rising.

    Source: Bansal 2022, section 4.2.
    """

    task = "inpaint"

    def __init__(self, num_steps: int = 50, first: float = 0.03, last: float = 0.2) -> None:
        super().__init__(num_steps)
        _check_widths(first, last)
        self.first, self.last = first, last

    def tables(self, size: int) -> Tensor:
        """m_t at each offset from the centre; see `Degradation.tables`.

        Returns:
            Float64 (T+1, 2H-1, 2H-1), 1 at step 0; the centre is at [H-1, H-1].
        """
        offset = torch.arange(1 - size, size, dtype=torch.float64) / size
        squared = offset[:, None] ** 2 + offset**2
        widths = torch.linspace(self.first, self.last, self.num_steps, dtype=torch.float64)
        closed = -torch.expm1(-squared / (2 * widths[:, None, None] ** 2))
        return torch.cat([torch.ones_like(closed[:1]), closed.cumprod(0)])

    def known(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """m_t; see `Degradation.known`."""
        size = x0.shape[-1]
        centre = noise.flatten(1).argmax(1)  # where independent draws are largest is uniform over the pixels
        pixels = torch.arange(size, device=x0.device)
        rows = pixels + (size - 1 - centre // size)[:, None]
        columns = pixels + (size - 1 - centre % size)[:, None]
        return self.table(x0)[t[:, None, None], rows[:, :, None], columns[:, None, :]][:, None]

    def degrade(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Masks; see `Degradation.degrade`."""
        return x0 * self.known(x0, t, noise)


class Pixelate(Degradation):
    """Averages over squares of 2^t pixels, shown at the old size.

    Args:
        num_steps: Number T of steps; 2^T must divide the side.

    Source: Bansal 2022, section 4.3.
    """

    task = "super_resolve"

    def __init__(self, num_steps: int = 3) -> None:
        super().__init__(num_steps)

    def strengths(self, size: int) -> Tensor:
        """Pixels of a square's side; see `Degradation.strengths`."""
        return 2.0 ** torch.arange(self.num_steps + 1)

    def degrade(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Pixelates; see `Degradation.degrade`.

        Raises:
            ValueError: If the squares do not divide the image.
        """
        if x0.shape[-1] % 2**self.num_steps:
            raise ValueError(
                f"Pixelation in {counted(self.num_steps, 'step')} makes squares of {2**self.num_steps} pixels, which "
                f"do not divide images of {x0.shape[-1]}; lower num_steps."
            )
        x = made = x0
        for step in range(1, self.num_steps + 1):
            x = F.avg_pool2d(x, 2)
            coarse = x.repeat_interleave(2**step, -1).repeat_interleave(2**step, -2)
            made = torch.where((t == step)[:, None, None, None], coarse, made)
        return made


class Snow(Degradation):
    """Snowfall: the image pales, and flakes blown along a diagonal cover more and more of it.

    Args:
        num_steps: Number T of steps.
        density: Share of the sky that is white at step T, in (0, 1).
        pale: Share of the paled image at step T, in [0, 1].
        flake: Size of a flake as a share of the side.

    Raises:
        ValueError: If a share is out of range.

    Source: Bansal 2022, section 4.4, after ImageNet-C's snow (arXiv 1903.12261): thresholded noise under motion blur,
    and paling towards max(x, 1.5 grey + 0.5), x in [0, 1].
    """

    def __init__(self, num_steps: int = 40, density: float = 0.4, pale: float = 0.5, flake: float = 0.06) -> None:
        super().__init__(num_steps)
        check_number(above=0, below=1, density=density)
        check_number(least=0, most=1, pale=pale)
        check_number(above=0, most=1, flake=flake)
        self.density, self.pale, self.flake = density, pale, flake

    def flakes(self, t: Tensor, noise: Tensor) -> Tensor:
        """Brightness of the snow over each pixel, which only grows with t.

        Args:
            t: Steps (B,).
            noise: Standard normal (B, 1, H, W).

        Returns:
            Shape (B, 1, H, W) in [0, 1].
        """
        size = noise.shape[-1]
        side = max(1, round(self.flake * size))
        coarse = noise[..., : -(-size // side), : -(-size // side)]
        sky = coarse.repeat_interleave(side, -1).repeat_interleave(side, -2)[..., :size, :size]
        share = (t / self.num_steps).to(noise)[:, None, None, None]
        threshold = -math.sqrt(2) * torch.erfinv(2 * self.density * share.clamp(min=1e-6) - 1)
        fallen = (2 * (sky - threshold)).clamp(0, 1)
        blown = max(2, round(1.5 * side))
        streak = torch.eye(blown, dtype=noise.dtype, device=noise.device)[None, None] / blown
        before = (blown - 1) // 2
        padding = (before, blown - 1 - before) * 2
        return F.conv2d(F.pad(fallen, padding, mode="replicate"), streak).clamp(0, 1)

    def degrade(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Lets it snow; see `Degradation.degrade`."""
        x = (x0 + 1) / 2
        share = self.pale * (t / self.num_steps).to(x)[:, None, None, None]
        paled = torch.maximum(x, (1.5 * x.mean(1, keepdim=True) + 0.5).clamp(max=1))
        x = torch.lerp(x, paled, share)
        return 2 * torch.lerp(x, torch.ones_like(x), self.flakes(t, noise)) - 1
