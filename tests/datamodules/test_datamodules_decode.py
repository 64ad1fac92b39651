"""Decoding: every mode, format and orientation to the same square, against other arithmetic."""

import io

import numpy as np
import pytest
import torch
from helpers.data_fixtures import make_image
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode, functional

from datamodules.decode import BadImageError, Transform, decode


def encoded(image: Image.Image, format: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    return file


def square(image: Image.Image, format: str = "PNG", transform: Transform | None = None, **options) -> np.ndarray:
    return decode(encoded(image, format, **options), transform or Transform(32)).astype(int)


COLOUR = make_image((100, 80))
GREY = COLOUR.convert("L")
PALETTE = COLOUR.convert("P", palette=Image.Palette.ADAPTIVE, colors=256)


@pytest.mark.parametrize(
    ("format", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 8),
        ("JPEG", {"quality": 95}, 8),
        ("JPEG", {"quality": 95, "progressive": True}, 8),
    ],
)
def test_formats_agree(format, options, tolerance):
    assert np.abs(square(COLOUR, format, **options) - square(COLOUR)).max() <= tolerance


def sixteen_bit(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image).astype(np.uint16) * 256 + 99)


def opaque(mode: str) -> Image.Image:
    return COLOUR.convert("RGBA") if mode == "RGBA" else GREY.convert("LA")


@pytest.mark.parametrize(
    ("image", "format", "expected", "tolerance"),
    [
        (GREY, "PNG", GREY, 0),
        (GREY, "JPEG", GREY, 6),
        (opaque("RGBA"), "PNG", COLOUR, 0),
        (opaque("LA"), "PNG", GREY, 0),
        (sixteen_bit(GREY), "PNG", GREY, 0),
        (sixteen_bit(GREY), "TIFF", GREY, 0),
        (Image.fromarray(np.asarray(GREY).astype(np.int32) * 256 + 99), "TIFF", GREY, 0),
        (PALETTE, "PNG", PALETTE.convert("RGB"), 0),
        (COLOUR.convert("CMYK"), "TIFF", COLOUR, 3),
        (COLOUR.convert("CMYK"), "JPEG", COLOUR, 8),
        (COLOUR.convert("YCbCr"), "TIFF", COLOUR, 6),
        (GREY.point(lambda value: 255 * (value > 127)).convert("1"), "PNG", GREY.point(lambda v: 255 * (v > 127)), 0),
    ],
)
def test_modes_agree(image, format, expected, tolerance):
    options = {"quality": 95} if format == "JPEG" else {}
    assert np.abs(square(image, format, **options) - square(expected.convert("RGB"))).max() <= tolerance


def test_transparent_pixels_show_the_background():
    image = Image.new("RGBA", (64, 64), (10, 200, 30, 0))
    image.paste((10, 200, 30, 255), (0, 0, 32, 64))
    for background in (0, 255):
        array = square(image, transform=Transform(8, resize="area", background=background))
        assert (array[:, :, :4] == np.array([10, 200, 30])[:, None, None]).all()
        assert (array[:, :, 4:] == background).all()


def test_palette_transparency_shows_the_background():
    image = Image.new("P", (40, 40), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert (square(image, transparency=1) == 255).all()
    assert (square(image)[0] == 255).all() and (square(image)[1:] == 0).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_turned_upright(format, orientation):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = COLOUR.transpose(undo[orientation]) if orientation in undo else COLOUR
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    assert np.abs(square(stored, format, exif=exif, **options) - square(COLOUR)).max() <= 4


def test_damaged_exif_leaves_the_image():
    assert np.array_equal(square(COLOUR, "JPEG", exif=b"Exif\0\0garbage"), square(COLOUR, "JPEG"))


def test_area_is_the_mean_of_what_falls_into_each_pixel():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8))
    expected = np.asarray(image, float).reshape(32, 3, 32, 3, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(square(image, transform=Transform(32, resize="area")) - expected).max() <= 1


def test_resampling_does_not_alias():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255  # finer than any pixel of the result
    for resize in ("area", "lanczos"):
        array = square(Image.fromarray(stripes), transform=Transform(32, resize=resize))
        assert np.abs(array[:, :, 2:-2] - 127.5).max() <= 2


def test_reduction_agrees_with_antialiased_torch():
    image = make_image((256, 256), seed=3)
    pixels = torch.from_numpy(np.asarray(image)).permute(2, 0, 1)[None].float()
    theirs = interpolate(pixels, (32, 32), mode="bicubic", antialias=True)[0].numpy()
    assert np.abs(square(image) - theirs).mean() < 1


def test_the_centre_is_kept():
    wide = Image.new("RGB", (300, 100))
    wide.paste((255, 0, 0), (100, 0, 200, 100))
    for image in (wide, wide.transpose(Image.Transpose.ROTATE_90)):
        assert (square(image)[0, 1:-1, 1:-1] >= 250).all()
        assert (square(image, transform=Transform(25, resize="area"))[0] == 255).all()
        assert (square(image, transform=Transform(32, crop=100))[0] == 255).all()  # sees nothing beyond the crop


def test_resizing_and_cutting_agrees_with_torchvision():
    image = make_image((90, 60), seed=4)
    theirs = functional.center_crop(functional.resize(image, 20, InterpolationMode.LANCZOS), 20)
    assert np.abs(square(image, transform=Transform(20)) - np.asarray(theirs).transpose(2, 0, 1)).max() <= 1


def test_size_one_to_one_changes_nothing():
    image = make_image((32, 32), seed=5)
    assert np.array_equal(square(image), np.asarray(image).transpose(2, 0, 1))


def test_grey_is_one_channel():
    array = square(COLOUR, transform=Transform(32, channels=1))
    assert array.shape == (1, 32, 32)
    assert np.abs(array[0] - square(GREY)[0]).max() <= 1


def test_reduced_decoding_of_a_large_jpeg_is_near_the_whole(monkeypatch):
    noise = np.random.default_rng(2).normal(0, 10, (1500, 2000, 3))
    image = Image.fromarray((40 + 0.6 * np.asarray(make_image((2000, 1500), seed=9)) + noise).astype(np.uint8))
    for resize in ("area", "lanczos"):
        fast = square(image, "JPEG", Transform(32, resize=resize), quality=90)
        monkeypatch.setattr("datamodules.decode.DRAFT", 1000)
        slow = square(image, "JPEG", Transform(32, resize=resize), quality=90)
        monkeypatch.undo()
        assert np.abs(fast - slow).mean() < 0.5 and np.abs(fast - slow).max() <= 3


def test_small_images_are_enlarged_only_if_asked():
    small = make_image((20, 30))
    with pytest.raises(BadImageError, match="is 20x30 pixels, smaller than 32x32"):
        square(small)
    with pytest.raises(BadImageError, match="smaller than the crop of 25"):
        square(small, transform=Transform(16, crop=25))
    for resize in ("area", "lanczos"):
        assert square(small, transform=Transform(32, upscale=True, resize=resize)).shape == (3, 32, 32)


def test_options_out_of_range_are_refused():
    for options in (
        {"size": 0},
        {"size": 5000},
        {"channels": 2},
        {"resize": "nearest"},
        {"crop": 0},
        {"background": 256},
    ):
        with pytest.raises(ValueError, match=str(next(iter(options.values())))):
            Transform(**{"size": 32, **options})
