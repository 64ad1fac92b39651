"""From any image file to a square of uint8 pixels, or to several.

    file -> centre square (of `crop` pixels, or of the shorter side) -> resize to `size` -> upright -> 1 or 3 channels

The resampling kernel is as wide as the reduction, which avoids aliasing. With `crop` an image is cropped before it is
resized, as in papers on CelebA; otherwise its shorter side is resized first. A JPEG far larger than its target is first
decoded at a half, quarter or eighth, never below four times the target, which changes the result by about one grey
level and saves most of the time and memory. Colour profiles are not applied.
"""

import hashlib
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import IO, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile

from diffusion_lit.checks import check_count, check_number

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
ORIENTATION = 0x0112  # the EXIF tag, and below what turns an image upright for each of its values
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras and scanners use of 16
HUGE = 2**23  # pixels to decode, from which on the gate is asked
DRAFT = 4  # a reduced JPEG keeps at least this many times the target's pixels per side


class BadImageError(Exception):
    """Why an image cannot be used, as the end of a sentence that begins with its name."""


TOO_SMALL = {  # what such an end says of an image that is too small, and what takes it in
    "smaller than the crop of ": "a smaller crop",
    "its smallest crop ": "upscale true, a smaller image_size or a larger smallest_crop",
    "smaller than ": "upscale true or a smaller image_size",
}


def way_in(reason: str) -> str:
    """The options that take in an image which is too small; nothing where it is not.

    Args:
        reason: What a `BadImageError` says.
    """
    return next((options for words, options in TOO_SMALL.items() if words in reason), "")


@dataclass(frozen=True)
class Transform:
    """How an image becomes a square of pixels.

    Args:
        size: Pixels per side of the result.
        channels: 3 for colour, 1 for grey.
        resize: "lanczos", the sharper, or "area", the mean over the pixels that fall into each.
        crop: Pixels per side of the centre square that is kept; by default as many as fit.
        upscale: Whether images smaller than the target are enlarged rather than refused.
        background: Grey level 0..255 that shows behind transparent pixels.
        bits: How many bits of an image with 16 bits per channel are used, from 8 to 16: 12 for values 0..4095; by
            default the fewest of 8, 10, 12, 14 and 16 that hold its values.

    Raises:
        ValueError: If a value is out of range.
    """

    size: int
    channels: int = 3
    resize: Literal["lanczos", "area"] = "lanczos"
    crop: int | None = None
    upscale: bool = False
    background: int = 255
    bits: int | None = None

    def __post_init__(self) -> None:
        check_number(least=1, most=4096, whole=True, image_size=self.size)
        check_count(channels=self.channels)
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels}; it is 3 for colour or 1 for grey.")
        if self.resize not in ("lanczos", "area"):
            raise ValueError(f"resize is {self.resize!r}; choose 'lanczos' or 'area'.")
        check_count(crop=self.crop)
        check_number(least=0, most=255, whole=True, background=self.background)
        if self.bits is not None:
            check_number(least=8, most=16, whole=True, bits=self.bits)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of the result."""
        return (self.channels, self.size, self.size)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of all that is made of one image."""
        return self.shape

    @property
    def least_share(self) -> float:
        """The smallest share of the image's shorter side that is taken."""
        return 1.0

    def boxes(self, size: tuple[int, int], side: float, key: str) -> list[tuple[float, float, float, float]]:
        """What is cut out of an image.

        Args:
            size: Its width and height.
            side: Pixels of the centre square.
            key: A hash of its file.

        Returns:
            Left, top, right and bottom of each square.
        """
        return [_centre(size, side)]


