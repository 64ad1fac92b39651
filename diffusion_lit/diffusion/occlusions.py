"""Degradations that leave a part of the image as it is: its grey, or all but a rectangle.

grey   x_t = (1 - t / T) x0 + (t / T) grey of x0
box    x_t = x0 outside a rectangle whose sides grow as t / T, 0 inside
"""

import torch
from torch import Tensor

from diffusion_lit.checks import check_number
from diffusion_lit.diffusion.degradations import Degradation
from diffusion_lit.diffusion.images import to_grey


class Grey(Degradation):
    """Colours that fade to their grey.

    Args:
        num_steps: Number T of steps; at step T no colour is left.
    """

    task = "colorize"

    def __init__(self, num_steps: int = 10) -> None:
        super().__init__(num_steps)

    def degrade(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Fades; see `Degradation.degrade`.

        Raises:
            ValueError: If the images have no colours.
        """
        if x0.shape[1] != 3:
            raise ValueError(f"Grey takes the colours of RGB images, but these have {x0.shape[1]} channel(s).")
        return torch.lerp(x0, to_grey(x0).expand_as(x0), (t / self.num_steps).to(x0)[:, None, None, None])


class Box(Degradation):
    """A rectangle that grows over the image, grey (0) inside; its centre is any pixel, each as likely.

    Its sides are a share of the image's, times and divided by exp(a / 4), a ~ N(0, 1) for each image; what lies outside
    the image is cut off.

    Args:
        num_steps: Number T of steps.
        last: Share of the side that the rectangle has at step T, in (0, 2].

    Raises:
        ValueError: If `last` is out of range.
    """

    task = "inpaint"

    def __init__(self, num_steps: int = 16, last: float = 0.75) -> None:
        super().__init__(num_steps)
        check_number(above=0, most=2, last=last)
        self.last = last

    def known(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """1 outside the rectangle; see `Degradation.known`."""
        size = x0.shape[-1]
        centre = noise.flatten(1).argmax(1)  # where independent draws are largest is uniform over the pixels
        stretch = torch.exp(noise[:, 0, 0, 0].clamp(-2, 2) / 4)
        half = self.last * size / 2 * (t / self.num_steps).to(x0)
        pixels = torch.arange(size, device=x0.device)
        rows = (pixels - (centre // size)[:, None]).abs() < (half * stretch)[:, None]
        columns = (pixels - (centre % size)[:, None]).abs() < (half / stretch)[:, None]
        return 1 - (rows[:, :, None] & columns[:, None, :]).to(x0)[:, None]

    def degrade(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Covers; see `Degradation.degrade`."""
        return x0 * self.known(x0, t, noise)
