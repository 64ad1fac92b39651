"""The shared helper of the studies, and the plumbing of the first of them, on tiny settings in this process."""

import csv
import json
import math
import re
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard import context
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams.backend_context import Context

from diffusion_lit.commands.configs import find_config
from diffusion_lit.diffusion.generate import Sampling
from diffusion_lit.diffusion.preconditioning import X0Preconditioning
from diffusion_lit.report.images import grid_image
from experiments import studies, sweep
from experiments.benchmarks.entries import read_entry
from experiments.harness import runs
from experiments.harness.runs import Failed, Run, Trained, grid, label_of
from experiments.harness.study import QUIET, image_rows, main, markdown, split
from experiments.learning_rates import learning_rates, scheduler
from experiments.noise_cutoff import noise_cutoff, sharpness
from experiments.schedules import schedules
from experiments.single_step_denoiser import keep, single_step_denoiser
from experiments.toy_diffusion import toy_diffusion
from experiments.variance import diversity, variance

CONFIG = "configs/ddpm_digits.yaml"
TINY = {
    **QUIET,
    "trainer.max_steps": 2,
    "trainer.val_check_interval": 2,
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": False,
    "trainer.enable_model_summary": False,
    "loss_by_noise_level.batches": 0,
    "trainer.limit_val_batches": 2,
    "data.init_args.batch_size": 8,
    "model.init_args.net.init_args.model_channels": 8,
}
FAKE = """
import os, pathlib, sys, time
options = dict(word[2:].split("=", 1) for word in sys.argv[2:] if word.startswith("--"))
folder = pathlib.Path(options["trainer.logger.init_args.save_dir"]) / options["name"]
(folder / "version_0" / "checkpoints").mkdir(parents=True, exist_ok=True)
print("GPU", os.environ.get("CUDA_VISIBLE_DEVICES"), "ckpt_path", options.get("ckpt_path"))
(folder / "version_0" / "checkpoints" / "last.ckpt").write_text("state")
meet = options.get("meet")
if meet:  # wait until as many others are here, at the same time
    (pathlib.Path(meet) / options["name"]).touch()
    until = time.time() + 20
    while len(list(pathlib.Path(meet).iterdir())) < 2:
        if time.time() > until:
            sys.exit(3)
        time.sleep(0.02)
if options.get("fail") == "true" and not os.environ.get("REPAIRED"):
    print("diffusion-lit: The learning rate is a tomato.", file=sys.stderr)
    sys.exit(2)
"""


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A command that leaves what `diffusion-lit fit` does without doing it."""
    monkeypatch.setattr(runs, "COMMAND", [sys.executable, "-c", FAKE])
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Runs `diffusion-lit fit` in this process and in an empty folder: a new process would take seconds to import."""

    def run(self, command, stdout, **options):
        from diffusion_lit.commands.main import main as lightning

        try:
            lightning(command[len(runs.COMMAND) :])
        except SystemExit as stopped:
            stdout.write(f"diffusion-lit: exit {stopped.code}\n")
            return stopped.code
        return 0

    monkeypatch.setattr(runs.Children, "run", run)
    monkeypatch.setattr("experiments.harness.show.DPI", 40)
    monkeypatch.setenv("DIFFUSION_LIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(study, figures, tables):
    """What every study leaves: a page with its finding, figures that are images, tables, and a record."""
    record = json.loads((study.folder / "study.json").read_text())
    page = (study.folder / "index.html").read_text()
    assert record["findings"] == study.findings and len(study.findings) == 1
    assert len(study.findings[0]) > 40 and study.findings[0].endswith(".") and study.title in page
    assert not record["failed"] and record["seconds"]["training"] >= 0
    for name in figures:
        with Image.open(study.folder / f"{name}.png") as image:
            assert image.width > 100 and len(set(image.convert("L").getdata())) > 2
    assert set(figures) <= {Path(figure["file"]).stem for figure in record["figures"]}
    found = {}
    for name in tables:
        with (study.folder / f"{name}.csv").open() as file:
            found[name] = list(csv.DictReader(file))
        assert (study.folder / f"{name}.md").read_text().count("\n") == len(found[name]) + 2
    return found


def test_a_grid_is_every_combination():
    assert list(grid({"a": [1, 2], "b": [True]})) == [{"a": 1, "b": True}, {"a": 2, "b": True}]
    assert list(grid({})) == [{}]
    options = {"x.lr": 1e-3, "model.schedule": "diffusion_lit.diffusion.CosineSchedule", "y": {"class_path": "a.B"}}
    assert label_of(options) == "lr=0.001,schedule=CosineSchedule,y=B"


def test_a_key_changes_with_all_that_a_run_is_configured_by(tmp_path):
    (tmp_path / "net.yaml").write_text("a: 1")
    config = tmp_path / "x.yaml"
    config.write_text("model: {init_args: {net: net.yaml}}")
    key = Run("x", str(config)).key
    assert key == Run("another name", str(config)).key != Run("x", str(config), {"trainer.max_steps": 3}).key
    (tmp_path / "net.yaml").write_text("a: 2")
    changed = Run("x", str(config)).key
    config.write_text("model: {init_args: {net: other.yaml}}")
    assert len({key, changed, Run("x", str(config)).key}) == 3
    with pytest.raises(ValueError, match=r"There is no config nowhere\.yaml"):
        _ = Run("x", "nowhere.yaml").key


def test_a_failed_run_is_told_and_loses_no_other_and_what_is_done_is_not_done_again(fake, monkeypatch):
    several = [Run("a", CONFIG), Run("b", CONFIG, {"fail": True}), Run("c, d", CONFIG)]
    said = []
    results = runs.fit(several, fake, tell=said.append)
    assert [type(result) for result in results] == [Trained, Failed, Trained]
    assert results[1].reason == "The learning rate is a tomato."
    assert any("b: FAILED, The learning rate is a tomato." in line for line in said)
    assert results[2].folder.parent.name == f"c,_d-{several[2].key}" and results[2].ckpt_path.read_text() == "state"
    monkeypatch.setenv("REPAIRED", "1")
    said.clear()
    results = runs.fit(several, fake, tell=said.append)
    assert all(isinstance(result, Trained) for result in results)
    assert said[0] == "2 of 3 runs are done already." and said[1].startswith("b: goes on") and len(said) == 3
    log = (several[1].folder(fake) / "log.txt").read_text()
    assert log.count("$ diffusion-lit fit") == 2 and log.rstrip().endswith("ckpt_path last")
    record = json.loads((several[1].folder(fake) / "run.json").read_text())
    assert record["status"] == 0 and record["key"] == several[1].key


def test_jobs_run_at_the_same_time_and_each_has_its_gpu(fake, tmp_path):
    (tmp_path / "meet").mkdir()
    several = [Run(name, CONFIG, {"meet": str(tmp_path / "meet")}) for name in "ab"]
    results = runs.fit(several, fake, gpus=[3, 5])
    assert all(isinstance(result, Trained) for result in results)
    gpus = {(run.folder(fake) / "log.txt").read_text().split("GPU ")[1][0] for run in several}
    assert gpus == {"3", "5"}


def test_what_cannot_be_run_is_refused(fake):
    with pytest.raises(ValueError, match="Two runs are called a"):
        runs.fit([Run("a", CONFIG), Run("a", CONFIG, {"x": 1})], fake)
    with pytest.raises(ValueError, match="jobs is 0"):
        runs.fit([Run("a", CONFIG)], fake, jobs=0)


def test_options_of_lightning_are_told_from_a_studys_own(capsys):
    words = ["--num_steps", "5", "--data.init_args.root", "FOLDER", "--trainer.max_steps=3", "--jobs=2"]
    assert split(words) == (
        ["--num_steps", "5", "--jobs=2"],
        {"data.init_args.root": "FOLDER", "trainer.max_steps": "3"},
    )
    with pytest.raises(SystemExit):
        split(["--trainer.max_steps"])
    assert "--trainer.max_steps needs a value" in capsys.readouterr().err


@pytest.mark.medium
def test_a_sweep_is_one_yaml(here, capsys):
    Path("mine.yaml").write_text(
        f"config: {CONFIG}\n"
        f"options: {json.dumps(TINY)}\n"
        "grid: {model.init_args.optimizer.init_args.lr: [0.01, 0.001]}\n"
        "runs:\n"
        "  cosine: {model.init_args.schedule: diffusion_lit.diffusion.CosineSchedule}\n"
    )
    study = main(sweep.sweep, "unused", args=["--config=mine.yaml"])
    rows = check(study, ["curves"], ["table"])["table"]
    assert [row["run"] for row in rows] == ["cosine,lr=0.01", "cosine,lr=0.001"]
    best = min(rows, key=lambda row: float(row["val/loss"]))
    assert f"{best['run']} has the lowest val/loss, {float(best['val/loss']):.4g}" in study.findings[0]
    assert study.folder == Path("runs/studies/sweep-mine")

    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory("runs")
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, "runs")
    board = Context(base_plugin.TBContext(data_provider=provider, logdir="runs", multiplexer=multiplexer))
    request = context.RequestContext()
    experiment = board.experiment_from_metadata(request, "x", True, board.hparams_metadata(request, "x"), [])
    assert {info.name for info in experiment.hparam_infos} >= {"model.optimizer.lr", "model.schedule.class_path"}
    assert "val/loss" in {info.name.tag for info in experiment.metric_infos}

    with pytest.raises(SystemExit) as stopped:
        main(sweep.sweep, "unused", args=["--config=mine.yaml", "--metric=fid"])
    assert stopped.value.code == 2 and "logged no fid; choose one of" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, told",
    [
        ("grid: {a: [1]}", "is no sweep; it needs a line such as config:"),
        ("config: a.yaml\nruns: [fast, slow]", "says runs: .*but options stand there"),
        ("config: a.yaml\nruns: {fast: 3}", "says runs: fast: 3"),
        ("config: a.yaml\ngrid: {a: 3}", "says grid: a: 3, but a list"),
        ("config: a.yaml\ngird: {a: [1]}", "says gird, but a sweep has config, options, grid, runs"),
        ("a: [", "cannot be read as a sweep"),
    ],
)
def test_what_is_no_sweep_is_refused(tmp_path, text, told):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=told):
        sweep.read(tmp_path / "x.yaml")