@dataclass(frozen=True)
class Crops(Transform):
    """As `Transform`, and beside the centre square others of random places and sizes, which make a small set larger.

    Where and how large is a function of the file's contents.

    Args:
        crops: Number of further squares.
        smallest: The smallest share of the shorter side that a square has, in (0, 1].
    """

    crops: int = 4
    smallest: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(crops=self.crops)
        check_number(above=0, most=1, smallest_crop=self.smallest)
        if self.crop is not None:
            raise ValueError(f"crop is {self.crop} and crops {self.crops}; leave one of them out.")

    @property
    def row_shape(self) -> tuple[int, ...]:
        """See `Transform.row_shape`."""
        return (1 + self.crops, *self.shape)

    @property
    def least_share(self) -> float:
        """See `Transform.least_share`."""
        return self.smallest

    def share(self, key: str, number: int) -> float:
        """Share of the shorter side that a square has; 1 for the centre square, number 0."""
        return 1.0 if number == 0 else self.smallest + (1 - self.smallest) * _uniform(key, number, "size")

    def boxes(self, size: tuple[int, int], side: float, key: str) -> list[tuple[float, float, float, float]]:
        """See `Transform.boxes`."""
        found = [_centre(size, side)]
        for number in range(1, 1 + self.crops):
            mine = side * self.share(key, number)
            left, top = ((whole - mine) * _uniform(key, number, axis) for whole, axis in zip(size, "xy", strict=True))
            found.append((max(left, 0.0), max(top, 0.0), min(left + mine, size[0]), min(top + mine, size[1])))
        return found


def _uniform(*key: str | int) -> float:
    """A number in [0, 1) that is a function of the key."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:6], "big") / 2**48


def decode(
    file: IO[bytes], transform: Transform, gate: Callable[[], AbstractContextManager[object]] = nullcontext
) -> np.ndarray:
    """Decodes an image.

    Args:
        file: The opened file.
        transform: What to make of it.
        gate: Entered while a huge image is in memory, so that a caller can let one pass at a time.

    Returns:
        Pixels (C, size, size), uint8; of several squares (squares, C, size, size).

    Raises:
        BadImageError: If it is broken, cut off, no image, too large or too small.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes and tags: what matters is caught below
        try:
            key = ""
            if isinstance(transform, Crops):
                key = hashlib.sha256(file.read()).hexdigest()[:16]
                file.seek(0)
            with Image.open(file, formats=FORMATS) as image:
                return _squares(image, transform, gate, key).reshape(transform.row_shape)
        except BadImageError:
            raise
        except UnidentifiedImageError as error:
            raise BadImageError(f"is not an image in one of the formats {', '.join(FORMATS)}") from error
        except Image.DecompressionBombError as error:
            raise BadImageError("claims to have more pixels than an image has (a decompression bomb?)") from error
        except MemoryError as error:
            raise BadImageError("does not fit in memory") from error
        except Exception as error:  # decoders raise many kinds of exception at damaged files
            raise BadImageError(f"is broken ({' '.join(str(error).split()) or type(error).__name__})") from error


def _squares(
    image: Image.Image, transform: Transform, gate: Callable[[], AbstractContextManager[object]], key: str
) -> np.ndarray:
    """All squares of an opened image, (squares, C, size, size)."""
    width, height = image.size
    side = transform.crop or min(width, height)
    if min(width, height) < side:
        raise BadImageError(f"is {width}x{height} pixels, smaller than the crop of {side}")
    smallest = side * transform.least_share
    if smallest < transform.size and not transform.upscale:
        if side >= transform.size:
            raise BadImageError(
                f"is {width}x{height} pixels, and its smallest crop {smallest:.0f}, less than {transform.size}"
            )
        raise BadImageError(f"is {width}x{height} pixels, smaller than {transform.size}x{transform.size}")
    shrink = DRAFT * transform.size / smallest
    if shrink < 1:
        image.draft(None, (math.ceil(width * shrink), math.ceil(height * shrink)))  # does nothing but to a JPEG
    scale = min(image.size) / min(width, height)
    with gate() if image.width * image.height > HUGE else nullcontext():
        deep = _deep(image)
        image.load()
        orientation = _orientation(image)  # read after loading: TIFF turns by itself
        image = _eight_bit(image) if deep is None else _reduced(deep, transform.bits)
        boxes = transform.boxes(image.size, side * scale, key)
        cut = [_cut(image, box, transform) for box in boxes]
    return np.stack([_pixels(square, orientation, transform) for square in cut])


