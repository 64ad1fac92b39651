"""One image as a data set: the quickest way to see a diffusion model learn, and the setting of single-image models.

With the whole image, the data distribution is one point and the best denoiser is known, D(x; sigma) = x0: a trained
model reproduces the image. With patches, each training image is a random square of the image, and the model learns its
texture.
"""

from importlib.resources import files
from pathlib import Path
from typing import IO, Literal

import torch
from torch import Tensor

from datamodules.base import ImageDataModule
from datamodules.decode import BadImageError, Transform, decode
from datamodules.files import may_not_read
from datamodules.loaders import Split
from diffusion_lit.checks import check_count
from diffusion_lit.diffusion.rng import keyed_generator, send

SAMPLES = ("flower", "china")
HELD_OUT = 64  # rows of "val" and "test"


class SingleImage(ImageDataModule):
    """One image, over and over: whole, or as random patches.

    Args:
        image: "flower" or "china", the photographs that come with scikit-learn, or the path of an image.
        batch_size: Images per training step over all ranks.
        image_size: Pixels per side of a training image.
        copies: Training images per epoch.
        patches: Pixels per side to which the image is resized before random patches of image_size are cut from it;
            by default every training image is the whole image.
        resize: "lanczos", the sharper, or "area", the mean over the pixels that fall into each.
        channels: 3 for colour, 1 for grey.
        upscale: Whether an image smaller than needed is enlarged rather than refused.
        random_flip: Whether half of the training images are mirrored.
        on_device: Whether the images live on the training device; by default they do on a GPU.
    """

    def __init__(
        self,
        image: str = "flower",
        batch_size: int = 32,
        image_size: int = 32,
        copies: int = 1024,
        patches: int | None = None,
        resize: Literal["lanczos", "area"] = "lanczos",
        channels: int = 3,
        upscale: bool = False,
        random_flip: bool = False,
        on_device: bool | None = None,
    ) -> None:
        super().__init__(batch_size, 0, False, random_flip, on_device)
        check_count(copies=copies, patches=patches)
        if copies < batch_size:
            raise ValueError(f"copies is {copies}; an epoch must hold a batch at least, which is {batch_size} images.")
        if patches is not None and patches <= image_size:
            raise ValueError(
                f"patches is {patches}; the image must be larger than the patches of {image_size} cut from it, or "
                "leave patches out to train on the whole image."
            )
        self.image = image
        self.image_size = image_size
        self.copies = copies
        self.patches = patches
        self.transform = Transform(patches or image_size, channels, resize, upscale=upscale)
        self._pixels: Tensor | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (channels, image_size, image_size)."""
        return (self.transform.channels, self.image_size, self.image_size)

    @property
    def class_names(self) -> list[str]:
        """None: there is one image."""
        return []

    def prepare_data(self) -> None:
        """Looks whether the image can be read.

        Raises:
            FileNotFoundError: If there is no such image.
            ValueError: If it cannot be used.
        """
        self.pixels()

    def pixels(self) -> Tensor:
        """The training image, uint8 (C, S, S); S is `patches`, or `image_size` for the whole image.

        Raises:
            FileNotFoundError: If there is no such image.
            PermissionError: If it may not be read.
            ValueError: If it cannot be used.
        """
        if self._pixels is None:
            try:
                with self._open() as file:
                    self._pixels = torch.from_numpy(decode(file, self.transform).copy())
            except BadImageError as error:
                hint = "; set upscale to true to enlarge it" if "smaller" in str(error) else ""
                raise ValueError(f"The image {self.image} {error}{hint}.") from error
        return self._pixels

    def read(self, split: str) -> Split:
        """The images of a split; see `ImageDataModule.read`.

        "val" and "test" are the same: 64 copies, or 64 patches at fixed random places.

        Returns:
            Images (N, C, image_size, image_size).
        """
        count = self.copies if split == "train" else min(HELD_OUT, self.copies)
        if self.patches is None:
            return Split(self.pixels().expand(count, -1, -1, -1), None)
        return Split(self._cut(count, keyed_generator("patches", split)), None)

    def augment(self, images: Tensor, generator: torch.Generator, rows: slice) -> Tensor:
        """Cuts new patches and mirrors half, as the options say; see `ImageDataModule.augment`.

        Returns:
            Images, uint8 (B, C, H, W).
        """
        if self.patches is not None:
            images = send(self._cut(self.batch_size, generator, rows), images.device)
        return super().augment(images, generator, rows)

    def _cut(self, count: int, generator: torch.Generator, rows: slice = slice(None)) -> Tensor:
        """Random patches (count, C, image_size, image_size), of which the given rows are returned."""
        windows = self.pixels().unfold(1, self.image_size, 1).unfold(2, self.image_size, 1)  # (C, y, x, S, S)
        places = torch.randint(windows.shape[1], (count, 2), generator=generator)[rows]
        return windows[:, places[:, 0], places[:, 1]].transpose(0, 1).contiguous()

    def _open(self) -> IO[bytes]:
        """The image's file."""
        path = Path(self.image).expanduser()
        if self.image in SAMPLES and not path.exists():
            return files("sklearn.datasets.images").joinpath(f"{self.image}.jpg").open("rb")
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no image {self.image}; give the path of one, or {' or '.join(SAMPLES)} for a photograph "
                "that comes with scikit-learn."
            )
        try:
            return path.open("rb")
        except PermissionError as error:
            raise may_not_read(path) from error
