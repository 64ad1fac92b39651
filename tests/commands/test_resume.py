"""A run that goes on from a checkpoint: exactly where it stood, and by what was changed meanwhile."""

import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from helpers.runs import FIT, LAST, at_step, ended, logged, read, same_training

from diffusion_lit.callbacks import EMA
from diffusion_lit.callbacks.loop import brought_to, position
from diffusion_lit.callbacks.resume import differences

DIGITS_128 = ["--data.init_args.batch_size=128", "--model.init_args.net.init_args.model_channels=8"]  # 11 batches


def stop_at(lightning, monkeypatch, step, *options):
    """Interrupts a run at the end of a step."""
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        assert ended(lightning, *FIT, *options) == 143
    assert read(LAST)["global_step"] == step


CHAINS = {
    "steps": (["--trainer.max_steps=28"], (11, 22, 25), 28),
    "epochs": (["--trainer.max_steps=-1", "--trainer.max_epochs=3", "--trainer.accumulate_grad_batches=4"], (3, 6), 9),
    "validation at the edge": (["--trainer.max_steps=25", "--trainer.val_check_interval=11"], (11, 22, 23), 25),
    "the last step": (["--trainer.max_steps=-1", "--trainer.max_epochs=2"], (10, 11, 21, 22), 22),
}


@pytest.mark.medium
@pytest.mark.parametrize(("options", "stops", "steps"), CHAINS.values(), ids=list(CHAINS))
def test_a_chain_of_interruptions_at_epochs_ends_changes_nothing(lightning, monkeypatch, options, stops, steps):
    """A second one after one at the end of an epoch repeated an epoch, or lost one."""
    options = [*DIGITS_128, *options]
    lightning(*FIT, *options, "--name=unbroken")
    whole = read("runs/unbroken/version_0/checkpoints/last.ckpt")
    resume = []
    for step in stops:
        stop_at(lightning, monkeypatch, step, *options, *resume)
        resume = ["--ckpt_path=last"]
    lightning(*FIT, *options, *resume)
    assert read(LAST)["global_step"] == whole["global_step"] == steps
    assert same_training(read(LAST), whole)
    for tag in ("train/loss", "val/loss"):
        assert logged(LAST.parent.parent, tag) == logged("runs/unbroken/version_0", tag)


@pytest.mark.medium
def test_a_longer_run_goes_on_in_the_middle_of_an_epoch(lightning):
    """A run that ends within an epoch leaves the rest of it to the run that goes on."""
    lightning(*FIT, *DIGITS_128, "--trainer.max_steps=15", "--name=unbroken")
    lightning(*FIT, *DIGITS_128, "--trainer.max_steps=5", "--trainer.limit_val_batches=0")
    lightning(*FIT, *DIGITS_128, "--trainer.max_steps=15", "--ckpt_path=last")
    assert same_training(read(LAST), read("runs/unbroken/version_0/checkpoints/last.ckpt"))


EPOCH = dict.fromkeys(("ready", "started", "processed", "completed"), 0)


@pytest.mark.parametrize(
    ("epochs", "batches", "last", "expected"),
    [
        ({"ready": 3, "processed": 2}, 4, False, (2, 4)),  # after a batch
        ({"ready": 3, "processed": 2}, 11, True, (3, 0)),  # after the last of an epoch
        ({"ready": 3, "processed": 3}, 11, True, (3, 0)),  # after the epoch
        ({"ready": 3, "processed": 3}, 4, False, (2, 4)),  # after a run that ended in the middle of an epoch
        ({"ready": 3, "processed": 3}, 0, False, (3, 0)),  # as this module writes it, before a batch was trained
        ({}, 0, False, (0, 0)),
    ],
)
def test_where_a_run_stood(epochs, batches, last, expected):
    state = {
        "epoch_progress": {"current": {**EPOCH, **epochs}},
        "epoch_loop.batch_progress": {
            "current": dict.fromkeys(EPOCH, batches),
            "total": dict.fromkeys(EPOCH, 99),
            "is_last_batch": last,
        },
        "epoch_loop.automatic_optimization.optim_progress": {"optimizer": {"step": {"total": {"completed": 99}}}},
    }
    assert position(state) == expected
    assert position(brought_to(*expected, state)) == expected  # and a chain of resumptions stays there


# Intervals


@pytest.mark.medium
def test_validation_counts_optimizer_steps_and_comes_after_the_last(lightning):
    """11 batches, summed up by 4, are 3 steps of an epoch; the last of them sums up 3."""
    options = [*DIGITS_128, "--trainer.accumulate_grad_batches=4", "--trainer.val_check_interval=2"]
    lightning(*FIT, *options, "--trainer.max_steps=7")
    assert set(logged(LAST.parent.parent, "val/loss")) == {1, 3, 5, 6}  # logged with the step before, as losses are
    lightning(*FIT, *options, "--trainer.max_steps=-1", "--trainer.max_epochs=1", "--name=epoch")
    assert set(logged("runs/epoch/version_0", "val/loss")) == {1, 2}


def test_an_epoch_shorter_than_a_step_is_one_sentence(lightning, capsys):
    assert ended(lightning, *FIT, *DIGITS_128, "--trainer.accumulate_grad_batches=12") == 2
    said = capsys.readouterr().err
    assert "accumulate_grad_batches is 12, but an epoch has 11 batches" in said and "Traceback" not in said