def _cut(image: Image.Image, box: tuple[float, float, float, float], transform: Transform) -> Image.Image:
    """A square of an image, resized."""
    kernel = Image.Resampling.BOX if transform.resize == "area" else Image.Resampling.LANCZOS
    if box[2] - box[0] < transform.size:
        kernel = Image.Resampling.LANCZOS  # there is no area to average over
    if transform.crop is None:
        return image.resize((transform.size, transform.size), kernel, box)
    left, top, right, bottom = (round(edge) for edge in box)  # cut first, or the kernel would see beyond the crop
    return image.crop((left, top, right, bottom)).resize((transform.size, transform.size), kernel)


def _pixels(image: Image.Image, orientation: int, transform: Transform) -> np.ndarray:
    """A square as pixels (C, size, size): opaque, upright, grey or in colour."""
    image = _opaque(image, transform.background)
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
    array = np.asarray(image.convert("RGB" if transform.channels == 3 else "L"))
    return array.reshape(transform.size, transform.size, transform.channels).transpose(2, 0, 1)


def _centre(size: tuple[int, int], side: float) -> tuple[float, float, float, float]:
    """The box of a centre square, on whole pixels where its side is whole."""
    left, top = (size[0] - side) / 2, (size[1] - side) / 2
    if side == int(side):
        left, top = left // 1, top // 1
    return (max(left, 0.0), max(top, 0.0), min(left + side, float(size[0])), min(top + side, float(size[1])))


def significant_bits(file: IO[bytes]) -> int | None:
    """How many bits of an image with 16 bits per channel are used.

    Returns:
        The fewest of 8, 10, 12, 14 and 16 that hold its values; None for an image with fewer bits, or a broken one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS) as image:
                values = _deep(image)
                return None if values is None else _bits_of(values)
    except Exception:  # decoding reports the error
        return None


def _bits_of(values: np.ndarray) -> int:
    return min(bits for bits in DEPTHS if int(values.max()) < 2**bits)


def _deep(image: Image.Image) -> np.ndarray | None:
    """The values (H, W) or (H, W, C) of an image with 16 bits per channel; None for one with fewer."""
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.int64)
    if image.mode == "I":  # 32 bits, as some writers store 16
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BadImageError("has 32 bits per channel beyond the 16 that have a meaning")
        return values
    if isinstance(image, PngImageFile) and image.tile and str(image.tile[0][3]).endswith(";16B"):
        import torch  # Pillow reads the upper 8 bits of colours, which for 12 of 16 are nearly black
        from torchvision.io import ImageReadMode, decode_image

        assert image.fp is not None
        position = image.fp.tell()
        image.fp.seek(0)
        encoded = torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8)
        image.fp.seek(position)
        return np.asarray(decode_image(encoded, ImageReadMode.UNCHANGED).permute(1, 2, 0)).astype(np.int64)
    return None


def _reduced(values: np.ndarray, bits: int | None) -> Image.Image:
    """An image of 16 bits per channel in 8: the upper 8 of the bits in use."""
    bits, needed = bits or _bits_of(values), _bits_of(values)
    if needed > bits:
        raise BadImageError(f"holds the value {values.max()}, which {bits} bits do not; set bits to {needed}")
    return Image.fromarray((values >> (bits - 8)).astype(np.uint8))


def _eight_bit(image: Image.Image) -> Image.Image:
    """The image in a mode of 8 bits per channel that may be resampled: L, LA, RGB or RGBA."""
    if image.mode == "F":
        raise BadImageError("holds floating-point values, whose range is not known")
    if image.mode in ("L", "LA", "RGB", "RGBA") and not image.has_transparency_data:
        return image
    if image.has_transparency_data:
        return image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
    return image.convert("L" if image.mode == "1" else "RGB")


def _opaque(image: Image.Image, background: int) -> Image.Image:
    """The image laid over a background of one grey level."""
    if image.mode not in ("LA", "RGBA"):
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (background, background, background, 255)), image)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a damaged EXIF block leaves the image as it is
        return 1
