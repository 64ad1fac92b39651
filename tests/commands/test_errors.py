"""What is wrong while a run is built or starts: one sentence with the value, status 2, and the way to see more."""

import os
import subprocess
import sys

import pytest
from helpers.project_files import ROOT
from helpers.runs import DIGITS, FIT, stopped

from diffusion_lit.commands.nulls import refuse_nulls

CHECKPOINT = "lightning.pytorch.callbacks.ModelCheckpoint"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trainer.accelerator=gpu"], ["gpu", "doctor"]),
        (["--trainer.devices=0"], ["devices", "'0'"]),
        (["--trainer.devices=-2"], ["devices '-2'", "int > 0", "doctor"]),
        (["--trainer.accelerator=tpu"], ["trainer refuses", "torch_xla"]),
        (["--model.init_args.optimizer.init_args.lr=fast"], ["lr is fast; give a number."]),
        (["--trainer.val_check_interval=0.5"], ["val_check_interval is 0.5", "optimizer steps"]),
        (["--trainer.enable_checkpointing=false"], ["enable_checkpointing is false", "leave it out"]),
        (["--trainer.profiler=simple2"], ["profiler", "'simple'"]),
        (["--trainer.max_time=1"], ["DD:HH:MM:SS"]),
        (["--trainer.strategy=nonsense"], ["strategy='nonsense'"]),
        (["--trainer.callbacks=[1]"], ["trainer.callbacks is 1"]),
        (["--trainer.precision=17"], ["trainer.precision is 17", "'bf16-mixed'"]),
        (["--ema.half_life=x"], ["ema.half_life is x; give a number or null."]),
        (["--data.init_args.batch_size=0"], ["diffusion-lit: batch_size is 0; give a whole number from 1 on."]),
        (["--data.init_args.batch_size=null"], ["data.batch_size is null; give a whole number."]),
        (["--model.init_args.optimizer=null"], ["optimizer is null; give a class by class_path."]),
        (["--guard=[1]"], ["guard is [1]; give a mapping of its options."]),
        (["--guard=null"], ["guard is null; give a mapping of its options."]),
        (["--guard=skip"], ["guard is skip; give a mapping of its options."]),
        (["--model.init_args.net={class_path: 3}"], ["net is neither a class_path with its init_args nor"]),
        (["--sample_grid.rows=null"], ["sample_grid.rows is null; give a whole number."]),
        (["--model.init_args.lr_scheduler=7"], ["lr_scheduler is 7; give a class's full name"]),
        (["--data.class_path=Nope"], ["data is Nope; give a class's full name"]),
        (["--trajectory.count=1000000000"], ["1000000000", "trajectory.count"]),
        (["--model.init_args.optimizer.init_args.betas=null"], ["betas"]),
        (["--model.init_args.noise_levels={}"], ["noise_levels is {}; give a NoiseLevels by class_path or null."]),
        (["--model.init_args.loss={class_path: DenoisingLoss, init_args: {weight: {}}}"], ["weight is {}; give a"]),
        (["--model.init_args.noise_levels=diffusion_lit.diffusion.NoiseLevels"], ["the base of others"]),
        (["--data=datamodules.ImageDataModule"], ["data is datamodules.ImageDataModule, the base of others"]),
        (["--name=../x"], ["../x"]),
        (["--name=" + "x" * 300], ["name"]),
    ],
)
def test_what_is_wrong_with_a_run_is_one_sentence_before_it_starts(lightning, capsys, options, words):
    gpu = options != ["--trainer.accelerator=gpu"]
    if not gpu and __import__("torch").cuda.is_available():
        pytest.skip("This machine has a GPU.")
    said = stopped(capsys, lightning, *FIT, *options)
    told = said[said.rindex("diffusion-lit: ") :]
    assert all(word in told for word in words), told
    assert len(told) <= 411 and "Union subtypes" not in said


def test_null_is_taken_where_it_may_stand_alone(capsys, lightning):
    net = {"class_path": "diffusion_lit.nets.UNet", "init_args": {"in_channels": None, "condition_channels": 1}}
    model = {"class_path": "diffusion_lit.modules.EDM", "init_args": {"net": net, "lr_scheduler": None}}
    refuse_nulls([model, {"class_path": "datamodules.Digits", "init_args": {"on_device": None}}])
    net["init_args"]["channel_mult"] = None
    with pytest.raises(ValueError, match=r"^model\.net\.channel_mult is null; give a list\.$"):
        refuse_nulls({"model": model})
    assert "num_samples is null; give a whole number." in stopped(capsys, lightning, "sample", "--num_samples=null")


