"""The options that commands share: one declaration, one vocabulary, the names of before."""

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import stopped
from PIL import Image

from diffusion_lit.commands.edit import TASKS
from diffusion_lit.commands.evaluate import evaluate
from diffusion_lit.commands.main import _renamed, function_parser
from diffusion_lit.commands.options import DrawOptions
from diffusion_lit.commands.sample import sample
from diffusion_lit.diffusion.generate import Sampling
from diffusion_lit.modules.labels import parse_labels


def test_every_command_that_draws_has_the_same_options():
    shared = {one.name for one in fields(DrawOptions)}
    assert shared >= {one.name for one in fields(Sampling)} - {"clip_options"}
    for function in (sample, evaluate, *TASKS.values()):
        defaults = vars(function_parser(function, ["x"]).get_defaults())
        assert shared < defaults.keys(), function
        assert str(defaults["out"] or "runs/edits").startswith("runs/"), function
    assert all("devices" in vars(function_parser(each, ["x"]).get_defaults()) for each in (sample, evaluate))


def test_names_of_before_are_accepted_where_the_new_one_is_known():
    assert _renamed("--label=3", {"labels": str}) == "--labels=3"
    assert _renamed("--accelerator", {"device": str}) == "--device"
    assert _renamed("--accelerator", {"labels": str}) == "--accelerator"
    assert _renamed("label", {"labels": str}) == "label"


def test_classes_go_by_number_or_name():
    names = ["Bag", "Ankle boot", "T-shirt, top"]
    assert parse_labels("Ankle boot, 0", 3, 3, names).tolist() == [1, 0, 1]
    assert parse_labels("T-shirt, top", 2, 3, names).tolist() == [2, 2]
    with pytest.raises(ValueError, match="'Boot'.*0 to 2.*Ankle boot"):
        parse_labels("Boot", 3, 3, names)


def test_a_pretrained_model_is_evaluated(lightning, tmp_path, capsys):
    pytest.importorskip("diffusers")
    from diffusers import DDPMScheduler
    from helpers.pretrained_models import save_unet

    save_unet(tmp_path / "plain", DDPMScheduler())
    (tmp_path / "images").mkdir()
    for index in range(12):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{index}.png")
    few = ["--num_samples=4", "--num_blocks=2", "--num_steps=2", "--extractor=pixels", "--device=cpu"]
    model = ["evaluate", "--pretrained", "plain", *few]
    assert "--data" in stopped(capsys, lightning, *model)
    data = ["--data=datamodules.ImageFolder", "--data.root=images", "--data.image_size=8", "--data.batch_size=4"]
    lightning(*model, *data)
    report = json.loads(Path("runs/evaluations/report.json").read_text())
    assert report["checkpoint"]["file"] == "plain" and report["checkpoint"]["weights"] == "as published"
    lightning(*model, *data, "--batch_size=3", "--accelerator=cpu", "--out=again.json")
    again = json.loads(Path("again.json").read_text())
    assert again["checkpoint"]["sha256"] == report["checkpoint"]["sha256"]
    first, second = (one["results"][0]["references"]["train"]["figures"] for one in (report, again))
    assert second["fd_pixels"]["blocks"] == pytest.approx(first["fd_pixels"]["blocks"], rel=1e-4)
