"""Runs as a person keeps them: folders, recipes, what is saved and drawn and when, and which checkpoint is meant."""

import csv
import os
import shutil
import signal
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from helpers.runs import LATENT_DIGITS, TINY_LATENT
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.loggers import Logger
from PIL import Image
from torch import nn

from diffusion_lit.callbacks import EMA, LastCheckpoint, SampleGrid, Throughput, Trajectory
from diffusion_lit.callbacks.loop import RunLoop
from diffusion_lit.commands.configs import keys_given
from diffusion_lit.commands.place import length_said_last
from diffusion_lit.modules.load import load_module
from diffusion_lit.runtime.run_folder import lock_run
from diffusion_lit.storage.checkpoint_io import SafeCheckpointIO
from diffusion_lit.storage.checkpoints import read_checkpoint
from diffusion_lit.storage.runs import LONGEST, check_name, claim_version, find_checkpoint

DIGITS = Path(__file__).resolve().parents[2] / "configs/edm_digits.yaml"
FIT = [
    *["--config", str(DIGITS), "--name=run", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"],
    *["--trainer.callbacks=[]", "--model.init_args.net.init_args.model_channels=16", "--data.init_args.batch_size=16"],
    *["--model.init_args.sampling.num_steps=1", "--loss_by_noise_level.batches=0", "--trainer.log_every_n_steps=1"],
    *["--sample_grid.rows=1", "--sample_grid.columns=1", "--trajectory.every=0", "--trainer.limit_val_batches=1"],
]
RUN = Path("runs/run/version_0")
LAST = RUN / "checkpoints/last.ckpt"


def read(path):
    return torch.load(path, weights_only=True)


def steps_of(folder, pattern="samples/*.png"):
    return sorted(int(path.stem.split("_")[1]) for path in folder.glob(pattern))


def told(capsys, run, *args, status=2):
    """The one sentence with which a command stops."""
    with pytest.raises(SystemExit) as caught:
        run(*args)
    assert caught.value.code == status
    said = capsys.readouterr().err
    assert "Traceback" not in said and len(said.splitlines()[-1]) < 400
    return said


@pytest.fixture
def saves(monkeypatch):
    """The steps at which a checkpoint was written."""
    written, save = [], SafeCheckpointIO.save_checkpoint

    def telling(self, checkpoint, path, storage_options=None):
        written.append((checkpoint["global_step"], Path(path).name))
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(SafeCheckpointIO, "save_checkpoint", telling)
    return written


# Folders, names and recipes


@pytest.mark.medium
def test_a_saved_config_is_a_recipe_and_a_fresh_run_overwrites_nothing(lightning, trained_once, capsys):
    trained_once("fit", *FIT, "--trainer.max_steps=1")
    lightning("fit", *FIT, "--trainer.max_steps=3", "--ckpt_path=last")
    recipe = yaml.safe_load((RUN / "config.yaml").read_text())
    assert "ckpt_path" not in recipe and "version" not in recipe["trainer"]["logger"]["init_args"]
    interval = yaml.safe_load(DIGITS.read_text())["trainer"]["val_check_interval"]
    assert recipe["trainer"]["val_check_interval"] == interval  # not cut to a short run
    before = LAST.read_bytes()
    lightning("fit", f"--config={RUN}/config.yaml", "--trainer.max_steps=2")
    assert LAST.read_bytes() == before
    assert read("runs/run/version_1/checkpoints/last.ckpt")["global_step"] == 2
    again = yaml.safe_load(Path("runs/run/version_1/config.yaml").read_text())
    assert again["trainer"].pop("max_steps") == 2 and recipe["trainer"].pop("max_steps") == 3
    assert {**again, "config": None} == {**recipe, "config": None}
    lightning("fit", f"--config={RUN}/config.yaml", "--trainer.max_steps=2", "--name=other/name")
    assert read("runs/other/name/version_0/checkpoints/last.ckpt")["global_step"] == 2
    said = told(capsys, lightning, "fit", *FIT, "--trainer.max_steps=1", "--trainer.logger.init_args.version=0")
    assert "runs/run/version_0 holds the checkpoint of another run" in said and LAST.read_bytes() == before


class Diary(Logger):
    """A logger that is neither TensorBoard's nor a CSV file, with arguments as W&B's has them."""

    made: ClassVar = []

    def __init__(self, name: str | None = None, save_dir: str = ".", version: str | None = None) -> None:
        super().__init__()
        self._name, self._save_dir, self._version = name, save_dir, version
        self.made.append(self)

    name = property(lambda self: self._name)
    save_dir = property(lambda self: self._save_dir)
    version = property(lambda self: self._version)

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, *args, **more):
        pass


