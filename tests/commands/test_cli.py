"""The command, run in this process: wrong input of every kind, resume, and sampling from a checkpoint alone."""

import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.runs import DIGITS, TINY, stopped
from PIL import Image

NO_IMAGES = ["--sample_grid.every=0", "--trajectory.every=0", "--loss_by_noise_level.batches=0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which a tiny digits model was trained for two steps."""
    from diffusion_lit.commands.main import main

    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["fit", "--config", str(DIGITS), *TINY, *NO_IMAGES, "--trainer.max_steps=2"])
    return folder


@pytest.fixture
def checkpoint(trained, lightning, tmp_path):
    """The checkpoint of a copy of that run in the current folder."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path / "runs/edm_digits/version_0/checkpoints/last.ckpt"


def test_help_needs_nothing_and_lists_every_command(lightning, capsys):
    for words in ([], ["--help"], ["-h"]):
        lightning(*words)
        text = capsys.readouterr().out
        for command in ("fit", "validate", "test", "predict", "sample", "evaluate"):
            assert f"\n  {command} " in text


def test_the_progress_bar_is_the_same_whatever_is_installed(lightning, monkeypatch, capsys):
    from lightning.pytorch.trainer.connectors import callback_connector

    monkeypatch.setattr(callback_connector, "_RICH_AVAILABLE", True)
    lightning("fit", "--config", DIGITS, *TINY, "--trainer.max_steps=2", "--trainer.enable_progress_bar=true")
    said = "".join(capsys.readouterr())
    assert "Epoch 0:" in said and "val/loss=" in said and "v_num" not in said


def test_the_progress_bar_is_drawn_twice_a_second_and_at_the_end(lightning, monkeypatch):
    from lightning.pytorch.callbacks import TQDMProgressBar

    drawn, draw = [], TQDMProgressBar.on_train_batch_end
    monkeypatch.setattr(TQDMProgressBar, "on_train_batch_end", lambda *args: (drawn.append(args[-1]), draw(*args)))
    seconds = iter([10.0, 10.1, 10.4, 10.6, 10.7, 11.05, 11.2, 11.3])
    clock = SimpleNamespace(monotonic=lambda: next(seconds), perf_counter=time.perf_counter)
    monkeypatch.setattr("diffusion_lit.callbacks.progress.time", clock)
    lightning("fit", "--config", DIGITS, *TINY, "--trainer.max_steps=8", "--trainer.enable_progress_bar=true")
    assert drawn == [0, 3, 6, 7]


def test_a_run_leaves_everything_in_its_folder(lightning, tmp_path, capsys):
    lightning("fit", "--config", DIGITS, *TINY, "--trainer.max_steps=3")
    run = tmp_path / "runs/edm_digits/version_0"
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["runs"]
    for path in ("config.yaml", "checkpoints/last.ckpt", "samples/step_0000003.png", "trajectory/step_0000003.png"):
        assert (run / path).is_file(), path
    assert Image.open(run / "trajectory/step_0000003.gif").n_frames > 1
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(run), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    assert {"samples", "trajectory/strip", "trajectory/animation"} <= set(tags["images"])
    assert {"val/loss", "loss_by_sigma/1"} <= set(tags["scalars"])
    assert "hp_metric" not in tags["scalars"]
    assert len(events.Scalars("val/loss")) == 1  # the table of HPARAMS adds no point to a curve
    content = events.PluginTagToContent("hparams")
    (start,) = (
        HParamsPluginData.FromString(one).session_start_info for tag, one in content.items() if "session_start" in tag
    )
    assert start.hparams["data.batch_size"].number_value == 16
    assert start.hparams["model.net.class_path"].string_value == "diffusion_lit.nets.UNet"
    assert start.hparams["trainer.max_steps"].number_value == 3
    (experiment,) = (
        HParamsPluginData.FromString(one).experiment for tag, one in content.items() if "experiment" in tag
    )
    figures = {metric.name.tag for metric in experiment.metric_infos}
    assert "val/loss" in figures <= set(tags["scalars"])
    said = capsys.readouterr()
    assert "checkpoints/last.ckpt" in said.out + said.err


def test_the_network_takes_its_shape_from_the_data(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    net = content["hyper_parameters"]["net"]["init_args"]
    assert (net["in_channels"], net["image_size"], net["num_classes"]) == (1, 8, 10)
    assert content["diffusion_lit"]["class_names"] == [str(digit) for digit in range(10)]


def test_sampling_needs_the_checkpoint_alone(lightning, checkpoint, tmp_path, capsys):
    (tmp_path / "elsewhere.ckpt").write_bytes(checkpoint.read_bytes())
    lightning(
        *["sample", "--ckpt_path", tmp_path / "elsewhere.ckpt", "--num_samples=20", "--labels=all", "--cfg_scale=1.5"],
        *["--sampler=heun", "--num_steps=3", "--seed=5", "--batch_size=7", "--out", tmp_path / "out", "--trajectory"],
    )
    arrays = np.load(tmp_path / "out/samples.npz")
    assert arrays["arr_0"].shape == (20, 8, 8, 1)
    assert arrays["arr_0"].dtype == np.uint8
    assert arrays["labels"].tolist() == [label for label in range(10) for _ in range(2)]
    grid, strip = Image.open(tmp_path / "out/grid.png"), Image.open(tmp_path / "out/trajectory.png")
    assert grid.height > 4 * (grid.width - 40)  # ten rows of two, and the classes' names
    assert strip.size[0] > 0
    assert Image.open(tmp_path / "out/trajectory.gif").n_frames >= 3
    assert strip.height < 9 * 70  # four samples of two rows, under headings
    singles = [Image.open(path) for path in (tmp_path / "out").glob("trajectory_*.gif")]
    assert len(singles) == 7  # the first batch, of at most 16
    assert {one.n_frames for one in singles} == {Image.open(tmp_path / "out/trajectory.gif").n_frames}
    assert {one.size for one in singles} == {(256, 256)}

    lightning(
        *[
            "sample",
            "--ckpt_path",
            checkpoint,
            "--num_samples=3",
            "--labels=0,0,1",
            "--cfg_scale=1.5",
            "--sampler=heun",
        ],
        *["--num_steps=3", "--seed=5", "--batch_size=64", "--out", tmp_path / "again"],
    )
    again = np.load(tmp_path / "again/samples.npz")
    assert np.abs(again["arr_0"].astype(int) - arrays["arr_0"][:3].astype(int)).max() <= 1
    assert again["labels"].tolist() == [0, 0, 1]


def test_samples_are_written_as_they_come_and_only_those_of_one_run_are_there(
    lightning, checkpoint, tmp_path, capsys, monkeypatch
):
    from diffusion_lit.commands import sample as command

    draw = ["sample", "--ckpt_path", checkpoint, "--num_steps=2", "--out=out"]
    lightning(*draw, "--num_samples=400", "--labels=all", "--batch_size=100", "--trajectory")
    said = capsys.readouterr().out
    assert "400 samples" in said and "grid.png (with 100 of them)" in said
    grid = Image.open("out/grid.png")
    assert max(grid.size) < 2100
    whole = np.load("out/samples.npz")["arr_0"]
    tiles = np.asarray(grid.convert("L"))[4:, grid.width - 680 :]  # ten by ten of 64 pixels with borders of 4
    for row, column in ((0, 0), (3, 7), (9, 9)):
        tile = tiles[68 * row : 68 * row + 64 : 8, 68 * column : 68 * column + 64 : 8]
        assert (tile == whole[40 * row + column, :, :, 0]).all()
    recorded = sorted(int(path.stem.split("_")[1]) for path in Path("out").glob("trajectory_*.gif"))
    assert len(recorded) == 16 and recorded[0] == 0 and recorded[-1] == 99  # of several classes
    gif = Image.open("out/trajectory_99.gif")
    gif.seek(gif.n_frames - 1)
    assert np.abs(np.asarray(gif.convert("L"))[::32, ::32].astype(int) - whole[99, :, :, 0]).max() <= 1

    lightning(*draw, "--num_samples=23", "--labels=all", "--batch_size=5")
    assert sorted(os.listdir("out")) == ["grid.png", "samples.npz"]
    again = np.load("out/samples.npz")
    assert np.bincount(again["labels"]).tolist() == [3, 3, 3, 2, 2, 2, 2, 2, 2, 2]
    assert np.abs(again["arr_0"][:3].astype(int) - whole[:3]).max() <= 1

    original = command.SampleJob.draw
    calls = iter([None, None, KeyboardInterrupt()])

    def interrupted(*args):
        if error := next(calls):
            raise error
        return original(*args)

    monkeypatch.setattr(command.SampleJob, "draw", interrupted)
    said = stopped(capsys, lightning, *draw, "--num_samples=40", "--batch_size=5", status=130)
    assert np.load("out/samples.partial.npz")["arr_0"].shape == (10, 8, 8, 1)
    assert len(np.load("out/samples.npz")["arr_0"]) == 23


def test_where_nothing_can_be_written_is_told_before_the_checkpoint_is_read(lightning, capsys):
    checkpoint = "nowhere.ckpt"
    Path("file").touch()
    for command in (["sample"], ["edit", "img2img"]):
        said = stopped(capsys, lightning, *command, "--ckpt_path", checkpoint, "--out=file")
        assert "Nothing can be written to file (it is a file)" in said
    said = stopped(capsys, lightning, "evaluate", "--ckpt_path", checkpoint, "--out=file/report.json")
    assert "Nothing can be written to file" in said


@pytest.mark.medium
def test_values_that_are_not_finite_give_no_image_and_no_figure(lightning, checkpoint, capsys, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    for state in (content["state_dict"], content["current_model_state"]):
        name = next(name for name in state if name.endswith("weight"))
        state[name] = torch.full_like(state[name], float("nan"))
    torch.save(content, "nan.ckpt")
    few = ["--num_samples=4", "--num_steps=2"]
    for command in (
        ["sample", "--out=o", *few],
        ["evaluate", "--out=o/r.json", "--extractor=pixels", "--num_blocks=1", *few, "--accelerator=cpu"],
        ["edit", "img2img", "--out=o", "--starts=[0]", "--num_steps=2"],
        ["edit", "denoise", "--out=o", "--sigmas=[1]", "--num_steps=2"],
        ["edit", "invert", "--out=o", "--num_steps=2"],
    ):
        assert "not finite" in stopped(capsys, lightning, *command, "--ckpt_path=nan.ckpt"), command
        made = [path for path in Path("o").rglob("*") if path.is_file() and path.name != "lock"]
        assert not made, (command, made)
    for command in ("validate", "test"):
        said = stopped(
            capsys, lightning, command, "--config", DIGITS, *TINY, *NO_IMAGES, "--ckpt_path=nan.ckpt", status=1
        )
        assert "/loss is nan" in said and "Traceback" not in said


def test_the_last_checkpoint_is_continued_in_the_same_folder(lightning, checkpoint, tmp_path, capsys):
    lightning("fit", "--config", DIGITS, *TINY, "--trainer.max_steps=5", "--ckpt_path=last")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 5
    assert not (tmp_path / "runs/edm_digits/version_1").exists()


@pytest.mark.medium
def test_a_run_that_was_cut_in_mid_epoch_ends_in_the_same_weights(lightning, tmp_path):
    run = ["fit", "--config", DIGITS, *TINY, *NO_IMAGES, "--trainer.val_check_interval=3"]
    steady = ["--model.init_args.lr_scheduler=null", "--model.init_args.net.init_args.dropout=0.2"]
    lightning(*run, *steady, "--name=cut", "--trainer.max_steps=3")
    lightning(*run, *steady, "--name=cut", "--trainer.max_steps=6", "--ckpt_path=last")
    lightning(*run, *steady, "--name=unbroken", "--trainer.max_steps=6")
    lightning(*run, *steady, "--name=other_seed", "--trainer.max_steps=6", "--seed_everything=1")
    cut, unbroken, other = (
        torch.load(tmp_path / f"runs/{name}/version_0/checkpoints/last.ckpt", weights_only=True)
        for name in ("cut", "unbroken", "other_seed")
    )
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, unbroken[key][name]) for name, value in cut[key].items())
        assert not all(torch.equal(value, other[key][name]) for name, value in cut[key].items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.max_step=3"], "max_step"),
        (["--trainer.max_epoch=3"], "max_epoch"),
        (["--model.init_args.net.init_args.model_chanels=8"], "model_chanels"),
        (["--trainer.max_steps=many"], "max_steps"),
        (["--data.init_args.batch_size=small"], "batch_size"),
        (["--model.init_args.prediction=noise"], "prediction"),
        (["--model.class_path=diffusion_lit.modules.EMD"], "EMD"),
        (["--ckpt_path=last", "--name=never_run"], "nothing to continue"),
        (["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
        (["--model.init_args.sampling.sampler=huen"], "huen"),
        (["--ema.decay=2"], "decay"),
        (["--model.init_args.net.init_args.image_size=16"], "image_size is given as 16, but the data has 8"),
        (["--data.init_args.batch_size=100000"], "batch_size"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_a_user_gets_wrong_is_named(lightning, capsys, options, message):
    assert message in stopped(capsys, lightning, "fit", "--config", DIGITS, *TINY, "--trainer.max_steps=1", *options)


def test_a_wrong_key_in_the_yaml_is_named(lightning, tmp_path, capsys):
    (tmp_path / "typo.yaml").write_text(DIGITS.read_text().replace("optimizer:", "optimiser:"))
    assert "optimiser" in stopped(capsys, lightning, "fit", "--config", tmp_path / "typo.yaml")
    (tmp_path / "typo.yaml").write_text(DIGITS.read_text().replace("num_samples:", "num_sample:"))
    said = stopped(capsys, lightning, "fit", "--config", tmp_path / "typo.yaml")
    assert "num_sample" in said
    assert "missing.yaml" in stopped(capsys, lightning, "fit", "--config", tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels=10"], "no class '10' for --labels 10; give a number from 0 to 9"),
        (["--labels=cat"], "no class 'cat'"),
        (["--sampler=huen"], "no sampler 'huen'"),
        (["--num_steps=0"], "num_steps is 0"),
        (["--sigma_min=3", "--sigma_max=2"], "sigma_min 3.0 is not below sigma_max 2.0"),
        (["--sampler=ddim", '--sampler_options={"eta": -1}'], "eta"),
        (["--num_samples=0"], "num_samples is 0"),
        (["--cfg_scale=7"], "--cfg_scale 7.0 does nothing without something to guide to"),
        (["--labels=all", "--guidance_interval=[0.3, 5]"], "does nothing at cfg_scale 1"),
        (["--num_step=3"], "num_step"),
        (["--device=cuda:77"], "no device 'cuda:77'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_sample_cannot_do_is_told(lightning, checkpoint, capsys, options, message):
    assert message in stopped(capsys, lightning, "sample", "--ckpt_path", checkpoint, "--out=o", *options)


def test_unknown_commands_and_checkpoints_are_told(lightning, capsys, tmp_path):
    assert "no command 'train'" in stopped(capsys, lightning, "train")
    assert "There is no checkpoint" in stopped(capsys, lightning, "sample", "--ckpt_path=x.ckpt")


def test_a_checkpoint_of_another_network_is_refused(lightning, checkpoint, capsys):
    said = stopped(
        capsys,
        lightning,
        *["fit", "--config", DIGITS, *TINY, "--trainer.max_steps=4", "--ckpt_path=last"],
        "--model.init_args.net.init_args.model_channels=32",
    )
    assert "model_channels = 16" in said
    assert "says 32" in said


@pytest.mark.parametrize(
    "strategy",
    [
        *["deepspeed", "deepspeed_stage_3", "fsdp", "FSDPStrategy", "DeepSpeedStrategy"],
        *(f"lightning.pytorch.strategies.{name}Strategy" for name in ("FSDP", "DeepSpeed", "ModelParallel")),
    ],
)
def test_strategies_that_cut_the_model_up_are_refused_in_a_sentence(lightning, capsys, strategy):
    config = Path(__file__).resolve().parents[2] / "configs/edm_digits.yaml"
    with pytest.raises(SystemExit) as caught:
        lightning("fit", "--config", config, f"--trainer.strategy={strategy}", "--trainer.accelerator=cpu")
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "Traceback" not in said
    assert "--trainer.strategy ddp" in said and "activation_checkpointing" in said and "20 bytes" in said
