"""Tensors to bytes, grids, strips and animations."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_lit.diffusion.images import to_uint8
from diffusion_lit.diffusion.models import LatentModel
from diffusion_lit.report.images import (
    Cell,
    StepRecorder,
    gif_bytes,
    grid_image,
    labelled_grid,
    png_bytes,
    titled_grid,
    wrapped,
)


def test_bytes_are_rounded_and_clipped():
    values = torch.tensor([-2.0, -1.0, -1 + 2 / 255, 0.0, 1.0, 3.0, 0.5])
    assert to_uint8(values).tolist() == [0, 0, 1, 128, 255, 255, 191]
    every = torch.arange(256)
    assert torch.equal(to_uint8(every / 127.5 - 1), every.to(torch.uint8))


def test_a_grid_holds_its_images_row_by_row():
    images = torch.linspace(-1, 1, 6)[:, None, None, None].expand(6, 1, 4, 4)
    grid = np.asarray(grid_image(images, columns=3, scale=1))[..., 0]
    tiles = [
        grid[1 + 5 * row : 5 + 5 * row, 1 + 5 * column : 5 + 5 * column] for row in range(2) for column in range(3)
    ]
    for tile, image in zip(tiles, to_uint8(images), strict=True):
        assert (tile == image[0].numpy()).all()
    for channels in (1, 2, 3, 4):
        assert grid_image(torch.zeros(2, channels, 4, 4), columns=2).size == (152, 80)  # 16 times 4 pixels, 8 between


def test_an_animation_loops_and_rests_at_its_end():
    shades = (0, 80, 160, 240)
    gif = Image.open(io.BytesIO(gif_bytes([Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in shades])))
    assert gif.n_frames == 4
    assert gif.info["loop"] == 0
    durations = []
    for frame, shade in enumerate(shades):
        gif.seek(frame)
        durations.append(gif.info["duration"])
        assert abs(gif.convert("RGB").getpixel((4, 4))[0] - shade) < 10
    assert durations == [1000, 1000, 1000, 2500]


def test_the_recorder_shows_noise_at_unit_variance_above_the_prediction():
    recorder = StepRecorder(keep=2)
    for step, sigma in enumerate((10.0, 1.0, 0.1)):
        x0_hat = torch.full((5, 1, 4, 4), 0.5)
        recorder(step, x0_hat * (1 + sigma**2) ** 0.5, x0_hat, torch.tensor(sigma))
    assert recorder.x[0].shape[0] == 2
    strip = np.asarray(recorder.strip(columns=3).convert("L"))
    assert recorder.strip(columns=2).width < recorder.strip(columns=3).width
    tiles = strip[strip.shape[0] - 2 * 72 :, strip.shape[1] - 3 * 72 :]  # without headings
    assert set(np.unique(tiles)) == {191, 255}  # both rows are 0.5 once x is scaled by 1 / sqrt(1 + sigma^2)
    assert len(recorder.frames(columns=2)) == 4


def test_png_round_trip():
    image = grid_image(torch.rand(1, 3, 8, 8) * 2 - 1, columns=1)
    assert (np.asarray(Image.open(io.BytesIO(png_bytes(image)))) == np.asarray(image)).all()


def test_a_titled_grid_leaves_the_ends_of_short_rows_blank():
    rows = [[torch.zeros(1, 8, 8)] * 3, [torch.zeros(1, 8, 8)] * 2]
    figure = np.asarray(titled_grid(rows, ["cat", "a name that is too long for a single line"], ["1", "2", "3"]))
    body = figure[-140:, -208:]  # tiles of 64 pixels, 4 between them
    grey = (body == 128).all(-1)
    assert grey[4:68, 4:68].all() and grey.sum() == 5 * 64 * 64
    assert (body[72:, 140:] == 255).all()
    assert (figure[:, : figure.shape[1] - 208] < 100).any()  # the names
    assert titled_grid(rows).size == (208, 140)


@pytest.mark.parametrize(("scale", "side"), [(None, 256), (3, 24)])
def test_each_sample_has_a_gif_of_its_own_that_ends_as_the_sample(scale, side):
    recorder = StepRecorder(keep=5)
    final = torch.linspace(-1, 1, 6 * 64).view(6, 1, 8, 8)
    for sigma in (2.0, 1.0):
        recorder(0, final * 0.1 + sigma, final, torch.tensor(sigma))
    gifs = [Image.open(io.BytesIO(gif)) for gif in recorder.animations(scale)]
    assert len(gifs) == 5
    for index, gif in enumerate(gifs):
        assert gif.n_frames == 3 and gif.size == (side, side)
        gif.seek(2)
        pixels = np.asarray(gif.convert("L"))[:: side // 8, :: side // 8].astype(int)
        assert abs(pixels - to_uint8(final[index])[0].numpy().astype(int)).max() <= 1
    assert recorder.strip(count=2).height < recorder.strip(count=4).height < recorder.strip(count=5).height
    assert recorder.strip().size == recorder.strip(count=4).size


def test_a_long_heading_is_broken_into_lines_and_what_is_left_out_is_marked():
    prompt = "an oil painting of a snowy mountain village with many small houses and a church"
    assert wrapped(prompt, 20).split("\n") == ["an oil painting of a", "snowy mountain", "village with ..."]
    assert wrapped("start 3\nsigma 40", 20) == "start 3\nsigma 40" and wrapped("", 20) == ""
    # Words beside a row and above a column stay within its cell: between two rows nothing is written.
    image = torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1).expand(3, 8, 8)  # red, unlike words
    figure = np.asarray(labelled_grid([[Cell(image)] * 2] * 2, [prompt] * 2, [prompt] * 2)).astype(int)
    red = figure[..., 0] - figure[..., 1] > 200
    rows, left = np.flatnonzero(red.any(1)), int(np.flatnonzero(red.any(0))[0])
    end = int(np.argmax(np.diff(rows)))
    beside = (figure < 128).all(-1)[:, : left - 2]
    assert beside.any() and not beside[rows[end] + 3 : rows[end + 1] - 3].any()


@pytest.mark.parametrize(("keep", "rows"), [(3, [0, 1, 2]), ([0, 4, 9], [0, 4, 9]), (range(10), list(range(10)))])
def test_a_recorder_keeps_the_rows_it_is_told_of_latents_too(keep, rows):
    x, x0_hat, decoded = torch.randn(10, 1, 2, 2), torch.randn(10, 1, 2, 2), []

    def decode(z):
        decoded.append(len(z))
        return 2 * z

    for recorder, times in ((StepRecorder(keep), 1), (StepRecorder(keep), 2)):
        seen = recorder if times == 1 else LatentModel._decoded(SimpleNamespace(decode=decode), recorder)
        seen(0, x, x0_hat, torch.tensor(1.0))
        assert torch.allclose(recorder.x[0], times * x[rows]) and torch.equal(recorder.x0_hat[0], times * x0_hat[rows])
    assert decoded == [len(rows), len(rows)]