@pytest.mark.medium
def test_a_run_lies_in_its_folder_whatever_its_logger(lightning, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    tensorboard = "{class_path: lightning.pytorch.loggers.TensorBoardLogger, init_args: {save_dir: runs}}"
    diary = "{class_path: test_runs.Diary}"
    for index, logger in enumerate(
        [
            ["--trainer.logger=false"],
            ["--trainer.logger=true"],
            ["--trainer.logger=CSVLogger"],
            [f"--trainer.logger=[{tensorboard}, {{class_path: CSVLogger, init_args: {{save_dir: runs}}}}]"],
            ["--trainer.logger=test_runs.Diary"],
            [f"--trainer.logger=[{diary}]"],
        ]
    ):
        lightning("fit", *FIT, "--trainer.max_steps=1", *logger)
        folder = Path(f"runs/run/version_{index}")
        assert (folder / "checkpoints/last.ckpt").is_file() and (folder / "config.yaml").is_file(), logger
        assert steps_of(folder) == [1], logger
        assert bool(list(folder.glob("events*"))) == ("tensorboard" in str(logger).lower() or "true" in logger[0])
        assert (folder / "metrics.csv").is_file() == ("CSV" in str(logger)), logger
    from test_runs import Diary as Used

    assert [(one.name, one.save_dir) for one in Used.made] == [(("run"), f"runs/run/version_{n}") for n in (4, 5)]
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["runs"]
    assert sorted(path.name for path in Path("runs/run").iterdir()) == [f"version_{n}" for n in range(6)]
    lightning("fit", *FIT, "--trainer.max_steps=2", "--trainer.logger=CSVLogger", "--ckpt_path=runs/run/version_2")
    for file, step in (("metrics.csv", "1"), ("metrics_before_1.csv", "0")):  # Lightning's would delete what it finds
        rows = csv.DictReader(Path("runs/run/version_2", file).read_text().splitlines())
        assert step in [row["step"] for row in rows]
    assert read("runs/run/version_2/checkpoints/last.ckpt")["global_step"] == 2


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../b", "x" * 300, "ä" * 100, "", "a//b", "a\nb", "..", "a\\b"])
def test_names_that_lead_elsewhere_are_refused(name, lightning, capsys, tmp_path):
    with pytest.raises(ValueError, match="--name"):
        check_name(name)
    assert "--name" in told(capsys, lightning, "fit", *FIT, f"--name={name}")
    assert not (tmp_path / "runs").exists() and not (tmp_path.parent / "x").exists()


def test_good_names_are_taken():
    for name in ("edm_digits", "study/variant", "a.b-c", "ä", "x" * LONGEST):
        assert check_name(name) == name


def test_a_version_is_claimed_once(tmp_path):
    (tmp_path / "version_9").mkdir()
    (tmp_path / "version_x").mkdir()
    assert [claim_version(tmp_path).name for _ in range(3)] == ["version_10", "version_11", "version_12"]


def test_a_run_that_does_not_start_leaves_no_folder(lightning, capsys):
    told(capsys, lightning, "fit", *FIT, "--ema.decay=2")
    latent = ["--config", str(LATENT_DIGITS), *TINY_LATENT, "--model.init_args.vae_ckpt=none.ckpt"]
    assert "none.ckpt" in told(capsys, lightning, "fit", *latent)  # which is looked for where its config is written
    assert not Path("runs").exists() or not list(Path("runs").rglob("version_*"))


# One process at a time


def test_a_run_is_continued_by_one_process_at_a_time(lightning, trained_once, capsys):
    trained_once("fit", *FIT, "--trainer.max_steps=1")
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:  # another process that trains there
        lock = lock_run(RUN)
        os.write(go, b"1")
        time.sleep(60)
        os._exit(lock is None)
    os.read(ready, 1)
    before = LAST.read_bytes()
    said = told(capsys, lightning, "fit", *FIT, "--trainer.max_steps=2", "--ckpt_path=last")
    assert "runs/run/version_0 is being trained by another process" in said and str(child) in said
    assert LAST.read_bytes() == before
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lightning("fit", *FIT, "--trainer.max_steps=2", "--ckpt_path=last")
    assert read(LAST)["global_step"] == 2


def test_a_run_holds_its_folder_while_it_trains_and_no_longer(lightning, monkeypatch):
    seen = []

    def refused():
        child = os.fork()
        if child == 0:
            status = 1
            try:
                lock_run(RUN)
                status = 0
            except ValueError:
                pass
            finally:
                os._exit(status)
        return bool(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    monkeypatch.setattr(Throughput, "on_train_epoch_start", lambda *args: seen.append(refused()))
    monkeypatch.setattr(Throughput, "on_train_batch_end", lambda *args: None)
    lightning("fit", *FIT, "--trainer.max_steps=1")
    assert seen == [True] and not refused()


# Intervals and ends


@pytest.mark.parametrize("held_out", [True, False], ids=["held out", "nothing held out"])
def test_saving_and_drawing_happen_at_the_interval_and_at_the_end(lightning, saves, held_out):
    options = [] if held_out else ["--trainer.limit_val_batches=0"]
    lightning("fit", *FIT, *options, "--trainer.max_steps=5", "--trainer.val_check_interval=2")
    assert [step for step, _ in saves] == [2, 4, 5]
    assert steps_of(RUN) == [2, 4, 5]
    assert (RUN / "checkpoints/best.ckpt").exists() == held_out


def images(folder, count=40):
    for index in range(count):
        path = folder / str(index % 2) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (8, 8), dtype=np.uint8)).save(path)
    return folder