@pytest.mark.medium
def test_a_study_whose_trainings_all_fail_says_so_and_one_that_lost_some_ends_with_status_1(here, capsys):
    def broken(study, good: bool = False):
        """Is it broken?"""
        wrong = {"trainer.max_steps": "tomato"}
        study.fit({"wrong": wrong} | ({"right": {}} if good else {}))
        study.finding("One of two is enough to say something that is long enough to be a finding.")

    with pytest.raises(SystemExit) as stopped:
        main(broken, CONFIG, TINY, args=[])
    assert stopped.value.code == 1 and "No training of broken came to its end" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(broken, CONFIG, TINY, args=["--good=true"])
    assert stopped.value.code == 1
    record = json.loads(Path("runs/studies/broken/study.json").read_text())
    assert list(record["failed"]) == ["wrong"] and list(record["runs"]) == ["right"] and record["findings"]


@pytest.mark.medium
def test_toy_diffusion(here):
    options = {key: value for key, value in TINY.items() if key != "trainer.callbacks"}
    args = ["--num_samples=8", "--extractor=pixels", "--num_steps=[1,5]"]
    study = main(toy_diffusion, "configs/studies/toy_diffusion.yaml", options, args=args)
    rows = check(study, ["forward", "denoiser", "five_steps", "samples", "quality"], ["quality"])["quality"]
    assert [row["steps"] for row in rows] == ["1", "5"]
    assert f"with fd_pixels {float(rows[1]['fd_pixels']):.3g} in 5 steps" in study.findings[0]


