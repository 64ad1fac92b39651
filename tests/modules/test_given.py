"""Modules that are given an image: keyed draws, what samples are given, and every command on such a model."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.runs import FIT, LAST, read, same_training, stopped
from PIL import Image

from datamodules import Digits
from diffusion_lit.diffusion import Box, DegradedImage, PairedImage, Pixelate
from diffusion_lit.modules import EDM
from diffusion_lit.modules.load import load_data, load_module
from diffusion_lit.nets import UNet

CONDITION = "--model.init_args.condition"
GIVEN = [
    "--model.init_args.net.init_args.condition_channels=2",
    f"{CONDITION}=diffusion_lit.diffusion.DegradedImage",
    f"{CONDITION}.init_args.degradation=diffusion_lit.diffusion.Pixelate",
    f"{CONDITION}.init_args.degradation.init_args.num_steps=1",
    "--data.init_args.use_labels=false",
    "--model.init_args.sampling.num_steps=2",
]
BOX = [*GIVEN, f"{CONDITION}.init_args.degradation=diffusion_lit.diffusion.Box", f"{CONDITION}.init_args.steps=[2, 16]"]
BOX.remove(f"{CONDITION}.init_args.degradation.init_args.num_steps=1")
BOX.remove(f"{CONDITION}.init_args.degradation=diffusion_lit.diffusion.Pixelate")


def module(condition=None, condition_channels=2):
    condition = condition or DegradedImage(Box(8), steps=(2, 8), dropout=0.4)
    net = UNet(1, 8, 0, 16, (1,), 1, condition_channels=condition_channels)
    return EDM(net, condition=condition)


def make_images(count, seed=1):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_network_must_have_room_for_the_condition():
    with pytest.raises(ValueError, match="condition_channels 3, but the condition .DegradedImage. needs 2"):
        module(condition_channels=3)
    with pytest.raises(ValueError, match="condition_channels 2, but the condition .none. needs 0"):
        EDM(UNet(1, 8, 0, 16, (1,), 1, condition_channels=2))
    with pytest.raises(ValueError, match="there is none: give it data"):
        module().generate([0])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_take_their_rows_of_the_conditions_of_the_global_batch(world):
    images, key = make_images(32), ("train", 0, 1, 2)
    whole = module().training_condition(images, None, (1, 0), *key)
    dropped = whole.flatten(1).abs().amax(1) == 0
    assert 4 < int(dropped.sum()) < 22, "some are the null condition"
    assert len({float(row[1].mean()) for row in whole[~dropped]}) > 5, "holes of several sizes"
    for rank in range(world):
        rows = slice(rank, None, world)
        assert torch.equal(module().training_condition(images[rows], None, (world, rank), *key), whole[rows])
    assert not torch.equal(module().training_condition(images, None, (1, 0), "train", 0, 1, 3), whole)


def test_held_out_images_and_samples_have_conditions_of_their_own_whatever_their_batch():
    images, index = make_images(6), torch.arange(60, 66)
    whole = module().held_out_condition(images, None, index, "val")
    parts = [module().held_out_condition(images[i : i + 1], None, index[i : i + 1], "val") for i in range(6)]
    assert torch.equal(torch.cat(parts), whole) and whole.flatten(1).abs().amax(1).min() > 0
    data = Digits()
    data.setup("test")
    one = module()
    one.give(data)
    count = len(data.reference_images("test"))
    seeds = [3, 0, count + 3]
    originals, pairs = one.originals(seeds)
    expected = torch.as_tensor(data.reference_images("test")[3]).float() / 127.5 - 1
    assert pairs is None and torch.equal(originals[0], expected) and torch.equal(originals[2], expected)
    conditions = one.conditions(seeds)
    assert not torch.equal(conditions[0], conditions[2]), "another hole for another seed"
    assert torch.equal(one.conditions([0])[0], conditions[1])
    assert one.told() == "sample with seed s is given it degraded by Box, image s of the test split"


def test_an_empty_test_split_gives_the_images_there_are():
    images = {"train": torch.full((2, 1, 8, 8), 9, dtype=torch.uint8), "val": torch.zeros(1, 1, 8, 8).byte()}
    images["test"] = images["val"][:0]
    data, one = SimpleNamespace(reference_images=images.get), module()
    one.give(data)
    assert one.source().split == "val" and one.generate([0, 1]).shape == (2, 1, 8, 8)
    images["val"] = images["test"]
    assert one.told().endswith("of the train split")


def test_the_loss_is_that_of_the_condition_and_of_the_pair():
    pair, image = make_images(4, seed=2), make_images(4)
    one = module(PairedImage(channels=1, dropout=0.0))
    one._trainer = SimpleNamespace(world_size=1, global_rank=0, current_epoch=0)
    seen = []
    one.denoiser.net.register_forward_pre_hook(lambda net, args, kwargs: seen.append(kwargs), with_kwargs=True)
    one.log_step = lambda *args: None
    one.training_step({"image": image, "given": pair}, 0)
    assert torch.equal(seen[0]["condition"], torch.cat([pair, torch.ones(4, 1, 8, 8)], 1))
    with pytest.raises(ValueError, match="PairedFolder"):
        one.training_step({"image": image}, 0)


def test_guidance_needs_a_null_condition_that_was_trained(lightning, capsys):
    untrained = [*GIVEN, f"{CONDITION}.init_args.dropout=0"]
    said = stopped(capsys, lightning, *FIT, *untrained, "--model.init_args.sampling.cfg_scale=2")
    assert "condition's dropout is 0" in said and "cfg_scale 2" in said


@pytest.mark.medium
def test_a_run_of_random_masks_goes_on_bit_for_bit_in_the_middle_of_an_epoch(lightning):
    lightning(*FIT, *BOX, "--name=unbroken")
    lightning(*FIT, *BOX, "--trainer.max_steps=3", "--trainer.limit_val_batches=0")
    lightning(*FIT, *BOX, "--ckpt_path=last")
    assert same_training(read(LAST), read("runs/unbroken/version_0/checkpoints/last.ckpt"))


@pytest.mark.medium
def test_every_command_works_on_such_a_model(lightning, capsys):
    images = ["--sample_grid.every=1", "--sample_grid.columns=2", "--trajectory.every=1", "--trajectory.count=1"]
    loss = ["--loss_by_noise_level.batches=1", "--sample_grid.rows=2"]
    lightning(*FIT, *GIVEN, *images, *loss)
    run = LAST.parent.parent
    for name in ("samples", "trajectory", "given"):
        assert list((run / name).glob("step_0000006.*")), name
    few = ["--device=cpu", "--num_samples=3", "--seed=2"]
    lightning("sample", "--ckpt_path", LAST, "--out=a", *few, "--batch_size=2", "--cfg_scale=1.5")
    told = "sample with seed s is given it degraded by Pixelate, image s of the test split"
    assert told in capsys.readouterr().out
    assert np.asarray(Image.open("a/given.png")).std() > 5
    lightning("export", "--ckpt_path", LAST, "--out=model")
    lightning("sample", "--ckpt_path=model", "--out=b", *few, "--cfg_scale=1.5")
    drawn = [np.load(f"{name}/samples.npz")["arr_0"] for name in "ab"]
    assert np.array_equal(*drawn)
    # In Python, by hand: image 2 of the test split at half its size, and the sampler of the checkpoint.
    model, data = load_module(LAST), load_data(LAST)
    data.setup("test")
    given = torch.as_tensor(data.reference_images("test")[2:5]).float() / 127.5 - 1
    condition = torch.cat([Pixelate(1)(given, 1, torch.zeros(3, 1, 8, 8)), torch.ones(3, 1, 8, 8)], 1)
    made = model.generate([2, 3, 4], sampling=model.sampling.replace(cfg_scale=1.5), condition=condition)
    assert abs(made.mul(127.5).add(127.5).clamp(0, 255).permute(0, 2, 3, 1).numpy() - drawn[0]).max() <= 1
    lightning(
        *["evaluate", "--ckpt_path", LAST, "--extractor=pixels", "--num_samples=4", "--num_blocks=1", "--out=e.json"],
        *["--reference=test", "--device=cpu"],
    )
    assert json.loads(Path("e.json").read_text())["samples"]["given"] == told
    edit = ["--device=cpu", "--num_samples=1", "--out=out", "--ckpt_path", LAST]
    lightning("edit", "super_resolve", *edit, "--factor=2")
    record = json.loads(Path("out/record.json").read_text())
    assert record["model_is_given_the_image"] and record["resamplings"] == 1 and record["mean_error"] < 1e-5
    lightning("edit", "super_resolve", *edit, "--factor=2", "--noise=0.1")
    assert not json.loads(Path("out/record.json").read_text())["model_is_given_the_image"], "it knows none with noise"
    lightning("edit", "inpaint", *edit, "--resamplings=1")
    assert not json.loads(Path("out/record.json").read_text())["model_is_given_the_image"]
    said = stopped(capsys, lightning, "evaluate", "--ckpt_path", LAST, "--likelihood", "--extractor=pixels")
    assert "--likelihood is that of images alone" in said
    said = stopped(capsys, lightning, *["sample", "--ckpt_path", LAST, "--data_root=nowhere", "--out=c"])
    assert "nowhere" in said
    said = stopped(capsys, lightning, *["sample", "--ckpt_path", LAST, "--size=16x16", "--out=c"])
    assert "as large as those it is given" in said
