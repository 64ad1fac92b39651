"""Every family with the defaults of its config, everything on, on two ranks: it ends, and it is what one rank makes.

Images, trajectories, FID, averages with snapshots and checkpoints are all on, since what is switched off in a test can
hang for a user. A run that does not end in time fails.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.apart import run_apart
from helpers.configs_tools import DATA, EXPERIMENTS, parts, write_images
from helpers.project_files import ROOT, write_idx
from helpers.runs import logged, read
from PIL import Image

FAMILIES = (
    "edm_digits",
    "ddpm_digits",
    "vae_digits",
    "latent_digits",
    "cold_digits",
    "consistency_digits",
    "meanflow_digits",
    "classifier_mnist",
)
STEPS = ["--trainer.max_steps=4", "--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1"]
EXACT = ["--trainer.accelerator=cpu", "--trainer.precision=32-true"]  # in bf16 the order of sums shows
AVERAGES = ["--ema.half_life=null", "--ema.sigma_rel=[0.05,0.1]", "--ema.snapshot_every=2"]


def fit(folder, config, *options, ranks=1):
    """Runs the command in a process of its own, whose cache is shared within a test."""
    several = [] if ranks == 1 else [f"--trainer.devices={ranks}", "--trainer.strategy=ddp_fork"]
    words = ["fit", f"--config={config}", *several, *EXACT, *options]
    run = run_apart(words, folder, timeout=300, XDG_CACHE_HOME=str(folder / "cache"))
    assert run.returncode == 0, run.stdout[-3000:]
    return run.stdout


def smaller(folder, name, samples):
    """The config as it is, but for the number of samples of its figures."""
    config = yaml.safe_load(Path(ROOT, "configs", f"{name}.yaml").read_text())
    for callback in config["trainer"].get("callbacks", []):
        if callback["class_path"].endswith("FID"):
            callback.setdefault("init_args", {})["num_samples"] = samples
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return folder / f"{name}.yaml"


def make_images(folder):
    """The images of a run by their names."""
    return {str(path.relative_to(folder)): np.asarray(Image.open(path).convert("RGB")).astype(int)
            for path in sorted(folder.rglob("*.png"))}  # fmt: skip


def same_run(one, other, ranks):
    """Whether two runs left the same weights, averages, snapshots, images and figures, up to the order of sums."""
    mine, theirs = (read(folder / "checkpoints/last.ckpt") for folder in (one, other))
    if "classifier" in mine:  # batch norm takes each rank's own images (docs/scaling.md)
        assert tags(one) == tags(other)
        return
    for part in ("state_dict", "current_model_state"):
        for name, value in mine[part].items():
            if value.is_floating_point():
                assert torch.allclose(value, theirs[part][name], atol=2e-3), (ranks, name)
    assert {path.name for path in one.glob("averages/*")} == {path.name for path in other.glob("averages/*")}
    images, others = make_images(one), make_images(other)
    assert images.keys() == others.keys()
    for name, image in images.items():
        assert abs(image - others[name]).mean() < 0.5, (ranks, name)  # of 255 levels
    assert {path.name for path in one.rglob("*.gif")} == {path.name for path in other.rglob("*.gif")}
    for tag in tags(one):
        assert list(logged(one, tag).values()) == pytest.approx(list(logged(other, tag).values()), rel=5e-3), tag


def tags(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    quality = ("val/", "train/loss", "fd_", "fid_", "rfd_", "loss_by_sigma")
    return [tag for tag in events.Tags()["scalars"] if tag.startswith(quality)]


def compare(tmp_path, name, samples, ranks=2):
    more = [*STEPS, *(AVERAGES if "classifier" not in name else [])]
    if name == "classifier_mnist":
        more += [f"--data.init_args.root={write_idx(tmp_path / 'idx', 400)}", "--data.init_args.val_size=40"]
    if name == "latent_digits":
        fit(tmp_path, smaller(tmp_path, "vae_digits", 16), *STEPS, "--name=vae_digits")
    config = smaller(tmp_path, name, samples)
    for count in (1, ranks):
        fit(tmp_path, config, *more, f"--name=on_{count}", ranks=count)
    one, several = (tmp_path / f"runs/on_{count}/version_0" for count in (1, ranks))
    assert not (tmp_path / f"runs/on_{ranks}/version_1").exists()
    if "classifier" not in name:
        assert len(list(several.glob("samples/*.png"))) == 2
        assert len(list(several.glob("averages/*"))) == 4
        assert any(tag.startswith(("fd_", "fid_")) for tag in tags(several))
    same_run(one, several, ranks)


def test_two_ranks_with_everything_on_are_as_one(tmp_path):
    compare(tmp_path, "edm_digits", 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "edm_digits"])
def test_every_family_on_two_ranks_is_as_on_one(tmp_path, name):
    compare(tmp_path, name, 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [path for path in EXPERIMENTS if path.stem not in FAMILIES], ids=lambda path: path.stem
)
def test_every_config_ends_on_two_ranks_with_its_images(tmp_path, config):
    """As it is, but for a tiny network and data: FID is left out where its extractor is Inception, without weights."""
    content, model, data = parts(config)
    more = [*STEPS, *DATA[data](tmp_path / "data")]
    if data in ("ImageFolder", "Landscapes"):  # enough that each rank has a held-out image, and large enough for crops
        write_images(tmp_path / "data", 80, max(80, 2 * content["data"]["init_args"]["image_size"]))
    if data != "SingleImage":
        more.append("--data.init_args.batch_size=4")
    if "Classifier" not in model:
        more.append("--model.init_args.net.init_args.model_channels=16")
    if "Latent" in model:
        vae = config.with_name(f"vae_{config.stem.split('latent_')[1]}.yaml")
        fit(tmp_path, vae, *more, f"--name={vae.stem}")
    fit(tmp_path, config, *more, ranks=2)
    folder = tmp_path / "runs" / config.stem / "version_0"
    assert (folder / "checkpoints/last.ckpt").exists()
    assert "Classifier" in model or list(folder.glob("*/*.png"))


@pytest.mark.slow
def test_four_ranks_are_as_one(tmp_path):
    compare(tmp_path, "edm_digits", 66, ranks=4)
