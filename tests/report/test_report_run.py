"""`diffusion-lit report`: pages of real, tiny runs that are over, were stopped, go on or are damaged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.html import Reader
from helpers.project_files import write_idx
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from diffusion_lit.report.curves import draw, panels, scales, title
from diffusion_lit.report.events import read_history
from diffusion_lit.report.facts import describe, duration, magnitude, receipts
from diffusion_lit.report.run_page import RunPage

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
SMALL = [
    *[*QUIET, "--trainer.callbacks=[]", "--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1"],
    *["--data.init_args.batch_size=16", "--sample_grid.columns=1", "--sample_grid.rows=1", "--trajectory.count=1"],
    "--trainer.limit_val_batches=3",
]
DIGITS = [
    *["fit", "--config", str(CONFIGS / "edm_digits.yaml"), *SMALL, "--loss_by_noise_level.batches=1"],
    *["--model.init_args.net.init_args.model_channels=16", "--model.init_args.sampling.num_steps=2"],
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of four steps that was continued to the sixth, and an evaluation of it."""
    from diffusion_lit.commands.main import main

    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        main([*DIGITS, "--trainer.max_steps=4"])
        main([*DIGITS, "--trainer.max_steps=6", "--ckpt_path=last"])
        run = "runs/edm_digits/version_0"
        given = ["--ckpt_path", f"{run}/checkpoints/last.ckpt", "--num_samples=20", "--out", f"{run}/report.json"]
        main(["evaluate", *given, "--num_steps=2,3", "--extractor=pixels", "--accelerator=cpu", "--memorization"])
    return folder


