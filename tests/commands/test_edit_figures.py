"""What `edit denoise`, `edit guidance`, drawings and the table of `sample` show, on checkpoints that are there."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.runs import stopped
from PIL import Image

from diffusion_lit import editing, load_module
from diffusion_lit.commands.edit_draw import _sizes
from diffusion_lit.commands.edit_options import ImageOptions, inverted
from diffusion_lit.diffusion.analytic import GaussianMixtureDenoiser
from diffusion_lit.diffusion.generate import Sampling
from diffusion_lit.diffusion.images import to_uint8

KEPT = Path(__file__).resolve().parents[1] / "data" / "checkpoints_of_0.1.0.zip"


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    zipfile.ZipFile(KEPT).extractall(folder)
    return folder


@pytest.fixture
def edit(kept, lightning):
    """Runs a task and returns its record: `edit("denoise", "edm", ...)`."""

    def run(task, name, *options):
        lightning("edit", task, "--ckpt_path", kept / f"{name}.ckpt", "--device=cpu", "--out=out", *options)
        return json.loads(Path("out/record.json").read_text())

    return run


def pixels(name):
    return torch.from_numpy(np.asarray(Image.open(f"out/{name}.png")).astype(int))


@pytest.mark.medium
def test_the_steps_of_denoising_are_shown_beside_its_results(edit, kept, capsys):
    model = load_module(kept / "edm.ckpt")
    image = ImageOptions(image="flower").read(model)
    sampling = editing.strided(model.sampling, model.denoiser.scaling).replace(sampler="ddim", num_steps=20)
    grid = sampling.sigmas(model.denoiser.scaling).tolist()
    start = grid[8]
    options = ["--image=flower", "--sampler=ddim", "--num_steps=20", f"--sigmas=[{start}]"]
    plain = edit("denoise", "edm", *options)
    height = Image.open("out/figure.png").height
    record = edit("denoise", "edm", *options, "--shown_steps=[5, 8, 9]")
    assert record["psnr"] == plain["psnr"] and list(record["shown_steps"]) == ["5", "8", "9"]
    assert set(record["files"]) - set(plain["files"]) == {f"step_{k}_of_{start:g}.png" for k in (8, 9)}  # 5 is above
    figure = Image.open("out/figure.png")
    assert figure.height < height / 2 and figure.width > 3 * figure.height  # one row of seven
    x = editing.forward(model, image, start)
    x0_hat = editing.denoise_once(model, x, start, sampling=sampling)
    stepped = x0_hat + grid[9] / grid[8] * (x - x0_hat)  # DDIM by hand
    for step, state in ((8, x), (9, stepped)):
        expected = to_uint8(state / (1 + grid[step] ** 2) ** 0.5)[0, 0].int()
        assert (pixels(f"step_{step}_of_{start:g}") - expected).abs().max() <= 1
    between = (grid[8] + grid[9]) / 2
    record = edit("denoise", "edm", *options[:-1], f"--sigmas=[{between}]", "--shown_steps=[8, 9]")
    assert [name for name in record["files"] if name.startswith("step_")] == [f"step_9_of_{between:g}.png"]
    assert edit("denoise", "latent", *options, "--shown_steps=[19]")["shown_steps"]
    for wrong, why in (([20], "no step 20 in --shown_steps"), ([3], "--shown_steps [3] lie above every noise level")):
        assert why in stopped(capsys, edit, "denoise", "edm", *options, f"--shown_steps={wrong}")


def test_guidance_draws_several_samples_of_each_class(edit, kept, capsys):
    options = ["--cfg_scales=[1, 3]", "--labels=3,7", "--num_steps=2", "--seed=4"]
    edit("guidance", "edm", *options)
    single, height = [pixels(f"cfg_3_{row}") for row in (0, 1)], Image.open("out/figure.png").height
    record = edit("guidance", "edm", *options, "--num_samples=3")
    assert record["labels"] == ["3", "3", "3", "7", "7", "7"] and record["seeds"] == [4, 5, 6, 4, 5, 6]
    assert Image.open("out/figure.png").height > 2.5 * height
    drawn = [pixels(f"cfg_3_{row}") for row in range(6)]
    assert (drawn[0] - single[0]).abs().max() <= 1 and (drawn[3] - single[1]).abs().max() <= 1
    model = load_module(kept / "edm.ckpt")
    sampling = model.sampling.replace(num_steps=2, cfg_scale=3.0)
    for row, seed in enumerate(record["seeds"]):
        expected = to_uint8(model.generate([seed], torch.tensor([int(record["labels"][row])]), sampling))[0, 0].int()
        assert (drawn[row] - expected).abs().max() <= 1
    assert "num_samples is 0" in stopped(capsys, edit, "guidance", "edm", *options, "--num_samples=0")


def model_of(images, sizes=(1, 8, 8)):
    """An exact model of some images."""
    net = GaussianMixtureDenoiser(torch.ones(len(images)), images, torch.full((len(images),), 0.01))
    net.scaling = SimpleNamespace(sigma_max=80.0)
    same = SimpleNamespace(image_shape=sizes, x_shape=sizes, denoiser=net, num_classes=0, decode=lambda x: x)
    return SimpleNamespace(**vars(same), sampling=Sampling())


def test_a_drawing_in_black_on_white_is_recognised(edit, capsys, tmp_path):
    strokes = torch.full((3, 1, 8, 8), -1.0)  # bright on dark, as digits are
    strokes[0, 0, 2:6, 3] = strokes[1, 0, 3, 2:6] = strokes[2, 0, 2:6, 2:6] = 1.0
    grey = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    drawing = -strokes[:1]
    said = inverted(model_of(strokes), drawing)
    assert "bright at its border (mean 1.00 in [-1, 1])" in said and "dark there (-1.00)" in said
    assert "--negative_image true turns it" in said
    assert not inverted(model_of(strokes), strokes[:1]) and not inverted(model_of(strokes), grey[:1])
    assert not inverted(model_of(-strokes), drawing) and not inverted(model_of(grey), drawing)
    Image.new("L", (8, 8), 255).save(tmp_path / "drawing.png")
    options = ImageOptions(image=str(tmp_path / "drawing.png"))
    assert (options.read(model_of(strokes)) == 1).all()  # taken as it is
    assert "drawing.png is bright at its border" in capsys.readouterr().err
    assert (replace(options, negative_image=True).read(model_of(strokes)) == -1).all()
    assert not capsys.readouterr().err
    for family in ("edm", "ddpm", "latent"):  # barely trained: nothing is said, and nothing falls
        edit("img2img", family, "--image=drawing.png", "--starts=[1]", "--num_steps=2")
        assert "border" not in capsys.readouterr().err


def test_the_same_samples_by_several_numbers_of_steps_stand_side_by_side(kept, lightning, capsys):
    draw = [
        "sample",
        "--ckpt_path",
        kept / "edm.ckpt",
        "--device=cpu",
        "--out=o",
        "--num_samples=4",
        "--labels=3,3,7,7",
    ]
    lightning(*draw, "--num_steps=2,4")
    assert "by each number of steps, side by side: o/table.png" in capsys.readouterr().out
    assert sorted(str(path) for path in Path("o").iterdir()) == ["o/steps_2", "o/steps_4", "o/table.png"]
    table = np.asarray(Image.open("o/table.png").convert("L"))
    for column, count in enumerate((2, 4)):
        made = np.load(f"o/steps_{count}/samples.npz")["arr_0"]
        lightning(*draw, f"--num_steps={count}", "--out=alone")
        assert (np.load("alone/samples.npz")["arr_0"] == made).all()
        cells = table[-2 * 68 :, table.shape[1] - (2 - column) * 68 :][:, :64]  # of 64 pixels with borders of 4
        for row, index in enumerate((0, 2)):
            assert (cells[68 * row : 68 * row + 64 : 8, ::8] == made[index, :, :, 0]).all()
    lightning(*draw[:-1], "--num_steps=2")
    assert not Path("o/table.png").exists()
    lightning(*draw[:-1], "--num_steps=2,3")
    assert Image.open("o/table.png").height > 4 * 64  # a row per seed
    for wrong, why in (("2,x", "--num_steps 2,x is not a list of numbers"), ("2,0", "num_steps is 0")):
        assert why in stopped(capsys, lightning, *draw, f"--num_steps={wrong}")


def test_prompts_stand_against_steps(lightning, tmp_path):
    pytest.importorskip("diffusers")
    from helpers.pretrained_models import save_if

    save_if(tmp_path / "if")
    prompts = ["--prompt", "a rocket ship", "--prompt", "two cats and a dog"]
    lightning("sample", "--pretrained=if", *prompts, "--num_samples=2", "--num_steps=2,3,4", "--device=cpu", "--out=o")
    table = Image.open("o/table.png")
    assert table.width > 3 * 64 + 80 and 2 * 64 < table.height < 3 * 64  # two rows beside their names
    assert np.load("o/steps_3/samples.npz")["arr_0"].shape[0] == 2


@pytest.mark.parametrize("channels", [1, 3])
def test_a_hybrid_is_shown_pixel_for_pixel_and_ever_smaller(channels):
    images = torch.rand(2, channels, 256, 256) * 2 - 1
    figure = np.asarray(_sizes(images, "3 from near, 8 from afar", ["seed 0", "seed 1"]))
    for index, image in enumerate(to_uint8(images)):
        left = 8 + index * 272  # 256 pixels and a border of 8 on each side
        assert (figure[52:308, left : left + 256] == image.permute(1, 2, 0).numpy()).all()
        assert (figure[316:444, left : left + 64] == 255).all()  # half the size, in the middle
        assert (figure[316:444, left + 64 : left + 192] < 255).any()
    assert figure.shape == (44 + 8 * 5 + 256 + 128 + 64 + 32, 544, 3)