def test_the_average_counts_the_images_that_a_step_saw(tmp_path):
    """Batches of 5, 5, 5 | 5, 2 images: a step of 15 and, at the end of the epoch, one of 7."""
    net = torch.nn.Linear(1, 1)
    ema = EMA(half_life=100.0, ramp_up=None)
    ema._average_model = SimpleNamespace(module=torch.nn.Linear(1, 1), n_averaged=1)
    trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=3, global_step=0, is_global_zero=True)
    betas = []
    for index, count in enumerate([5, 5, 5, 5, 2]):
        trainer.global_step += index in (2, 4)
        before = trainer.global_step - (index in (2, 4))
        ema.on_train_batch_end(trainer, net, None, {"image": torch.zeros(count, 1)}, index)
        if trainer.global_step > before:
            betas.append(ema.beta())
    assert betas == pytest.approx([0.5 ** (15 / 100), 0.5 ** (7 / 100)])
    assert ema._images_seen == 22


# What was changed


OPTIMIZER = "--model.init_args.optimizer.init_args"
COSINE = (
    "--model.init_args.lr_scheduler={class_path: torch.optim.lr_scheduler.CosineAnnealingLR, init_args: {T_max: %d}}"
)
CHANGED = {
    "--data.init_args.batch_size=32": "data.batch_size: 16 in the checkpoint, 32 in this run; this run's counts.",
    "--ema.half_life=700": "ema.half_life: 50000 in the checkpoint, 700 in this run; this run's counts.",
    "--model.init_args.label_dropout=0.3": "model.label_dropout: 0.1 in the checkpoint, 0.3 in this run; this run's",
    "--trainer.gradient_clip_val=2.5": "trainer.gradient_clip_val: nothing in the checkpoint, 2.5 in this run; this",
    "--trainer.accumulate_grad_batches=2": "trainer.accumulate_grad_batches: 1 in the checkpoint, 2 in this run",
    "--trainer.max_steps=4": "trainer.max_steps: 2 in the checkpoint, 4 in this run; this run's counts.",
    "--trainer.precision=bf16-mixed": "trainer.precision: '32-true' in the checkpoint, 'bf16-mixed' in this run",
    f"{OPTIMIZER}.lr=1e-5": "model.optimizer.lr: 0.002 in the checkpoint, 1e-05 in this run; this run's counts.",
    f"{OPTIMIZER}.betas=[0.5,0.9]": "model.optimizer.betas: [0.9, 0.999] in the checkpoint, [0.5, 0.9] in this run",
    COSINE % 40: "model.lr_scheduler.T_max: 20 in the checkpoint, 40 in this run; this run's counts.",
}


@pytest.mark.medium
def test_what_was_changed_holds_and_is_told_in_a_line_each(lightning, capsys):
    start = [COSINE % 20, "--seed_everything=5", "--trainer.precision=32-true"]
    lightning(*FIT, "--trainer.max_steps=2", *start)
    capsys.readouterr()
    lightning(*FIT, *start, *CHANGED, "--ckpt_path=last")
    said = capsys.readouterr().out.splitlines()
    told = [line for line in said if " in the checkpoint, " in line]
    assert len(told) == len(CHANGED)
    for expected in CHANGED.values():
        assert any(line.startswith(expected) for line in told), expected
    group = read(LAST)["optimizer_states"][0]["param_groups"][0]
    assert list(group["betas"]) == [0.5, 0.9]
    assert group["lr"] == pytest.approx(1e-5 * (1 + math.cos(math.pi * 4 / 40)) / 2)


@pytest.mark.medium
def test_the_seed_is_the_checkpoints_unless_typed(lightning, capsys):
    lightning(*FIT, "--seed_everything=5", "--name=unbroken")
    lightning(*FIT, "--seed_everything=5", "--trainer.max_steps=3")
    capsys.readouterr()
    lightning(*FIT, "--ckpt_path=last")
    said = capsys.readouterr().out
    assert "seed_everything: 5 in the checkpoint, 0 in this run; the checkpoint's counts." in said
    assert same_training(read(LAST), read("runs/unbroken/version_0/checkpoints/last.ckpt"))
    lightning(*FIT, "--trainer.max_steps=7", "--ckpt_path=last", "--seed_everything=6")
    assert "seed_everything: 5 in the checkpoint, 6 in this run; this run's counts." in capsys.readouterr().out
    assert read(LAST)["diffusion_lit"]["seed"] == 6


def test_another_optimizer_or_other_data_is_told(lightning, trained_once, capsys):
    trained_once(*FIT, "--trainer.max_steps=1")
    capsys.readouterr()
    assert (
        ended(lightning, *FIT, "--ckpt_path=last", "--model.init_args.optimizer=torch.optim.SGD", f"{OPTIMIZER}.lr=0.1")
        == 2
    )
    said = capsys.readouterr().err
    assert "was made by AdamW, but this run trains with SGD" in said and "Traceback" not in said
    told = dict(
        (key, (old, new))
        for key, old, new in differences(
            {"_class_path": "datamodules.Digits", "batch_size": 16, "num_workers": 0},
            {"_class_path": "datamodules.MNIST", "batch_size": 32, "num_workers": 2, "root": "data"},
        )
    )
    assert told == {"_class_path": ("datamodules.Digits", "datamodules.MNIST"), "batch_size": (16, 32)}


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_a_precision_without_float32_weights_is_one_sentence(lightning, capsys, precision):
    assert ended(lightning, *FIT, f"--trainer.precision={precision}") == 2
    said = capsys.readouterr().err
    assert f"trainer.precision is '{precision}'" in said and "bf16-mixed" in said and "Traceback" not in said