def test_five_steps_of_the_toy_are_those_of_its_plain_loop():
    net = torch.nn.Conv2d(1, 1, 3, padding=1).double()
    scaling = X0Preconditioning()
    sigmas = Sampling(sampler="euler", num_steps=5, grid="trailing").sigmas(scaling)
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    state, mixed = sigmas[0] * x, x * sigmas[0] / (1 + sigmas[0])
    for step, (sigma, following) in enumerate(pairwise(sigmas)):
        state = net(state / (1 + sigma)) + following / sigma * (state - net(state / (1 + sigma)))
        mixed = mixed + (net(mixed) - mixed) / (5 - step)  # the loop of the usual tutorial
        assert torch.allclose(state / (1 + following), mixed, atol=5e-3)


@pytest.mark.medium
def test_single_step_denoiser(here):
    options = {**TINY, "trainer.limit_train_batches": 2, "trainer.limit_val_batches": 1, "trainer.log_every_n_steps": 1}
    options |= {"data.class_path": "datamodules.Digits", "model.init_args.sampling.num_steps": 2}
    del options["trainer.max_steps"], options["trainer.val_check_interval"], options["trainer.callbacks"]
    args = ["--num_samples=8", "--extractor=pixels", "--epochs=[1,2]", "--ddpm_epochs=[1,2]", "--held_out=16"]
    study = main(single_step_denoiser, "configs/studies/single_step_denoiser.yaml", options, args=args)
    figures = ["one_step", "out_of_distribution", "out_of_distribution_images", "losses"]
    tables = check(study, [*figures, "samples_time_1_1", "samples_time_and_class_2_5"], ["errors", "quality"])
    assert [(row["told"], row["epochs"], row["guidance"]) for row in tables["quality"]] == [
        *(("time", "1", ""), ("time", "2", "")),
        *(("time and class", count, scale) for count in "12" for scale in ("1.0", "5.0")),
    ]
    errors = {float(row["noise"]): row for row in tables["errors"]}
    assert all(math.isclose(float(row["noisy"]), noise**2) for noise, row in errors.items())
    told = float(errors[0.5]["one noise level, 2 epochs"])
    assert f"leaves a squared error of {told:.3g} there" in study.findings[0]