def test_a_folder_of_which_nothing_is_held_out_is_saved_drawn_and_measured(lightning, saves, tmp_path):
    data = ["--data=datamodules.ImageFolder", f"--data.init_args.root={images(tmp_path / 'images')}"]
    data += ["--data.init_args.val_fraction=0", "--data.init_args.image_size=8", "--data.init_args.channels=1"]
    measure = "{class_path: diffusion_lit.evaluation.features.Pixels}"
    fid = f"[{{class_path: diffusion_lit.callbacks.FID, init_args: {{extractor: {measure}, num_samples: 4}}}}]"
    lightning(
        "fit", *FIT, *data, "--trainer.max_epochs=3", "--trainer.val_check_interval=4", f"--trainer.callbacks={fid}"
    )
    assert [step for step, _ in saves] == [4, 6]  # 40 images in batches of 16 are 2 steps per epoch
    assert steps_of(RUN) == [4, 6]
    best = read(RUN / "checkpoints/best.ckpt")
    assert best["global_step"] in (4, 6)
    [state] = [state for key, state in best["callbacks"].items() if "LastCheckpoint" in key]
    assert state["best"]["figure"].startswith("fd_pixels")


def test_epochs_alone_are_epochs(lightning, saves):
    lightning("fit", *FIT, "--trainer.max_epochs=2", "--trainer.limit_train_batches=3")
    last = read(LAST)
    assert last["global_step"] == 6 and [step for step, _ in saves] == [6] and steps_of(RUN) == [6]
    [schedule] = last["lr_schedulers"]
    assert schedule["_last_lr"][0] < 1e-4  # it decays over these six steps, not over the config's
    recipe = yaml.safe_load((RUN / "config.yaml").read_text())
    assert (recipe["trainer"]["max_steps"], recipe["trainer"]["max_epochs"]) == (-1, 2)


@pytest.mark.parametrize(
    ("files", "words", "limits"),
    [
        ([{"max_steps": 9}], ["--trainer.max_epochs", "5"], (-1, 5)),
        ([{"max_steps": 9}], ["--trainer.max_epochs=5"], (-1, 5)),
        ([{"max_steps": 9}, {"max_epochs": 5}], [], (-1, 5)),
        ([{"max_epochs": 5}], ["--trainer.max_steps=9"], (9, -1)),
        ([{"max_epochs": 5}, {"max_steps": 9}], [], (9, -1)),
        ([{"max_steps": 9}], ["--trainer.max_epochs=5", "--trainer.max_steps=9"], (9, 5)),
        ([{"max_steps": 9, "max_epochs": 5}], [], (9, 5)),
        ([{"devices": 1}], [], (9, 5)),
        ([{"max_epochs": 5}, 7], [], (-1, 5)),  # what is no mapping says nothing
    ],
)
def test_of_steps_and_epochs_the_one_said_last_counts(tmp_path, files, words, limits):
    paths = []
    for index, content in enumerate(files):
        paths.append(tmp_path / f"{index}.yaml")
        paths[-1].write_text(yaml.safe_dump({"trainer": content}))
    trainer = Namespace(max_steps=9, max_epochs=5)
    length_said_last(trainer, keys_given(paths, words))
    assert (trainer.max_steps, trainer.max_epochs) == limits


