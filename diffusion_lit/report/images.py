"""Images: tensors in [-1, 1] to grids, PNG files, animated GIFs and TensorBoard."""

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid

from diffusion_lit.diffusion.grids import evenly
from diffusion_lit.diffusion.images import to_uint8

FRAMES = 60  # steps that an animation shows at most


def grid_image(images: Tensor, columns: int, scale: int | None = None) -> Image.Image:
    """Lays images out in rows.

    Args:
        images: Images (B, C, H, W) in [-1, 1] with 1 to 4 channels.
        columns: Images per row.
        scale: Whole factor by which pixels are enlarged; by default small images grow to about 64 pixels a side.

    Returns:
        The grid as an image: grey or RGB (RGBA for 4 channels; of 2 channels the first is shown).
    """
    scale = scale or max(1, 64 // images.shape[-1])
    pixels = to_uint8(images)
    pixels = pixels[:, :1] if pixels.shape[1] == 2 else pixels
    pixels = pixels.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    grid = make_grid(pixels, nrow=columns, padding=max(1, scale // 2), pad_value=255).permute(1, 2, 0)
    return Image.fromarray(grid.numpy())


def titled_grid(
    rows: Sequence[Sequence[Tensor]], names: Sequence[str] = (), headings: Sequence[str] = ()
) -> Image.Image:
    """Lays images out in rows that have names, under headings; pixel for pixel, as `grid_image`.

    Args:
        rows: Images (C, H, W) in [-1, 1] of one size; where a row is shorter than others, its last cells stay blank.
        names: What stands left of each row; none by default.
        headings: What stands above each column; none by default.

    Returns:
        The figure, in black on white around the images.
    """
    columns = max(len(row) for row in rows)
    blank = torch.ones_like(rows[0][0])
    cells = [image for row in rows for image in [*row, *[blank] * (columns - len(row))]]
    body = grid_image(torch.stack(cells), columns)
    if not any(names) and not any(headings):
        return body
    gap, size = 6, 12
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)
    pen = ImageDraw.Draw(body)
    texts = [wrapped(name, 24) for name in names]
    left = round(max((pen.multiline_textbbox((0, 0), text, font)[2] for text in texts), default=-gap)) + 2 * gap
    width, height = (length / count for length, count in zip(body.size, (columns, len(rows)), strict=True))
    per_line = max(4, int(width / (0.58 * size)))
    tops = [wrapped(text, per_line) for text in headings]
    top = max((round(pen.multiline_textbbox((0, 0), text, font)[3]) + gap for text in tops), default=0)
    figure = Image.new("RGB", (left + body.width, top + body.height), "white")
    figure.paste(body, (left, top))
    pen = ImageDraw.Draw(figure)
    for index, text in enumerate(texts):
        pen.multiline_text((left - gap, top + (index + 0.5) * height), text, "black", font, "rm", align="right")
    for index, text in enumerate(tops):
        pen.multiline_text((left + (index + 0.5) * width, top - gap / 2), text, "black", font, "md", align="center")
    return figure


def wrapped(text: str, width: int) -> str:
    """Breaks a heading into lines, so that it does not run into the next one.

    Args:
        text: The heading, perhaps of several lines, each of which becomes at most 3; dots mark what is left out.
        width: Characters of a line.
    """
    lines = (textwrap.wrap(line, width, max_lines=3, placeholder=" ...") for line in text.split("\n"))
    return "\n".join("\n".join(line) for line in lines)


class Cell(NamedTuple):
    """One image of a labelled grid, (C, H, W) in [-1, 1], or none, and what stands below it."""

    image: Tensor | None
    note: str = ""


def labelled_grid(rows: Sequence[Sequence[Cell]], columns: Sequence[str], names: Sequence[str]) -> Image.Image:
    """Lays images out under headings, each pixel as a square.

    Args:
        rows: The images, as many in each row as there are columns; they may differ in size.
        columns: What stands above each column.
        names: What stands left of each row.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.35 * len(columns) + 0.6 * any(names), 1.55 * len(rows) + 0.3), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), len(columns), squeeze=False)
    for top, (row, name) in enumerate(zip(rows, names, strict=True)):
        for left, (cell, heading) in enumerate(zip(row, columns, strict=True)):
            panel = panels[top][left]
            panel.set(xticks=[], yticks=[])
            if cell.image is None:
                panel.spines[:].set_visible(False)
            else:
                pixels = to_uint8(cell.image)
                grey = pixels[0].numpy() if len(pixels) < 3 else pixels.permute(1, 2, 0).numpy()
                panel.imshow(grey, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            panel.set_xlabel(cell.note, fontsize=8)
            if top == 0:
                panel.set_title(wrapped(heading, 20), fontsize=8)
            if left == 0:
                panel.set_ylabel(wrapped(name, 20), fontsize=8)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def gif_bytes(frames: Sequence[Image.Image]) -> bytes:
    """Encodes images of one size as an animated GIF of 4 seconds that loops and rests on its last frame.

    Returns:
        The bytes of the file.
    """
    durations = [max(20, 4000 // len(frames))] * len(frames)
    durations[-1] += 1500
    buffer = io.BytesIO()
    palette = [frame.convert("RGB").quantize(256) if frame.mode != "L" else frame for frame in frames]
    palette[0].save(buffer, "GIF", save_all=True, append_images=palette[1:], duration=durations, loop=0)
    return buffer.getvalue()


def animation(images: Sequence[Tensor], scale: int | None = None) -> bytes:
    """Encodes images as an animated GIF, each a frame of its own.

    Args:
        images: Images (C, H, W) in [-1, 1] of one size.
        scale: Whole factor by which pixels are enlarged; by default small images grow to about 256 pixels a side.

    Returns:
        The GIF's bytes.
    """
    scale = scale or max(1, 256 // images[0].shape[-1])
    return gif_bytes([grid_image(image[None], columns=1, scale=scale) for image in images])


def png_bytes(image: Image.Image) -> bytes:
    """Encodes an image as PNG.

    Returns:
        The bytes of the file.
    """
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


class StepRecorder:
    """A sampler's callback that keeps x and x0_hat of each step.

    Args:
        keep: Number of images of the batch to keep, the first ones, or their places in it.
    """

    def __init__(self, keep: int | Sequence[int]) -> None:
        self.keep = slice(keep) if isinstance(keep, int) else list(keep)
        self.x: list[Tensor] = []
        self.x0_hat: list[Tensor] = []
        self.sigmas: list[float] = []

    def __call__(self, step: int, x: Tensor, x0_hat: Tensor, sigma: Tensor) -> None:
        """Keeps one step.

        Args:
            step: Index of the step.
            x: The noisy images (B, C, H, W) at noise level sigma.
            x0_hat: The denoiser's predictions.
            sigma: The noise level.
        """
        self.x.append(x[self.keep].detach().float().cpu())
        self.x0_hat.append(x0_hat[self.keep].detach().float().cpu())
        self.sigmas.append(float(torch.as_tensor(sigma).reshape(-1)[0]))

    def strip(self, columns: int = 10, count: int = 4, spread: bool = False) -> Image.Image:
        """For some of the images, a row of x above a row of x0_hat, from noise to image.

        Args:
            columns: Most steps to show; they are evenly spread, first and last among them.
            count: Most images to show.
            spread: Whether these are evenly spread too, and not the first ones.

        Returns:
            The strip; x is scaled to unit variance, x / sqrt(1 + sigma^2), so that it can be seen.
        """
        steps = self._spread(columns)
        rows = []
        kept = self.x[0].shape[0]
        count = min(count, kept)
        for index in evenly(0, kept - 1, count) if spread else range(count):
            rows.append([self._visible(step)[index] for step in steps])
            rows.append([self.x0_hat[step][index] for step in steps])
        headings = [f"sigma {self.sigmas[step]:.3g}" for step in steps]
        return titled_grid(rows, ["x", "x0_hat"] * (len(rows) // 2), headings)

    def frames(self, columns: int) -> list[Image.Image]:
        """One grid per step: the noisy images turn into samples.

        Args:
            columns: Images per row.

        Returns:
            The frames, at most 60 and the finished predictions.
        """
        grids = [grid_image(self._visible(step), columns) for step in self._spread(FRAMES)]
        return [*grids, grid_image(self.x0_hat[-1], columns)]

    def animations(self, scale: int | None = None) -> list[bytes]:
        """An animated GIF of each image kept, from noise to image.

        Args:
            scale: Whole factor by which pixels are enlarged; by default small images grow to about 256 pixels a side.

        Returns:
            The GIF's bytes, image by image.
        """
        steps = [self._visible(step) for step in self._spread(FRAMES)]
        return [animation([*(x[index] for x in steps), last], scale) for index, last in enumerate(self.x0_hat[-1])]

    def _visible(self, step: int) -> Tensor:
        return self.x[step] / math.sqrt(1 + self.sigmas[step] ** 2)

    def _spread(self, most: int) -> list[int]:
        count = min(most, len(self.x))
        return sorted(set(evenly(0, len(self.x) - 1, count)))