def test_checkpoints_are_kept_after_epochs():
    options = keep(4, 20)
    assert options["trainer.max_epochs"] == 20
    assert options["trainer.callbacks"][0]["init_args"]["every_n_epochs"] == 4


@pytest.mark.medium
def test_schedules(here):
    args = ["--num_samples=8", "--extractor=pixels", "--num_steps=[24]", "--few=3"]
    study = main(schedules, CONFIG, TINY, args=args)
    rows = check(study, ["schedules", "embeddings", "quality", "samples"], ["quality"])["quality"]
    assert [(row["schedule"], row["steps"], row["sampled over"]) for row in rows] == [
        (name, "24", way) for name in ("linear", "cosine") for way in ("3 of them", "all steps")
    ]
    assert f"{float(rows[1]['fd_pixels']):.3g} with the linear schedule" in study.findings[0]


def test_schedules_refuses_what_is_none(here, capsys):
    with pytest.raises(SystemExit):
        main(schedules, CONFIG, TINY, args=["--compared=[quadratic]"])
    assert "There is no schedule 'quadratic'; choose some of linear" in capsys.readouterr().err


@pytest.mark.medium
def test_learning_rates(here):
    options = {**TINY, "trainer.max_steps": 4}  # fewer than the config logs at
    options["model.init_args.sampling.num_steps"] = 3
    args = ["--num_samples=8", "--extractor=pixels", "--rates=[0.001]", "--decays=[none,plateau,exponential,cosine]"]
    study = main(learning_rates, CONFIG, options, args=args)
    figures = ["loss", "quality", "summary_0.001, plateau", "detailed_0.001, cosine"]
    rows = check(study, figures, ["quality"])["quality"]
    assert [row["learning rate"] for row in rows] == [
        f"0.001, {decay}" for decay in ("none", "plateau", "exponential", "cosine")
    ]
    assert all(any(name.startswith("lr-") for name in run.curves) for run in study.trained.values())
    best = min(rows, key=lambda row: float(row["fd_pixels"]))
    assert f"{best['learning rate']} is best with fd_pixels {float(best['fd_pixels']):.3g}" in study.findings[0]


def test_decays_fall_as_they_say():
    parameter = torch.nn.Parameter(torch.zeros(1))
    for decay, end in (("exponential", 0.1), ("cosine", 0.0)):
        made = scheduler(decay, 50)
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        schedule = getattr(torch.optim.lr_scheduler, made["class_path"].rpartition(".")[2])(
            optimizer, **made["init_args"]
        )
        for _ in range(50):
            optimizer.step()
            schedule.step()
        assert math.isclose(optimizer.param_groups[0]["lr"], end, abs_tol=1e-6)
    with pytest.raises(ValueError, match="There is no decay 'linear'"):
        scheduler("linear", 50)


@pytest.mark.medium
def test_noise_cutoff_and_variance(here):
    args = ["--num_samples=8", "--extractor=pixels", "--num_steps=4"]
    study = main(noise_cutoff, CONFIG, TINY, args=[*args, "--until=[0,4]"])
    rows = check(study, ["quality", "samples"], ["quality"])["quality"]
    assert [row["noise until"] for row in rows] == ["0", "4"] and rows[0]["fd_pixels"] != rows[1]["fd_pixels"]
    assert rows[0]["sharpness"] != rows[1]["sharpness"]
    study = main(variance, CONFIG, TINY, args=[*args, "--scales=[0,4]"])
    rows = check(study, ["quality", "samples"], ["quality"])["quality"]
    assert [row["variance"] for row in rows] == ["posterior x 0", "posterior", "learned", "beta", "posterior x 4"]
    assert len({row["fd_pixels"] for row in rows}) == 5


def test_sharpness_of_noise_and_of_nothing():
    noise = (127.5 + 20 * torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))).round()
    assert math.isclose(sharpness(noise.to(torch.uint8)), 20 * (20 / 127.5) ** 2, rel_tol=0.02)
    ramp = torch.arange(16).repeat(16, 1)[None, None] * 10
    assert sharpness(ramp.to(torch.uint8)) < 1e-10