class Line(LightningModule):
    """A model whose loss on held-out data is given, by step."""

    def __init__(self, losses):
        super().__init__()
        self.weight, self.losses = nn.Parameter(torch.zeros(1)), losses

    def training_step(self, batch, batch_idx):
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", torch.tensor(self.losses[self.trainer.global_step - 1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def go(folder, losses, steps, epochs=None, ckpt_path=None, **options):
    trainer = Trainer(
        **{"max_steps": steps, "max_epochs": epochs, "callbacks": [LastCheckpoint()], "default_root_dir": folder},
        **{"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"},
        **{"plugins": [SafeCheckpointIO()], "check_val_every_n_epoch": None, "val_check_interval": 1, **options},
    )
    trainer.fit_loop = RunLoop(trainer)
    loader = torch.utils.data.DataLoader([torch.zeros(1)] * 4, batch_size=1)
    trainer.fit(Line(losses), loader, loader, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def test_the_best_and_the_one_before_the_last_are_kept(tmp_path):
    losses = [3.0, 1.0, 2.0, float("nan"), 9.0]  # step 2 is the best; then it diverges
    go(tmp_path, losses, 5)
    kept = {path.stem: read(path)["global_step"] for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"last": 5, "previous": 4, "best": 2}
    go(tmp_path, [*losses, 1.5, 0.5, 0.7], 6, ckpt_path=tmp_path / "checkpoints/last.ckpt")
    assert read(tmp_path / "checkpoints/best.ckpt")["global_step"] == 2  # 1.5 is no better
    go(tmp_path, [*losses, 1.5, 0.5, 0.7], 8, ckpt_path=tmp_path / "checkpoints/last.ckpt")
    kept = {path.stem: read(path)["global_step"] for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"last": 8, "previous": 7, "best": 7}


@pytest.mark.parametrize("epochwise", [False, True])
def test_a_run_of_epochs_is_saved_at_each_validation(tmp_path, epochwise, saves):
    options = {"check_val_every_n_epoch": 1, "val_check_interval": 1.0} if epochwise else {"val_check_interval": 100}
    go(tmp_path, [1.0] * 12, -1, 3, **options)
    assert [step for step, _ in saves] == ([4, 8, 12] if epochwise else [12])


def test_a_run_saves_by_the_clock_between_distant_intervals(tmp_path, saves, monkeypatch):
    minutes = iter(range(0, 10_000, 7))
    clock = Namespace(monotonic=lambda: 60.0 * next(minutes))
    monkeypatch.setattr("diffusion_lit.callbacks.checkpoint.time", clock)
    go(tmp_path, [1.0] * 12, 6, val_check_interval=100)
    assert len(saves) > 1 and saves[-1][0] == 6
    with pytest.raises(ValueError, match="every_n_minutes is nan"):
        LastCheckpoint(every_n_minutes=float("nan"))


def test_what_was_logged_before_a_checkpoint_is_on_the_disk_when_the_run_is_killed(lightning, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen, save = {}, LastCheckpoint._save_checkpoint

    def look(self, trainer, path):
        save(self, trainer, path)  # SIGKILL here would leave what now lies on the disk
        shutil.copytree(RUN, f"killed_{trainer.global_step}", dirs_exist_ok=True)
        events = EventAccumulator(f"killed_{trainer.global_step}", size_guidance={"scalars": 0})
        events.Reload()
        seen[trainer.global_step] = [event.step for event in events.Scalars("train/loss")]

    monkeypatch.setattr(LastCheckpoint, "_save_checkpoint", look)
    lightning("fit", *FIT, "--trainer.max_steps=5", "--checkpoint.every_n_train_steps=2")
    assert seen[2] == [0, 1] and seen[4] == [0, 1, 2, 3] and seen[5] == [0, 1, 2, 3, 4]
    assert read("killed_4/checkpoints/last.ckpt")["global_step"] == 4


# Averages, budgets and numbers


@pytest.mark.parametrize("second", [EMAWeightAveraging(), StochasticWeightAveraging(0.1)])
def test_a_second_average_is_refused(tmp_path, second):
    trainer = Trainer(
        max_steps=1, callbacks=[EMA(), second], default_root_dir=tmp_path, logger=False, accelerator="cpu"
    )
    with pytest.raises(ValueError, match=f"Two averages .* {type(second).__name__} in trainer.callbacks is a second"):
        trainer.fit(Line([1.0]), torch.utils.data.DataLoader([torch.zeros(1)] * 4))


def test_a_second_average_is_one_sentence(lightning, capsys):
    more = "--trainer.callbacks=[{class_path: lightning.pytorch.callbacks.EMAWeightAveraging}]"
    assert "Two averages" in told(capsys, lightning, "fit", *FIT, "--trainer.max_steps=1", more)


def test_counts_without_measure_are_refused():
    for make, words in (
        (lambda: Trajectory(count=10**9), "trajectory.count is 1000000000"),
        (lambda: Trajectory(columns=10**9), "trajectory.columns is 1000000000"),
        (lambda: SampleGrid(rows=10**5, columns=10**5), "100000 rows of 100000 columns"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


@pytest.mark.medium
def test_what_a_run_says(lightning, capsys, recwarn):
    """The line of a budget of time, of a run that trains nothing, and none about FLOPs and the chosen precision."""
    lightning("fit", *FIT, "--trainer.max_steps=10", "--trainer.max_time=00:00:10:00")
    said = capsys.readouterr().out
    decay = yaml.safe_load(DIGITS.read_text())["model"]["init_args"]["lr_scheduler"]["init_args"]["decay_fraction"]
    assert (
        f"max_time may end the run before its learning rate has decayed: it does from step {round(10 * (1 - decay))} to"
        in said
    )
    assert "Nothing was trained" not in said
    for steps in (10, 4):
        lightning("fit", *FIT, f"--trainer.max_steps={steps}", "--ckpt_path=last")
        said = capsys.readouterr().out
        assert f"Nothing was trained: the run stood at step 10, and trainer.max_steps is {steps}" in said
    lightning("fit", *FIT, "--trainer.max_steps=11", "--ckpt_path=last", "--trainer.enable_model_summary=true")
    said = capsys.readouterr().out
    assert "max_time" not in said and "flops" not in said.lower().replace("gflop", "")
    count = sum(weight.numel() for weight in load_module(LAST).parameters())
    assert f"{count:,}" in next(line for line in said.splitlines() if line.startswith("Total"))
    RUN.parent.rename("runs/renamed")
    lightning("fit", *FIT, "--name=renamed", "--trainer.max_steps=12", "--ckpt_path=last")
    assert not [one for one in recwarn if "model summary" in str(one.message) or "dirpath" in str(one.message)]


def test_a_learning_rate_that_waits_for_what_is_never_measured_is_refused(lightning, capsys):
    plateau = "--model.init_args.lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau"
    said = told(capsys, lightning, "fit", *FIT, plateau, "--trainer.limit_val_batches=0", "--trainer.max_steps=3")
    assert "ReduceLROnPlateau waits for val/loss" in said


# Checkpoints that cannot be continued


@pytest.mark.medium
def test_files_that_training_cannot_go_on_from_are_one_sentence(lightning, trained_once, capsys):
    trained_once("fit", *FIT, "--trainer.max_steps=1")
    whole = read(LAST)
    bare = {key: whole[key] for key in ("state_dict", "hyper_parameters", "epoch", "global_step")}
    torch.save(bare, "bare.ckpt")
    assert "holds weights without the state" in told(
        capsys, lightning, "fit", *FIT, "--trainer.max_steps=2", "--ckpt_path=bare.ckpt"
    )
    for field, value in (
        *[("hyper_parameters", None), ("state_dict", [1]), ("loops", 3), ("callbacks", None), ("global_step", "one")],
        *[("optimizer_states", {}), ("lr_schedulers", None), ("current_model_state", []), ("diffusion_lit", None)],
        *[("optimizer_states", [3]), ("optimizer_states", [{"state": 3}]), ("state_dict", {"a": 1})],
        *[("loops", {"fit_loop": 3}), ("callbacks", {"EMA": None})],
    ):
        torch.save({**whole, field: value}, "malformed.ckpt")
        said = told(capsys, lightning, "fit", *FIT, "--trainer.max_steps=2", "--ckpt_path=malformed.ckpt")
        assert field in said and "malformed.ckpt" in said
        if field != "optimizer_states":  # only training reads it
            assert field in told(capsys, lightning, "sample", "--ckpt_path=malformed.ckpt", "--num_samples=1")


# Which checkpoint is meant


@pytest.mark.medium
def test_every_command_understands_last_best_and_folders(lightning, capsys, tmp_path):
    lightning("fit", *FIT, "--trainer.max_steps=2", "--trainer.val_check_interval=1")
    best = read(RUN / "checkpoints/best.ckpt")["global_step"]
    for given, name in (
        ("last", "last"),
        ("best", "best"),
        ("runs/run", "last"),
        (str(RUN), "last"),
        ("runs/run/best", "best"),
    ):
        lightning("sample", f"--ckpt_path={given}", "--num_samples=1", f"--out=out_{name}")
        assert f"Using {RUN}/checkpoints/{name}.ckpt" in capsys.readouterr().out
        lightning("export", f"--ckpt_path={given}", f"--out=export_{name}")
        assert read_checkpoint(f"export_{name}")["global_step"] == {"last": 2, "best": best}[name]
        if given not in ("last", "runs/run/best"):
            continue
        lightning("edit", "forward", f"--ckpt_path={given}", "--out=edited", "--sigmas=[1]")
        lightning("report", f"--ckpt_path={given}", "--out=page.html")
        capsys.readouterr()
        lightning("validate", *FIT, f"--ckpt_path={given}")
        said = capsys.readouterr().out
        assert f"Using {RUN}/checkpoints/{name}.ckpt" in said and "val/loss" in said
    lightning("report", "--run=last")
    assert (RUN / "report.html").is_file()
    lightning("fit", *FIT, "--trainer.max_steps=3", "--ckpt_path=best")
    assert sorted(path.name for path in Path("runs/run").iterdir()) == ["version_0"]
    assert read(LAST)["global_step"] == 3


def test_the_run_that_was_trained_last_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no run below runs"):
        find_checkpoint("last")
    for age, place in enumerate(["b/version_0", "a/x/version_1", "a/x/version_0"]):
        path = Path("runs", place, "checkpoints/last.ckpt")
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (age, age))
    assert find_checkpoint("last") == Path("runs/a/x/version_0/checkpoints/last.ckpt")
    assert find_checkpoint("runs/a/x") == Path("runs/a/x/version_1/checkpoints/last.ckpt")
    assert find_checkpoint("last", Path("runs/b")) == Path("runs/b/version_0/checkpoints/last.ckpt")
    with pytest.raises(ValueError, match=r"best\.ckpt"):
        find_checkpoint("best")
    Path("last").touch()  # a file of that name is that file
    assert find_checkpoint("last") == Path("last")
    assert find_checkpoint("x/y.ckpt") == Path("x/y.ckpt")


@pytest.mark.medium
def test_test_and_predict_leave_their_own_folder_and_keep_the_samples(lightning, trained_once, capsys):
    said = told(capsys, lightning, "test", *FIT)
    assert "--ckpt_path" in said and not Path("runs").exists()
    trained_once("fit", *FIT, "--trainer.max_steps=1")
    for command in ("validate", "test", "predict"):
        lightning(
            command, *FIT, "--ckpt_path=last", "--trainer.limit_predict_batches=2", "--trainer.limit_test_batches=2"
        )
    assert sorted(path.name for path in Path("runs/run").iterdir()) == ["version_0"]
    assert list((RUN / "test").glob("events*")) and len(list(RUN.glob("events*"))) == 1
    kept = np.load(RUN / "predict/samples.npz")
    assert kept["arr_0"].shape == (32, 8, 8, 1) and kept["labels"].shape == (32,)
    assert sorted(path.name for path in (RUN / "predict").iterdir()) == ["grid.png", "samples.npz"]
    module = load_module(LAST)
    drawn = module.generate(range(32), torch.from_numpy(kept["labels"]))
    expected = ((drawn + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(expected - kept["arr_0"]).max() <= 1
    Image.open(RUN / "predict/grid.png").verify()
