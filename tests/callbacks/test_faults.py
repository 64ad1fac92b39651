"""What can go wrong with a run: what it says, what it keeps, and with what exit status it ends."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from helpers.runs import FIT, LAST, at_step, ended, logged, read, same_training
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from diffusion_lit.callbacks import LastCheckpoint, NonFiniteGuard
from diffusion_lit.callbacks.loggers import TensorBoardLogger
from diffusion_lit.modules import EDM
from diffusion_lit.runtime.stopping import RunStopped, explain
from diffusion_lit.storage.atomic import atomic
from diffusion_lit.storage.checkpoint_io import SafeCheckpointIO


@pytest.fixture
def unbroken(trained_once):
    """The checkpoint of a run that nothing happens to."""

    def run(*options):
        trained_once(*FIT, *options, "--name=unbroken")
        return read("runs/unbroken/version_0/checkpoints/last.ckpt")

    return run


# Signals


@pytest.mark.parametrize(
    ("number", "status", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")]
)
def test_a_signal_saves_at_the_end_of_the_step(lightning, unbroken, monkeypatch, capsys, number, status, name):
    whole = unbroken("--trainer.val_check_interval=2")
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda trainer: os.kill(os.getpid(), number))
        assert ended(lightning, *FIT, "--trainer.val_check_interval=2") == status
    assert signal.getsignal(number) is handler
    said = capsys.readouterr().err
    assert f"Stopped by {name}. The state after step 3 is saved in" in said and str(LAST) in said
    assert read(LAST)["global_step"] == 3
    lightning(*FIT, "--trainer.val_check_interval=2", "--ckpt_path=last")
    assert same_training(read(LAST), whole)


def test_a_validation_that_was_still_to_come_is_made_up_for(lightning, unbroken, monkeypatch):
    whole = unbroken("--trainer.val_check_interval=2")
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        assert ended(lightning, *FIT, "--trainer.val_check_interval=2") == 143
    run = LAST.parent.parent
    assert set(logged(run, "val/loss")) == {1}
    assert set(logged(run, "train/loss")) == {0, 1, 2, 3}
    lightning(*FIT, "--trainer.val_check_interval=2", "--ckpt_path=last")
    assert same_training(read(LAST), whole)
    for tag in ("val/loss", "train/loss"):
        assert logged(run, tag) == logged("runs/unbroken/version_0", tag)


def test_figures_of_a_step_are_logged_at_the_interval_and_only_there(lightning, unbroken, monkeypatch):
    unbroken()
    every = logged("runs/unbroken/version_0", "train/loss")
    told, log = [], EDM.log_dict

    def telling(module, *args, **more):
        told.append(module.global_step)
        log(module, *args, **more)

    monkeypatch.setattr(EDM, "log_dict", telling)
    lightning(*FIT, "--trainer.log_every_n_steps=3")
    assert told == [2, 5]
    assert logged(LAST.parent.parent, "train/loss") == {step: every[step] for step in told}


@pytest.mark.medium
def test_a_signal_during_validation_stops_at_once_and_keeps_the_steps_before(lightning, unbroken, monkeypatch, capsys):
    whole = unbroken("--trainer.val_check_interval=4")
    said = []
    monkeypatch.setattr("diffusion_lit.callbacks.checkpoint.rank_zero_info", said.append)
    with monkeypatch.context() as patch:
        patch.setattr(EDM, "on_validation_batch_end", lambda *args: os.kill(os.getpid(), signal.SIGINT), raising=False)
        assert ended(lightning, *FIT, "--trainer.val_check_interval=4") == 130
    assert "Stopped by Ctrl-C." in capsys.readouterr().err
    assert f"The state after step 4 is saved in {LAST}" in "".join(said)
    assert read(LAST)["global_step"] == 4
    lightning(*FIT, "--trainer.val_check_interval=4", "--ckpt_path=last")
    assert same_training(read(LAST), whole)
    assert logged(LAST.parent.parent, "val/loss") == logged("runs/unbroken/version_0", "val/loss")


@pytest.mark.medium
def test_a_signal_waits_for_accumulated_gradients(lightning, unbroken, monkeypatch):
    more = ["--trainer.accumulate_grad_batches=3", "--trainer.val_check_interval=4", "--trainer.max_steps=4"]
    whole = unbroken(*more)
    sent = []

    def act(trainer):
        if trainer.fit_loop.epoch_loop.batch_idx == 4 and not sent:  # in the middle of the second step's batches
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    with monkeypatch.context() as patch:
        at_step(patch, 1, act)
        assert ended(lightning, *FIT, *more) == 143
    assert read(LAST)["global_step"] == 2
    lightning(*FIT, *more, "--ckpt_path=last")
    assert same_training(read(LAST), whole)


# Numbers that are not finite


class Slope(LightningModule):
    """A weight that each step lowers by 1 unless the batch says otherwise; keeps what the optimizer was given."""

    def __init__(self, optimizer, bad, where):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.make, self.bad, self.where = optimizer, bad, where

    def training_step(self, batch, batch_idx):
        self.sigma_range = torch.tensor([0.5, 2.0]) + batch_idx
        loss = self.weight.sum()
        if batch_idx in self.bad:
            loss = loss * float("nan") if self.where == "gradient" else loss + float("inf")
        return loss

    def configure_optimizers(self):
        return self.make(self.parameters())


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}


def descend(tmp_path, module, guard, steps=6, **options):
    trainer = Trainer(
        **{"max_steps": steps, "callbacks": [guard], "default_root_dir": tmp_path, "log_every_n_steps": 3},
        **{"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"},
        **{"enable_checkpointing": False, **options},
    )
    trainer.fit(module, torch.utils.data.DataLoader([torch.zeros(1)] * 20, batch_size=1))
    return trainer


@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [{2, 3}, {0}], ids=["later", "first"])
def test_bad_steps_change_nothing(tmp_path, name, where, bad):
    torch.manual_seed(0)
    guarded = Slope(OPTIMIZERS[name], bad, where)
    guard = NonFiniteGuard("skip")
    with pytest.warns(UserWarning, match="not finite and w.* left out"):
        trainer = descend(tmp_path, guarded, guard)
    clean = Slope(OPTIMIZERS[name], set(), where)
    other = descend(tmp_path, clean, NonFiniteGuard("off"), steps=6 - len(bad))
    assert torch.equal(guarded.weight, clean.weight)
    for one, two in zip(trainer.optimizers[0].state.values(), other.optimizers[0].state.values(), strict=True):
        assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert guard.skipped == len(bad)
    assert guard.state_dict() == {"skipped": len(bad)}


@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bad_steps_change_nothing_under_a_gradient_scaler(tmp_path, name, where, monkeypatch):
    """As on CUDA under 16-mixed, where the host does not know whether a step is good: the scaler steps each time."""
    monkeypatch.setattr("diffusion_lit.callbacks.guard.HOST", "none", raising=False)
    plugin = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))]}
    guarded = Slope(OPTIMIZERS[name], {0, 3}, where)
    guard = NonFiniteGuard("skip")
    with pytest.warns(UserWarning, match="not finite and w.* left out"):
        trainer = descend(tmp_path, guarded, guard, **plugin)
    clean = Slope(OPTIMIZERS[name], set(), where)
    other = descend(tmp_path, clean, NonFiniteGuard("off"), steps=4, **plugin)
    assert guarded.weight.abs().min() > 0.1
    assert torch.equal(guarded.weight, clean.weight)
    for one, two in zip(trainer.optimizers[0].state.values(), other.optimizers[0].state.values(), strict=True):
        assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert guard.skipped == 2


def test_a_step_that_the_scaler_leaves_out_does_not_undo_the_next(tmp_path):
    """On the host, which knows that a step is good, nothing of an older, bad step may be left."""
    plugin = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))]}
    guarded, clean = Slope(OPTIMIZERS["sgd"], {0}, "gradient"), Slope(OPTIMIZERS["sgd"], set(), "gradient")
    with pytest.warns(UserWarning, match="not finite and w.* left out"):
        descend(tmp_path, guarded, NonFiniteGuard("skip"), **plugin)
    descend(tmp_path, clean, NonFiniteGuard("off"), steps=5, **plugin)
    assert torch.equal(guarded.weight, clean.weight)


def test_without_the_guard_they_ruin_the_weights(tmp_path):
    module = Slope(OPTIMIZERS["adamw"], {2}, "gradient")
    descend(tmp_path, module, NonFiniteGuard("off"))
    assert module.weight.isnan().all()


def test_a_run_stops_and_names_the_first_bad_step(tmp_path):
    module = Slope(OPTIMIZERS["adamw"], {1, 4}, "gradient")
    with pytest.raises(RunStopped, match=r"not finite at step 2, whose noise levels were 1.5 to 3; its update was not"):
        descend(tmp_path, module, NonFiniteGuard())
    assert module.weight.isfinite().all()


def test_the_flag_is_read_at_the_logging_interval_alone(tmp_path, monkeypatch):
    reads = []
    before = NonFiniteGuard.read
    monkeypatch.setattr(
        NonFiniteGuard, "read", lambda self, *args: (reads.append(args[0].global_step), before(self, *args))
    )
    descend(tmp_path, Slope(OPTIMIZERS["sgd"], set(), "loss"), NonFiniteGuard())
    assert reads == [3, 6, 6]  # and once more at the end


def test_accumulated_batches_are_bad_if_one_is(tmp_path):
    module = Slope(OPTIMIZERS["sgd"], {1}, "loss")
    with pytest.warns(UserWarning, match="1 step had"):
        descend(tmp_path, module, NonFiniteGuard("skip"), steps=2, accumulate_grad_batches=2)
    assert torch.equal(module.weight, torch.full((3,), -1.0))


def test_a_choice_that_the_guard_does_not_know():
    with pytest.raises(ValueError, match="nonfinite is 'ignore'; choose one of stop, skip, off"):
        NonFiniteGuard("ignore")


def test_the_command_names_checkpoint_and_noise_levels(lightning, monkeypatch, capsys):
    before = EDM.training_step
    monkeypatch.setattr(
        EDM, "training_step", lambda self, batch, i: before(self, batch, i) * (float("nan") if i == 4 else 1.0)
    )
    assert ended(lightning, *FIT, "--checkpoint.every_n_train_steps=2") == 1
    said = capsys.readouterr().err
    assert "not finite at step 5, whose noise levels were" in said
    assert str(LAST) in said and "of step 4" in said
    assert all(value.isfinite().all() for value in read(LAST)["current_model_state"].values())


# Memory


def test_out_of_memory_names_the_batch_size_and_what_helps(lightning, monkeypatch, capsys):
    def full(self, batch, batch_idx):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")

    monkeypatch.setattr(EDM, "training_step", full)
    assert ended(lightning, *FIT) == 2
    said = capsys.readouterr().err
    for words in ("2.00 GiB", "batch_size 16", "accumulate_grad_batches", "bf16-mixed"):
        assert words in said
    assert "Traceback" not in said
    assert "Out of memory" in str(explain(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")))
    assert explain(RuntimeError("a bug")) is None


# Disks


def test_a_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "a" / "file"
    with atomic(path) as file:
        file.write(b"old")
    with pytest.raises(RuntimeError), atomic(path) as file:
        file.write(b"new and longer")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["file"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MB, where mounting one is allowed."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_does_not_stop_training_and_keeps_the_old_checkpoint(lightning, small_disk, capsys, monkeypatch):
    where = f"--trainer.logger.init_args.save_dir={small_disk}"
    small = ["--model.init_args.net.init_args.channel_mult=[1]", "--model.init_args.net.init_args.num_blocks=1"]
    small += ["--model.init_args.net.init_args.attention_resolutions=[]", "--checkpoint.every_n_train_steps=2"]
    small += ["--model.init_args.net.init_args.model_channels=8"]
    last = small_disk / "run/version_0/checkpoints/last.ckpt"

    def fill(trainer):
        size = shutil.disk_usage(small_disk).free
        (small_disk / "other").write_bytes(b"0" * size)

    at_step(monkeypatch, 3, fill)
    with pytest.warns(UserWarning, match="could not be written: No space left on device. Training goes on"):
        assert ended(lightning, *FIT, *small, where) == 1
    said = capsys.readouterr().err
    assert "The run is over, but its last checkpoint could not be written" in said
    assert "Traceback" not in said
    assert read(last)["global_step"] == 2
    assert sorted(os.listdir(last.parent)) == ["last.ckpt", "previous.ckpt"]  # one file of two names
    (small_disk / "other").unlink()
    monkeypatch.undo()
    monkeypatch.chdir(small_disk.parent)
    lightning(*FIT, *small, where, "--ckpt_path=last")
    assert read(last)["global_step"] == 6


def test_a_failed_save_keeps_what_it_would_have_replaced(tmp_path, monkeypatch):
    io = SafeCheckpointIO()
    io.save_checkpoint({"state_dict": {}, "global_step": 1}, tmp_path / "old.ckpt")
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="could not be written"):
        io.save_checkpoint({"state_dict": {}, "global_step": 2}, tmp_path / "file" / "new.ckpt")
    io.remove_checkpoint(tmp_path / "old.ckpt")
    assert io.load_checkpoint(tmp_path / "old.ckpt")["global_step"] == 1
    io.save_checkpoint({"state_dict": {}, "global_step": 3}, tmp_path / "new.ckpt")
    io.remove_checkpoint(tmp_path / "old.ckpt")
    assert not (tmp_path / "old.ckpt").exists()


def test_a_run_folder_that_was_deleted_is_made_again(lightning, unbroken, monkeypatch):
    whole = unbroken()
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda trainer: shutil.rmtree("runs/run"))
        lightning(*FIT, "--sample_grid.every=1", "--model.init_args.sampling.num_steps=2")
    assert same_training(read(LAST), whole)


def test_the_log_goes_on_after_its_folder_was_deleted(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="a", version=0)
    logger.log_metrics({"x": 1.0}, 1)
    logger.experiment.flush()
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a").touch()  # so that it cannot be made again either
    with pytest.warns(UserWarning, match="TensorBoard's file in .* cannot be written"):
        for step in range(2, 5):
            logger.log_metrics({"x": 1.0}, step)
            logger.save()
    (tmp_path / "a").unlink()
    logger.log_metrics({"x": 1.0}, 9)
    logger.finalize("success")
    assert logged(tmp_path / "a/version_0", "x") == {9: 1.0}


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to drop it")
def test_no_permission_is_one_sentence(tmp_path, capfd):
    (tmp_path / "runs").mkdir(mode=0o755)
    (tmp_path / "cache").mkdir(mode=0o777)
    child = os.fork()
    if child == 0:
        status = 99
        try:
            torch.set_num_threads(1)
            os.chdir(tmp_path)
            os.environ["XDG_CACHE_HOME"] = str(tmp_path / "cache")
            for parent in [tmp_path, *tmp_path.parents]:
                if parent.parent.is_relative_to(tempfile.gettempdir()):
                    parent.chmod(0o755)
            os.setuid(65534)
            from diffusion_lit.commands.main import main

            main(FIT)
        except SystemExit as error:
            status = error.code
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    said = capfd.readouterr().err
    assert "ermission denied" in said and "runs" in said
    assert "Traceback" not in said


def test_checkpoints_are_only_taken_between_steps(lightning):
    """A validation in the middle of accumulated batches saves when their step is done."""
    lightning(*FIT, "--trainer.accumulate_grad_batches=3", "--trainer.val_check_interval=4", "--trainer.max_steps=2")
    progress = read(LAST)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"]
    assert progress % 3 == 0
    assert isinstance(LastCheckpoint().state_dict()["validation_due"], bool)


# Checkpoints that do not belong to the run


def said_by(capsys, run, *args):
    assert ended(run, *args) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.init_args.use_labels=false"], "num_classes = 10, but this run says 0"),
        (["--model.init_args.net.init_args.channel_mult=[2, 2]"], "channel_mult = "),
        (["--model.class_path=diffusion_lit.modules.DDPM"], "was made by EDM, but this run trains DDPM"),
    ],
    ids=["classes", "network", "module"],
)
def test_a_checkpoint_of_another_model_is_one_sentence(lightning, trained_once, capsys, options, message):
    trained_once(*FIT, "--trainer.max_steps=1")
    capsys.readouterr()
    assert message in said_by(capsys, lightning, *FIT, "--ckpt_path=last", *options)


def test_a_checkpoint_of_another_image_size_is_one_sentence(lightning, trained_once, capsys, tmp_path):
    from PIL import Image

    trained_once(*FIT, "--trainer.max_steps=1")
    (tmp_path / "images" / "0").mkdir(parents=True)
    for index in range(40):
        Image.new("L", (16, 16), index).save(tmp_path / "images" / "0" / f"{index}.png")
    data = ["--data=datamodules.ImageFolder", f"--data.init_args.root={tmp_path / 'images'}"]
    data += ["--data.init_args.image_size=4", "--data.init_args.channels=1", "--data.init_args.batch_size=16"]
    assert "image_size = 8, but this run says 4" in said_by(capsys, lightning, *FIT, *data, "--ckpt_path=last")


@pytest.mark.parametrize("how", ["truncated", "text", "empty"])
def test_a_last_checkpoint_that_is_damaged_is_one_sentence(lightning, capsys, how):
    LAST.parent.mkdir(parents=True)
    torch.save({"state_dict": {"w": torch.zeros(1000)}}, LAST)
    whole = LAST.read_bytes()
    LAST.write_bytes({"truncated": whole[:-1000], "text": b"text", "empty": b""}[how])
    assert "not a readable checkpoint" in said_by(capsys, lightning, *FIT, "--ckpt_path=last")


def test_a_port_in_use_is_told_by_make_board(tmp_path):
    import socket

    makefile = Path(__file__).resolve().parents[2] / "Makefile"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = ["make", "-f", makefile, "-o", "install", "board", f"BIN={tmp_path}/bin", f"PORT={port}"]
        # `make test` tells its own make what it was started with, and this one would take it from there.
        alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False, env=alone
        )
    assert done.returncode != 0
    assert done.stdout.strip() == f"Port {port} is in use, or is no port; choose another, such as make board PORT=6007"
    assert "Traceback" not in done.stderr


def test_slurm_requeues_at_the_end_of_a_step(lightning, unbroken, monkeypatch, tmp_path):
    """SLURM's signal saves between two steps and asks for the job again, which then goes on from there."""
    whole = unbroken()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "bin/scontrol").chmod(0o755)
    job = {"SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "77"}
    job |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    job["PATH"] = f"{tmp_path}/bin:{os.environ['PATH']}"
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda trainer: os.kill(os.getpid(), signal.SIGUSR1))
        at_step(patch, 5, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))  # the job's end
        assert ended(lightning, *FIT) == 143
    assert (tmp_path / "asked").read_text().split() == ["requeue", "77"]
    assert read(tmp_path / "hpc_ckpt_1.ckpt")["global_step"] == 3
    (tmp_path / "hpc_ckpt_1.ckpt").rename(tmp_path / "elsewhere.ckpt")
    lightning(*FIT, "--ckpt_path=elsewhere.ckpt", "--name=again")
    assert same_training(read("runs/again/version_0/checkpoints/last.ckpt"), whole)