def test_diversity_is_the_spread_within_classes():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4000) % 2
    features = 3 * torch.randn(4000, 5, generator=generator) + 100 * labels[:, None]
    assert math.isclose(diversity(features, labels), 3 * math.sqrt(5), rel_tol=0.02)
    assert diversity(features, None) > 100
    assert diversity(torch.ones(6, 5), labels[:6]) == 0


def test_rows_of_images_and_tables():
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    sheet = image_rows({"a": images, "b": (images * 127.5 + 127.5).to(torch.uint8)}, ["x", "y", "z"])
    body = np.asarray(grid_image(torch.cat([images, images]), 3)).astype(int)
    height, width = body.shape[:2]
    assert sheet.width > width and sheet.height > height  # names to the left, titles above
    assert abs(np.asarray(sheet)[-height:, -width:].astype(int) - body).max() <= 1
    assert np.asarray(sheet)[:-height].min() < 100 < 200 < np.asarray(sheet)[-height:, :4].min()
    told = markdown([{"a": "x", "b": 1.23456}, {"a": "y", "b": None}])
    assert told == "| a | b |\n| --- | ---: |\n| x | 1.235 |\n| y |  |\n"


def test_all_studies_run_though_one_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    asked = []

    def run(command, cwd):
        name = command[2].removeprefix("experiments.")
        asked.append(name)
        folder = Path("runs/studies") / name
        folder.mkdir(parents=True)
        if name != "schedules":
            record = {"name": name, "title": f"Why {name}?", "findings": [f"{name} is 4 < 5."], "command": "python"}
            record |= {"seconds": {"training": 1.0}, "hardware": {"processor": "P", "threads": 1}, "failed": {}}
            Image.new("L", (10, 10)).save(folder / "a.png")
            (folder / "study.json").write_text(json.dumps({**record, "figures": [{"file": "a.png", "caption": "A"}]}))
        return type("Done", (), {"returncode": int(name == "schedules")})

    monkeypatch.setattr(studies.subprocess, "run", run)
    with pytest.raises(SystemExit) as stopped:
        studies.studies()
    assert stopped.value.code == 1 and asked == studies.STUDIES
    assert "Failed: schedules" in capsys.readouterr().err
    page = Path("runs/studies/index.html").read_text()
    assert "variance is 4 &lt; 5." in page and "Why variance?" in page
    assert page.index("toy_diffusion") < page.index("variance") and "Why schedules?" not in page
    with pytest.raises(ValueError, match="There is no study 'tomato'"):
        studies.studies(only="tomato")


def test_every_study_of_the_list_can_be_run():
    for name in studies.STUDIES:
        assert (Path(studies.__file__).parent / f"{name}.py").exists(), name


def blocks(language):
    """The blocks of code of a language that docs/studies.md prints."""
    text = (Path(studies.__file__).parent.parent / "docs" / "studies.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_study_that_the_documentation_prints_works_as_printed(here):
    (printed,) = blocks("python")
    names = {"__name__": "widths"}
    exec(printed, names)
    args = ["--num_samples=8", "--extractor=pixels", "--channels=[8]"]
    study = main(names["widths"], CONFIG, {**TINY, "model.init_args.sampling.num_steps": 3}, args=args)
    (row,) = check(study, [], ["quality"])["quality"]
    assert study.findings == [f"8 channels are best, with fd_pixels {float(row['fd_pixels']):.3g}."]
    assert study.title == "Is a wider network better at the same number of steps?"


def test_the_sweep_and_the_entry_that_the_documentation_prints_are_such(tmp_path):
    printed, entry = blocks("yaml")
    (tmp_path / "my_net.py").write_text("")
    (tmp_path / "entry.yaml").write_text(entry)
    assert read_entry(str(tmp_path / "entry.yaml"), "fashion_mnist").options == {
        "model.init_args.sampling.num_steps": 10
    }
    (tmp_path / "x.yaml").write_text(printed)
    config, shared, variants = sweep.read(tmp_path / "x.yaml")
    assert find_config(config).name == "ddpm_digits.yaml" and shared == {"trainer.max_steps": 300}
    assert list(variants) == ["lr=0.003", "lr=0.0003"]


CONFIGS = sorted((Path(studies.__file__).parent.parent / "configs" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_a_study_says_what_it_is_and_is_a_sweep_or_an_experiment(config):
    comment = "\n".join(line for line in config.read_text().splitlines() if line.startswith("#"))
    for word in (f"configs/studies/{config.name}", "Run:", "Cost:", "Expect:"):
        assert word in comment
    content = yaml.safe_load(config.read_text())
    if "config" in content:
        assert find_config(sweep.read(config)[0]).exists()
    else:
        assert {"trainer", "data", "model"} <= content.keys()
