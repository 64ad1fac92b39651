"""The studies of data: what they measure, write and refuse."""

import math
import re

import numpy as np
import pytest
import torch
from helpers.data_fixtures import write_class_folders, write_mnist
from PIL import Image

from experiments import look_at_data
from experiments.benchmarks import data_throughput


def test_statistics_are_those_of_numpy():
    images = (
        np.random.default_rng(0).integers(0, 256, (5000, 3, 4, 4), dtype=np.uint8) // np.array([1, 2, 3])[:, None, None]
    )
    found = look_at_data.statistics(images.astype(np.uint8))
    values = images / 127.5 - 1
    assert np.allclose(found.mean, values.mean((0, 2, 3)), atol=1e-6)
    assert np.allclose(found.std, values.std((0, 2, 3)), atol=1e-6)
    assert math.isclose(found.sigma_data, math.sqrt(values.var((0, 2, 3)).mean()), rel_tol=1e-5)
    same = look_at_data.statistics(torch.from_numpy(images.astype(np.uint8)))
    assert same == found


def test_suggestion_is_edms_own_at_its_own_data_and_scales():
    assert look_at_data.suggest(0.5, 32) == look_at_data.suggest(0.5, 64) == (0.5, -1.2, 1.2)
    assert math.isclose(look_at_data.suggest(1.0, 64).P_mean, -1.2 + math.log(2))
    assert math.isclose(look_at_data.suggest(0.5, 256).P_mean, -1.2 + math.log(4))
    with pytest.raises(ValueError, match="All values of the data are alike"):
        look_at_data.suggest(0.0, 32)


def test_look_at_data_reads_a_config_and_takes_overrides(tmp_path, capsys):
    write_mnist(tmp_path / "data")
    (tmp_path / "x.yaml").write_text(
        "trainer: {max_steps: 1}\nmodel: {whatever: true}\n"
        f"data:\n  class_path: datamodules.MNIST\n  init_args: {{root: {tmp_path}/data, batch_size: 16}}\n"
    )
    args = ["--config", f"{tmp_path}/x.yaml", "--rows=2", "--columns=4", f"--out={tmp_path}/out"]
    look_at_data.main([*args, "--data.init_args.image_size=28"])
    told = capsys.readouterr().out
    assert "MNIST, 108 training and 12 validation images of 1x28x28" in told and "P_mean" in told
    grid = Image.open(tmp_path / "out" / "grid.png")
    assert grid.width == 4 * 56 + 5 and grid.height == 2 * 56 + 3


def test_look_at_data_needs_no_config(tmp_path, capsys):
    write_class_folders(tmp_path / "data", ["a", "b"], per_class=10, parts=())
    (tmp_path / "x.yaml").write_text("data: {class_path: datamodules.ImageFolder, init_args: {image_size: 16}}")
    look_at_data.main(
        [f"--config={tmp_path}/x.yaml", f"--data.init_args.root={tmp_path}/data", "--data.init_args.batch_size=4",
         f"--data.init_args.cache_dir={tmp_path}/cache", f"--out={tmp_path}/out"]
    )  # fmt: skip
    told = re.search(r"ImageFolder, (\d+) training and (\d+) validation images of 3x16x16", capsys.readouterr().out)
    assert told and int(told[2]) >= 1 and 10 <= int(told[1]) + int(told[2]) <= 19


@pytest.mark.parametrize("text", [None, "a: [", "trainer: {}", "data: 3", ""])
def test_look_at_data_refuses_other_files(tmp_path, capsys, text):
    if text is not None:
        (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(SystemExit):
        look_at_data.main([f"--config={tmp_path}/x.yaml"])
    assert "x.yaml" in capsys.readouterr().err


def test_look_at_data_tells_what_is_missing(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("data: {class_path: datamodules.ImageFolder, init_args: {root: nowhere}}")
    with pytest.raises(SystemExit, match="2"):
        look_at_data.main([f"--config={tmp_path}/x.yaml"])
    assert "look_at_data: nowhere does not exist" in capsys.readouterr().err


def test_both_loaders_of_a_comparison_give_the_same_images():
    images = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8)
    data = data_throughput.InMemory(images, 128, random_flip=False)
    theirs = data_throughput.PerSample(images, data_throughput.usual_transform(3, random_flip=False))
    batch = next(iter(data.train_dataloader()))
    for image, label, index in zip(batch["image"], batch["label"], batch["index"], strict=True):
        other, number = theirs[int(index)]
        assert torch.allclose(image, other, atol=1e-6) and int(label) == number


@pytest.mark.slow
def test_whole_batches_reach_their_targets():
    found = data_throughput.data_throughput(seconds=8)
    assert all(found[name] >= target for name, target in data_throughput.TARGETS.items()), found


@pytest.mark.slow
def test_throughput_prints_a_table(capsys, monkeypatch):
    monkeypatch.setattr(data_throughput, "SLICES", 1)
    monkeypatch.setattr(data_throughput, "train_rate", lambda seconds: 100.0)
    data_throughput.data_throughput(seconds=0.01, images=300, files=160)
    told = capsys.readouterr().out
    assert told.count("\n| ") == 10 and "| folder of JPEGs, 3x64x64, mirrored, cached | whole batches |" in told
