"""What `edit denoise`, `edit guidance` and the reading of drawings show, on checkpoints that need no training."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import stopped
from PIL import Image

from diffusion_lit import editing, load_module
from diffusion_lit.commands.edit_options import ImageOptions
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