@pytest.fixture
def run(trained, lightning, tmp_path):
    """A copy of the run in the current folder."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path / "runs/edm_digits/version_0"


def page_of(lightning, folder, **options):
    lightning("report", "--run", folder, *(f"--{name}={value}" for name, value in options.items()))
    return Reader((folder / "report.html").read_text())


def stopped(capsys, run, *args):
    with pytest.raises(SystemExit) as caught:
        run(*args)
    assert caught.value.code == 2
    return capsys.readouterr().err


def events(folder):
    return sorted(folder.glob("events.out.tfevents.*"))


@pytest.mark.medium
def test_a_run_that_is_over(lightning, run, tmp_path):
    read = page_of(lightning, run)
    text = read.text
    assert "edm_digits/version_0" in text
    assert "EDM with UNet on Digits; step 6 of 6" in text
    headings = {"Result", "Curves", "Samples over time", "Trajectory", "Evaluation", "Cost", "Configuration"}
    assert headings <= set(read.words)
    images = list(read.images())
    assert {image.format for _, image in images} == {"PNG", "GIF"}
    alts = [attributes["alt"] for attributes, _ in images]
    assert [alt for alt in alts if alt.startswith("step ")] == ["step 2", "step 4", "step 6"]
    assert [f"Loss against the training step, {scale} scale" in alts for scale in ("linear", "logarithmic")] == [
        True
    ] * 2
    assert all(attributes["src"].startswith("data:") for attributes in read.all("img"))
    assert "http" not in (run / "report.html").read_text().split("</style>")[1].split("config.yaml, whole")[0]

    weights = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    count = sum(value.numel() for value in weights.values())
    assert f"in the network ({count:,})" in text
    assert "about 96 in batches of 16" in text
    assert "in 2 sessions" in text
    assert "training in" in text.split("hardware")[-1]  # recorded by the run itself
    first = (run / "report.html").read_bytes()
    lightning("report", "--run", tmp_path / "runs/edm_digits")
    assert (run / "report.html").read_bytes() == first


def test_figures_are_those_of_tensorboard(lightning, run):
    log = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    last = log.Scalars("val/loss")[-1]
    read = page_of(lightning, run)
    assert f"{last.value:.4g}" in read.words
    history = read_history(run)
    for tag in log.Tags()["scalars"]:
        points = {event.step + 1: event.value for event in log.Scalars(tag)}
        steps, values = history.scalars[tag]
        assert dict(zip(steps.tolist(), values.tolist(), strict=True)) == pytest.approx(points)


@pytest.mark.medium
def test_evaluations_are_found_where_they_name_the_run(lightning, run, tmp_path):
    receipt = json.loads((run / "report.json").read_text())
    figures = receipt["results"][0]["references"]["train"]["figures"]
    text = page_of(lightning, run).text
    assert f"{figures['fd_pixels']['mean']:.4g}" in text
    for words in ("heun, 2 steps, cfg 1", "real against real, n = 20", "nearest is training", "Quality against cost."):
        assert words in text
    (run / "report.json").rename(tmp_path / "elsewhere.json")
    (run / "notes.json").write_text("[1, 2]")
    (run / "half.json").write_text('{"checkpoint": {"file": "x", "sha256": "y"}}')
    receipt["checkpoint"] |= {"file": "moved/last.ckpt"}
    (tmp_path / "elsewhere.json").write_text(json.dumps(receipt))
    receipt["checkpoint"] |= {"sha256": "0" * 64}
    (tmp_path / "another.json").write_text(json.dumps(receipt))
    clipped = [warning for warning in receipt["warnings"] if "overshot" in warning]
    assert all(warning.startswith(("heun, 2 steps, cfg 1", "heun, 3 steps, cfg 1")) for warning in clipped)
    assert clipped  # six steps of training give noise
    found = {path.name for path, _ in receipts(run)}
    assert found == {"elsewhere.json", "half.json"}  # by the hash of the checkpoint, and by where it lies
    receipt["checkpoint"] |= {"file": str(run / "checkpoints/last.ckpt"), "step": None, "weights": "as exported"}
    (tmp_path / "elsewhere.json").write_text(json.dumps(receipt))
    assert "last.ckpt, weights: as exported; samples" in page_of(lightning, run).text
    (tmp_path / "elsewhere.json").unlink()
    assert "half.json is not a whole report of diffusion-lit evaluate." in page_of(lightning, run).text


def test_a_continued_run_replaces_what_it_trained_again(tmp_path):
    for values, suffix in (([0.0, 1.0, 2.0, 3.0], ".1"), ([20.0, 30.0, 40.0], ".2")):
        with SummaryWriter(str(tmp_path), filename_suffix=suffix) as writer:
            start = 0 if suffix == ".1" else 2
            for step, value in enumerate(values, start=start):
                writer.add_scalar("train/loss", value, step)
                if suffix == ".1" and step == 3:
                    writer.add_scalar("val/loss", 3.0, step)
    for number, path in enumerate(events(tmp_path)):
        path.rename(path.with_name(f"events.out.tfevents.{1000 + number}.host"))
    history = read_history(tmp_path)
    steps, values = history.scalars["train/loss"]
    assert (steps.tolist(), values.tolist()) == ([1, 2, 3, 4, 5], [0, 1, 20, 30, 40])
    assert "val/loss" not in history.scalars  # it was measured on what was then trained again
    assert history.last_step == 5


def test_a_truncated_event_file_costs_what_comes_after_the_damage(lightning, run, capsys):
    path = events(run)[-1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    read = page_of(lightning, run)
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    for told in (read.text, said.out):
        assert f"{path.name} ends within a record or is damaged, or is being written to" in told
    assert {"Curves", "Samples over time"} <= set(read.words)


@pytest.mark.parametrize("damage", ["none", "cut", "flipped", "length", "empty", "text"])
def test_an_event_file_is_read_up_to_its_damage(tmp_path, damage):
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(100):
            writer.add_scalar("train/loss", step, step)
    (path,) = events(tmp_path)
    content = path.read_bytes()
    half = len(content) // 2
    flipped = bytes([content[half] ^ 0xFF])
    damaged = {
        "none": content,
        "cut": content[:half],
        "flipped": content[:half] + flipped + content[half + 1 :],
        "length": content[:-40] + b"\xff" * 40,
        "empty": b"",
        "text": b"no events at all, but a text file that somebody put here",
    }
    path.write_bytes(damaged[damage])
    history = read_history(tmp_path)
    assert history.sessions[0].whole == (damage in ("none", "empty"))
    _, values = history.scalars.get("train/loss", ([], torch.empty(0)))
    assert values.tolist() == list(range(len(values)))
    least, most = {"none": (100, 100), "length": (90, 99), "empty": (0, 0), "text": (0, 0)}.get(damage, (40, 60))
    assert least <= len(values) <= most


def test_a_run_that_just_began(lightning, run):
    for name in ("checkpoints", "samples", "trajectory"):
        shutil.rmtree(run / name)
    for path in (*events(run), run / "report.json"):
        path.unlink()
    text = page_of(lightning, run).text
    for sentence in (
        "The run has no checkpoint checkpoints/last.ckpt yet.",
        "The run has logged no figures and drawn no images yet.",
        "Nothing was logged twice yet.",
        "step 0 of 6",
        "not recorded by this run",
    ):
        assert sentence in text


def test_what_is_damaged_costs_its_own_part(lightning, run):
    (run / "config.yaml").write_text("{ not: [yaml")
    checkpoint = run / "checkpoints/last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    (run / "samples/step_0000006.png").write_bytes(b"")
    (run / "report.json").unlink()
    text = page_of(lightning, run).text
    assert "config.yaml cannot be read." in text
    assert "last.ckpt is not a readable checkpoint" in text
    assert "The image step_0000006.png cannot be read as an image." in text
    assert "val/loss" in text
    assert "No report of diffusion-lit evaluate was found" in text
    (run / "config.yaml").write_text("- a list")
    assert "config.yaml holds no configuration." in RunPage(run).problems
    (run / "config.yaml").unlink()
    assert "The run has no config.yaml." in RunPage(run).problems


@pytest.mark.parametrize(
    ("text", "left_out"),
    [
        ("trainer: [1]", "trainer, which is [1] and must be a mapping"),
        ("trainer: {max_steps: many}", "trainer.max_steps, which is 'many' and must be a whole number"),
        ("trainer: {max_epochs: {a: 1}}", "trainer.max_epochs, which is {'a': 1}"),
        ("trainer: {accumulate_grad_batches: x}", "trainer.accumulate_grad_batches, which is 'x'"),
        ("model: 3", "model, which is 3 and must be a mapping"),
        ("model: {init_args: x}", "model.init_args, which is 'x'"),
        ("data: {init_args: {batch_size: [8]}}", "data.init_args.batch_size, which is [8]"),
        ("model: {init_args: {net: {class_path: 3, init_args: [4]}, x: {1: 2020-01-01}}}", ""),
        ("ema: &a {b: *a}", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("x: !!int ''", "cannot be read"),
    ],
)
def test_an_odd_configuration_is_a_sentence_on_the_page(tmp_path, text, left_out):
    (tmp_path / "config.yaml").write_text(text)
    page = RunPage(tmp_path)
    page.build().write(tmp_path / "page.html")
    assert left_out in " ".join(page.problems)
    assert len(page.problems) == 1 + bool(left_out)  # it has no checkpoint


def test_where_there_is_no_run(lightning, run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "runs/edm_digits/version_7").mkdir()  # made, but nothing in it
    for folder, sentence in (
        ("nowhere", "There is no folder nowhere"),
        ("empty", "empty holds no run"),
        ("runs", "runs holds the runs edm_digits; give one of them"),
        (run / "config.yaml", "is a file; give the run's folder"),
    ):
        said = stopped(capsys, lightning, "report", "--run", folder)
        assert sentence in said
        assert len(said.splitlines()) == 1
    assert "must end in .html" in stopped(capsys, lightning, "report", "--run", run, "--out=page.pdf")
    lightning("report", "--run", "runs/edm_digits", "--out", tmp_path / "page.html")
    assert "Run edm_digits/version_0" in (tmp_path / "page.html").read_text()


@pytest.mark.medium
def test_autoencoders_latent_models_and_classifiers(lightning, tmp_path):
    two = ["--trainer.max_steps=2", "--sample_grid.every=0", "--trajectory.every=0", "--loss_by_noise_level.batches=0"]
    images = [
        '--trainer.callbacks=[{"class_path": "diffusion_lit.callbacks.Reconstructions"}, '
        '{"class_path": "diffusion_lit.callbacks.Interpolations"}]'
    ]
    narrow = ["--model.init_args.net.init_args.model_channels=16"]
    lightning("fit", "--config", CONFIGS / "vae_digits.yaml", *SMALL, *narrow, *two, *images)
    few = ["--model.init_args.sampling.num_steps=2", "--model.init_args.vae_ckpt=runs/vae_digits"]
    lightning("fit", "--config", CONFIGS / "latent_digits.yaml", *SMALL, *narrow, *few, *two, "--trajectory.every=1")
    idx = [f"--data.init_args.root={write_idx(tmp_path / 'idx')}", "--data.init_args.val_size=32"]
    small = ["--model.init_args.net.init_args.width=8", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    lightning("fit", "--config", CONFIGS / "classifier_mnist.yaml", *SMALL, *idx, *small)
    for name, words in {
        "vae_digits": ("VAE with Autoencoder on Digits; step 2 of 2", "Reconstructions", "Interpolations", "val/psnr"),
        "latent_digits": (
            "LatentDiffusion with UNet on Digits; step 2 of 2",
            "From noise to image",
            "in the autoencoder, which is frozen",
        ),
        "classifier_mnist": ("Classifier with ConvClassifier on MNIST; step 2, epoch 1 of 1", "val/accuracy"),
    }.items():
        text = page_of(lightning, tmp_path / f"runs/{name}/version_0").text
        for word in words:
            assert word in text, (name, word)
        assert ("To make one:" in text) == (name != "classifier_mnist")  # which draws nothing to evaluate
    (kl,) = (row for row in RunPage(tmp_path / "runs/vae_digits/version_0")._figures() if row[0] == "val/kl")
    assert kl[3] is None  # neither more nor less of it is better


def test_curves_group_what_belongs_together(tmp_path):
    logged = ("train/loss", "val/loss", "test/loss", "loss_by_sigma/10", "loss_by_sigma/0.1", "lr-AdamW", "epoch")
    more = ("fd_classifier_1k", "fd_classifier_1k_floor", "rfd_classifier_360", "kl_bits_per_dim", "psnr")
    with SummaryWriter(str(tmp_path)) as writer:
        for tag in (*logged, *more):
            for step in range(100 if tag == "train/loss" else 3):
                writer.add_scalar(tag, 0.001 * 10**step if tag == "fd_classifier_1k" else step - 1.0, step)
        writer.add_scalar("train/loss", float("nan"), 100)
    history = read_history(tmp_path)
    found = {panel.name: panel for panel in panels(history)}
    assert list(found)[:2] == ["loss", "loss_by_sigma"]
    assert list(found)[-1] == "lr"
    assert "epoch" not in found
    assert set(found["loss"].tags.values()) == {"train", "val", "test"}
    assert found["fd_classifier_1k"].floor == found["rfd_classifier_360"].floor == "fd_classifier_1k_floor"
    assert found["psnr"].floor is None
    assert history.last("train/loss") == 98.0  # the last that is finite
    kinds = {name: scales(panel, history) for name, panel in found.items()}
    assert kinds["loss"] == ["linear"]  # it is negative here
    assert kinds["fd_classifier_1k"] == ["linear"]  # its floor is negative here
    assert draw(found["loss"], history, "log").axes[0].get_yscale() == "log"
    for tag in ("train/loss", "val/loss", "test/loss", "fd_classifier_1k_floor"):
        history.scalars[tag] = (history.scalars[tag][0], abs(history.scalars[tag][1]) + 0.5)
    assert scales(found["loss"], history) == ["linear", "log"]
    assert scales(found["fd_classifier_1k"], history) == ["log"]
    assert scales(found["psnr"], history) == scales(found["lr"], history) == ["linear"]
    assert draw(found["loss_by_sigma"], history).axes[0].get_legend().get_texts()[0].get_text() == "sigma 0.1"
    assert title("rfd_classifier_360") == "Fréchet distance of reconstructions"


def test_words_for_numbers():
    assert [duration(s) for s in (5.2, 153, 3599, 11100)] == ["5 s", "2 min 33 s", "59 min 59 s", "3 h 5 min"]
    assert [magnitude(n) for n in (42, 755_361, 35_746_307)] == ["42", "755 thousand", "35.7 million"]
    node = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.002, "betas": [0.9, 0.999], "fused": None}}
    assert describe(node) == "AdamW(lr=0.002, betas=[0.9, 0.999])"
