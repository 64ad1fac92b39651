"""What the tasks of `diffusion-lit edit` share: the model, how it is sampled, the image, and what is written.

A task writes into its folder figure.png (what a person looks at), the images themselves pixel for pixel, and
record.json: the model and its hash, the sampling, the options and the figures.
"""

import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffusion_lit.checks import check_count
from diffusion_lit.commands.options import DrawOptions
from diffusion_lit.diffusion import editing
from diffusion_lit.diffusion.generate import Sampling
from diffusion_lit.diffusion.images import psnr, to_uint8
from diffusion_lit.diffusion.models import PixelModel
from diffusion_lit.diffusion.rng import SeededNoise
from diffusion_lit.modules.labels import check_guidance, class_indices
from diffusion_lit.modules.load import load_data
from diffusion_lit.report.images import png_bytes
from diffusion_lit.report.receipt_page import plain_table
from diffusion_lit.runtime.hardware import pick_device
from diffusion_lit.runtime.installation import PROGRAM
from diffusion_lit.runtime.versions import versions
from diffusion_lit.storage.exports import WEIGHTS, is_export
from diffusion_lit.storage.hashing import file_hash
from diffusion_lit.storage.own_files import RECORD, own_files
from diffusion_lit.storage.room import try_folder

OUT = "runs/edits"
SAMPLES = ("flower", "china")  # of scikit-learn
BRIGHT, DARK = 0.5, -0.4  # means at the border, in [-1, 1], from which an image looks inverted beside the model's
FAR = 10.0  # a noise level at which nothing is seen of the image


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

    def load(self) -> PixelModel:
        """The model, in eval mode on its device.

        Returns:
            The model.

        Raises:
            ValueError: If there is none, or it does not denoise, or words are given to a model of classes.
        """
        try_folder(Path(self.out or OUT))
        model = self.load_model()
        if not isinstance(model, PixelModel):
            raise ValueError(
                f"{self.ckpt_path} holds a {type(model).__name__}, which does not denoise; edit with a checkpoint of "
                "DDPM, EDM or LatentDiffusion."
            )
        return model.to(pick_device(self.device))

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

    def sampling(self, model: PixelModel, default: Sampling) -> Sampling:
        """The settings of a task with what is given in place.

        Args:
            model: The model.
            default: How the task samples unless told otherwise.

        Returns:
            The settings.

        Raises:
            ValueError: If guidance is asked for that does nothing.
        """
        sampling = self.applied(default)
        check_guidance(model, sampling, bool(self.prompts) or self.labels is not None, **self.guidance)
        return sampling

    def conditions(self, model: PixelModel) -> list[int]:
        """The conditions given: classes by number, or prompts by place.

        Args:
            model: The model.

        Returns:
            Label indices in order; none where none is given.

        Raises:
            ValueError: If the model has no such class, or takes prompts.
        """
        if self.prompts:
            return list(range(len(self.prompts)))
        if self.labels is None:
            return []
        if model.num_classes == 0:
            raise ValueError(f"--labels {self.labels} was given, but the model is unconditional; leave --labels out.")
        return class_indices(self.labels, model.num_classes, model.class_names)

    def condition(self, model: PixelModel, count: int) -> Tensor | None:
        """The one condition of a task, for each of its images.

        Args:
            model: The model.
            count: Number of images.

        Returns:
            Shape (count,), or None without a condition.

        Raises:
            ValueError: As `conditions`, or if several are given.
        """
        given = self.conditions(model)
        if len(given) > 1:
            raise ValueError(f"{len(given)} conditions were given, but this task takes one for all images; give one.")
        return torch.tensor(given * count) if given else None

    def several(self, model: PixelModel, needed: int, what: str) -> Tensor:
        """The conditions of a task that needs a certain number.

        Args:
            model: The model.
            needed: How many.
            what: What they are for.

        Returns:
            Shape (needed,).

        Raises:
            ValueError: As `conditions`, or if another number is given.
        """
        given = self.conditions(model)
        if model.num_classes == 0 and model.prompts is None:
            raise ValueError(f"{what} needs {needed} conditions, but the model knows none; give one with classes.")
        if len(given) != needed:
            raise ValueError(
                f"{what} needs {needed} conditions, but {len(given)} were given; write --labels with {needed} classes "
                "separated by commas, or --prompt as many times."
            )
        return torch.tensor(given)

    def names(self, model: PixelModel, labels: Tensor | None) -> list[str]:
        """What labels mean, in words.

        Args:
            model: The model.
            labels: Label indices (B,), or None.

        Returns:
            Class names or prompts; nothing for None.
        """
        if labels is None:
            return []
        known = self.prompts or [str(name) for name in model.class_names]
        return [known[i] if i < len(known) else str(i) for i in labels.tolist()]

    def seeds(self, count: int) -> range:
        """One seed per result.

        Args:
            count: Number of results.

        Returns:
            The seeds.

        Raises:
            ValueError: If there is to be no result.
        """
        check_count(num_samples=count)
        return range(self.seed, self.seed + count)

    def write(
        self,
        task: str,
        model: PixelModel,
        sampling: Sampling | None,
        figure: Image.Image,
        named: dict[str, Tensor],
        facts: dict[str, Any],
        animations: dict[str, bytes] | None = None,
        table: Sequence[Sequence[str]] = (),
    ) -> None:
        """Writes the figure, the images and the record, in the place of those of an earlier run, and says so.

        Args:
            task: The task's name.
            model: The model.
            sampling: How it was sampled; None where it was not.
            figure: What a person looks at.
            named: Images (B, C, H, W) in [-1, 1] by name, each written as NAME.png, or NAME_0.png, NAME_1.png...
            facts: Figures and whatever else the record shall hold.
            animations: GIF files by name.
            table: Figures to print, row by row.

        Raises:
            OSError: If something cannot be written; the results of an earlier run are as they were.
        """
        folder = Path(self.out or f"{OUT}/{task}")
        files: dict[str, Image.Image | bytes] = {"figure.png": figure, **(animations or {})}
        for name, images in named.items():
            for index, image in enumerate(images):
                files[f"{name}.png" if len(images) == 1 else f"{name}_{index}.png"] = as_image(image)
        record = {
            "task": task,
            "model": self._identity(model),
            "sampling": None if sampling is None else {**sampling.record(), "nfe": sampling.nfe},
            **({"guide": guide.identity()} if sampling and (guide := sampling.guide_of(model.denoiser)) else {}),
            "options": {name: value for name, value in asdict(self).items() if value not in (None, "")},
            **facts,
            "versions": versions(),
            "files": [*files, RECORD],
        }
        text = json.dumps(record, indent=2, allow_nan=False)
        with own_files(folder) as fresh:
            for name, content in files.items():
                (fresh / name).write_bytes(content if isinstance(content, bytes) else png_bytes(content))
            (fresh / RECORD).write_text(text)
        if self.json:
            print(text)
            return
        if table:
            print(plain_table(table))
        print(f"{task}: figure.png, record.json and the images are in {folder}/.")

    def _identity(self, model: PixelModel) -> dict[str, Any]:
        """What the model is, for the record."""
        identity: dict[str, Any] = {"class": type(model).__name__, "image_shape": list(model.image_shape)}
        if self.ckpt_path is None:
            return {**identity, "pretrained": self.pretrained}
        path = Path(self.ckpt_path)
        weights = path / WEIGHTS if is_export(path) else path
        return {**identity, "file": str(path), "sha256": file_hash(weights)}


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
        image = pixels[None].float() / 127.5 - 1
        if self.image is not None and not self.negative_image and size is None:
            told = inverted(model, image)
            if told:
                print(f"{PROGRAM}: {self.image} {told}", file=sys.stderr)
        return -image if self.negative_image else image

    def _test_image(self, model: PixelModel) -> Tensor:
        if self.ckpt_path is None:
            raise ValueError("A pretrained model brings no data along; give --image FILE, or flower or china.")
        data = load_data(self.ckpt_path, **({} if self.data_root is None else {"root": self.data_root}))
        data.prepare_data()
        images = data.reference_images("test")
        if not 0 <= self.data_index < len(images):
            raise ValueError(f"data_index is {self.data_index}; the test split has images 0 to {len(images) - 1}.")
        return torch.as_tensor(images[self.data_index])


def inverted(model: PixelModel, image: Tensor) -> str:
    """Whether an image looks like the negative of the model's: bright at its border where theirs are dark.

    The model's images are asked of the model itself: far up in the noise it predicts their mean.

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
        warnings.simplefilter("ignore")  # of sizes, which were looked at before
        with Image.open(Path(path).expanduser()) as image:
            turned = image.getexif().get(ORIENTATION, 1) >= 5
            return (image.height, image.width) if turned else image.size


def as_image(image: Tensor) -> Image.Image:
    """An image (C, H, W) in [-1, 1] pixel for pixel: grey for one channel, RGB for three."""
    pixels = to_uint8(image)
    return Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy())


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