@pytest.mark.medium
@pytest.mark.parametrize("callback", ["ModelCheckpoint", "EarlyStopping"])
def test_a_figure_that_no_one_logs_is_told_before_the_first_step(lightning, capsys, tmp_path, callback):
    watched = f'{{"class_path": "lightning.pytorch.callbacks.{callback}", "init_args": {{"monitor": "val_loss"}}}}'
    said = stopped(capsys, lightning, *FIT, f"--trainer.callbacks=[{watched}]")
    assert f"{callback}'s monitor is 'val_loss', which this run does not log; it logs" in said and "val/loss" in said
    assert not list(tmp_path.rglob("*.ckpt"))
    lightning(*FIT, f"--trainer.callbacks=[{watched.replace('val_loss', 'val/loss')}]", "--trainer.max_steps=1")


@pytest.mark.medium
def test_what_is_nested_too_deeply_is_one_sentence(lightning, capsys, tmp_path):
    deep = "[" * 100_000
    (tmp_path / "deep.yaml").write_text(f"model: {deep}")
    (tmp_path / "blocks.yaml").write_text("- " * 100_000)
    for options, name in (
        (
            [*FIT, f"--model.init_args.sampling.sampler_options={deep}"],
            "sampler_options is [[[",
        ),
        ([*FIT, "--data.init_args.batch_size", deep], "batch_size is [[["),
        (["fit", "--config=deep.yaml"], "deep.yaml is nested too deeply"),
        (["fit", "--config", "blocks.yaml"], "blocks.yaml is nested too deeply"),
        (["sample", "--ckpt_path=x.ckpt", f"--sampler_options={deep}"], "sampler_options is [[["),
    ):
        said = stopped(capsys, lightning, *options)
        assert name in said and "RecursionError" not in said, options


@pytest.mark.parametrize(
    ("option", "word"),
    [
        ("--model.init_args.optimizer={class_path: torch.optim.Optimizer, init_args: {defaults: {}}}", "optimizer"),
        ("--model.init_args.lr_scheduler=torch.optim.lr_scheduler.LRScheduler", "lr_scheduler"),
    ],
)
def test_the_base_of_optimizers_or_schedules_is_none(lightning, capsys, option, word):
    assert f"{word} is " in (said := stopped(capsys, lightning, *FIT, option)) and "base" in said


def test_the_traceback_is_shown_where_it_is_asked_for(lightning, monkeypatch):
    monkeypatch.setenv("DIFFUSION_LIT_DEBUG", "1")
    with pytest.raises(ValueError, match="enable_checkpointing is false"):
        lightning(*FIT, "--trainer.enable_checkpointing=false")
    with pytest.raises(ValueError, match="There is no"):
        lightning("sample", "--ckpt_path=nowhere.ckpt")


def test_a_study_shows_its_traceback_where_it_is_asked_for(monkeypatch, capsys):
    from experiments.harness.command import command

    def study(steps: int = 1) -> None:
        """A study with a fault."""
        raise KeyError("momentum")

    with pytest.raises(SystemExit, match="2"):
        command(study, [])
    assert "KeyError: 'momentum'. DIFFUSION_LIT_DEBUG=1 shows where." in capsys.readouterr().err
    monkeypatch.setenv("DIFFUSION_LIT_DEBUG", "1")
    with pytest.raises(KeyError, match="momentum"):
        command(study, [])


@pytest.mark.skipif(os.name != "posix", reason="pipes and locales of a shell")
def test_closed_pipes_and_locales_without_utf_8_are_no_error(tmp_path):
    (tmp_path / "own.yaml").write_text(f"# é, ü\n{DIGITS.read_text()}", encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    words = [sys.executable, "-m", "diffusion_lit"]
    done = subprocess.run(
        f"{sys.executable} -u -m diffusion_lit configs | head -1",
        shell=True, env=env, capture_output=True, cwd=tmp_path, check=True,
    )  # fmt: skip
    assert done.stdout.count(b"\n") == 1 and not done.stderr
    done = subprocess.run(
        [*words, "configs", "--new=é"], env={**env, "PYTHONIOENCODING": "ascii"}, capture_output=True, cwd=tmp_path
    )
    assert done.returncode == 2 and b"Traceback" not in done.stderr and b"\\xe9" in done.stderr
