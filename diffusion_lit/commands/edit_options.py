"""The options that the tasks of `diffusion-lit edit` share: the model, how it is sampled, and the image."""

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from diffusion_lit.checks import check_number
from diffusion_lit.commands.options import DrawOptions
from diffusion_lit.diffusion import editing
from diffusion_lit.diffusion.images import from_uint8, psnr, to_uint8
from diffusion_lit.diffusion.models import PixelModel
from diffusion_lit.diffusion.rng import SeededNoise
from diffusion_lit.modules.load import load_data
from diffusion_lit.runtime.installation import PROGRAM

SAMPLES = ("flower", "china")  # of scikit-learn
BRIGHT, DARK = 0.5, -0.4  # means at the border, in [-1, 1], from which an image looks inverted beside the model's
FAR = 10.0  # a noise level at which the image is invisible


@dataclass(frozen=True)
class Options(DrawOptions):
    """Model, condition, sampling and output.

    Args:
        labels: Class, by number or name; several separated by commas where a task takes several. Without it the model
            draws whatever it likes.
        out: Folder for the results, runs/edits/TASK by default.
        json: Prints the record, and nothing else, on standard output, for a program.
    """

    out: str | None = None
    json: bool = False

    def unused(self, what: str, *names: str) -> None:
        """Refuses options that a task has no use for.

        Args:
            what: What the task does, to begin the sentence with.
            names: The options.

        Raises:
            ValueError: If one of them is given.
        """
        for name in names:
            if getattr(self, name) is not None:
                raise ValueError(f"{what} asks no network, so that --{name} {getattr(self, name)} does nothing.")


@dataclass(frozen=True)
class ImageOptions(Options):
    """Model, condition, sampling and output, as `Options`, and the image to edit.

    Args:
        image: An image file of any size and mode: its centre square is fitted to the model. `flower` and `china` are
            photographs that come with scikit-learn. Without it a test image of the checkpoint's own data is taken.
        negative_image: Turn the image to its negative first: a drawing in black on white, for a model of white on
            black. Where an image looks like that and this is not given, a line says so.
        data_index: Number of the test image.
    """

    image: str | None = None
    negative_image: bool = False
    data_index: int = 0

    def read(self, model: PixelModel, size: int | None = None) -> Tensor:
        """The image, fitted to the model.

        Args:
            model: The model.
            size: Pixels per side; the model's by default.

        Returns:
            Shape (1, C, H, W) in [-1, 1].

        Raises:
            ValueError: If it cannot be read or used, or there is no such test image.
            OSError: If there is no such file, or the data is missing.
        """
        channels, side, _ = model.image_shape
        pixels = self._test_image(model) if self.image is None else read_pixels(self.image, size or side, channels)
        image = from_uint8(pixels[None])
        if self.image is not None and not self.negative_image and size is None:
            told = inverted(model, image)
            if told:
                print(f"{PROGRAM}: {self.image} {told}", file=sys.stderr)
        return -image if self.negative_image else image

    def _test_image(self, model: PixelModel) -> Tensor:
        if self.ckpt_path is None:
            raise ValueError("A pretrained model brings no data along; give --image FILE, or flower or china.")
        data = load_data(self.ckpt_path, root=self.data_root)
        data.prepare_data()
        images = data.reference_images("test")
        if len(images) == 0:
            raise ValueError("The checkpoint's data has no test image; give --image FILE, or flower or china.")
        check_number(least=0, most=len(images) - 1, whole=True, hint=", the test images", data_index=self.data_index)
        return torch.as_tensor(images[self.data_index])


def inverted(model: PixelModel, image: Tensor) -> str:
    """Whether an image looks like the negative of the model's: bright at its border where theirs are dark.

    The model itself tells what its images look like: at a high noise level it predicts their mean.

    Args:
        model: The model.
        image: An image (1, C, H, W) in [-1, 1].

    Returns:
        What to say after the image's name; nothing where it is as the model's.
    """
    bright = _border(image)
    if bright < BRIGHT:
        return ""
    count, sigma = 8, min(FAR, model.denoiser.scaling.sigma_max)
    labels = torch.arange(count) % model.num_classes if model.num_classes else None
    device = editing.device_of(model)
    x = sigma * SeededNoise(range(count))(torch.empty(count, *model.x_shape, device=device))
    dark = _border(editing.denoise_once(model, x, sigma, labels=labels, sampling=model.sampling.replace(cfg_scale=1.0)))
    if not dark < DARK:
        return ""
    return (
        f"is bright at its border (mean {bright:.2f} in [-1, 1]) and the model's images are dark there ({dark:.2f}): "
        "if it is drawn in black on white, --negative_image true turns it."
    )


def _border(images: Tensor) -> float:
    """Mean of the outermost pixels of images (B, C, H, W)."""
    sides = (images[..., 0, :], images[..., -1, :], images[..., 1:-1, 0], images[..., 1:-1, -1])
    return float(torch.cat([side.flatten() for side in sides]).clamp(-1, 1).mean())


def read_pixels(path: str, size: int, channels: int, resize: str = "lanczos") -> Tensor:
    """Reads an image file: upright, its centre square, on white where it is transparent, resized.

    Args:
        path: The file, or `flower` or `china`.
        size: Pixels per side.
        channels: 3 for colour, 1 for grey.
        resize: "lanczos" or "area".

    Returns:
        Pixels uint8 (C, size, size).

    Raises:
        ValueError: If it is broken, no image, or has more pixels than an image has.
        OSError: If there is no such file, or it may not be read.
    """
    from datamodules import SingleImage

    data = SingleImage(path, batch_size=1, image_size=size, channels=channels, resize=resize, upscale=True)  # type: ignore[arg-type]
    return data.pixels()


def image_size(path: str) -> tuple[int, int]:
    """Width and height of an image file that `read_pixels` has read, upright."""
    from datamodules.decode import ORIENTATION

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sizes, which were checked before
        with Image.open(Path(path).expanduser()) as image:
            turned = image.getexif().get(ORIENTATION, 1) >= 5
            return (image.height, image.width) if turned else image.size


def decibels(images: Tensor, image: Tensor) -> list[float]:
    """PSNR of images (B, C, H, W) against one (1, C, H, W), as 8-bit images, at most 100 dB (equal)."""
    values: list[float] = psnr(to_uint8(images), to_uint8(image)).tolist()
    return [round(value, 2) for value in values]


def in_decibels(value: float) -> str:
    """A PSNR as it stands under an image."""
    return f"{value:.1f} dB"


def seed_names(seeds: Sequence[int]) -> list[str]:
    """What stands above the image of each seed."""
    return [f"seed {seed}" for seed in seeds]
