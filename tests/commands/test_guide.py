"""Autoguidance by options and configurations: the same samples as by hand, and a guide that is held and named."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import FIT, LATENT_DIGITS, NO_IMAGES, TINY_LATENT, TINY_VAE, VAE_DIGITS, read, same_training, stopped

from diffusion_lit.diffusion import heun
from diffusion_lit.diffusion.images import to_uint8
from diffusion_lit.diffusion.rng import SeededNoise
from diffusion_lit.modules.load import load_module
from diffusion_lit.storage.hashing import weights_hash

SMALL = [*FIT, *NO_IMAGES, "--model.init_args.sampling.num_steps=3"]
LR = "--model.init_args.optimizer.init_args.lr=0.02"
MODEL, GUIDE = (f"runs/{name}/version_0/checkpoints/last.ckpt" for name in ("model", "guide"))
HELD = "runs/held/version_0/checkpoints/last.ckpt"
DRAW = ["--num_samples=6", "--labels=1,2", "--device=cpu", "--num_steps=4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model with a snapshot, a guide of half its width, and a model whose configuration names the guide."""
    from diffusion_lit.commands.main import main

    folder = tmp_path_factory.mktemp("guide")
    guided = ["--model.init_args.sampling.guide_ckpt=runs/guide", "--model.init_args.sampling.guide_scale=3"]
    snapshots = ["--ema.half_life=null", "--ema.sigma_rel=[0.1]", "--ema.snapshot_every=6"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main([*SMALL, LR, *snapshots, "--name=model"])
        main([*SMALL, LR, "--name=guide", "--model.init_args.net.init_args.model_channels=8"])
        main([*SMALL, LR, *snapshots, *guided, "--name=held"])
    return folder


@pytest.fixture
def here(trained, lightning, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return lightning


def drawn(lightning, checkpoint, *options):
    lightning("sample", "--ckpt_path", checkpoint, "--out=drawn", *DRAW, *options)
    return np.load("drawn/samples.npz")["arr_0"].astype(int)


def by_hand(scale, low, high):
    """The same six samples, from the formula."""
    model, guide = load_module(MODEL), load_module(GUIDE)
    labels = torch.tensor([1, 2] * 3)

    def denoise(x, sigma):
        d, g = (module.denoiser(x, sigma, labels) for module in (model, guide))
        return g + scale * (d - g) if low < float(sigma) <= high else d

    sampling = model.sampling.replace(num_steps=4)
    noise = SeededNoise(range(6))
    x = sampling.start(model.denoiser.scaling, noise(torch.empty(6, 1, 8, 8)))
    with torch.no_grad():
        images = heun(denoise, x, sampling.sigmas(model.denoiser.scaling), noise=noise)
    return to_uint8(images).permute(0, 2, 3, 1).numpy().astype(int)


@pytest.mark.medium
def test_samples_are_those_of_the_formula(here):
    plain = drawn(here, MODEL)
    assert np.abs(plain - by_hand(1, 0, 100)).max() <= 1
    guided = drawn(here, MODEL, "--guide_ckpt=runs/guide", "--guide_scale=2.5")
    assert np.abs(guided - by_hand(2.5, 0, 100)).max() <= 1 and np.abs(guided - plain).max() > 10
    within = drawn(here, MODEL, f"--guide_ckpt={GUIDE}", "--guide_scale=2.5", "--guidance_interval=[0.01, 3]")
    assert np.abs(within - by_hand(2.5, 0.01, 3)).max() <= 1 and np.abs(within - guided).max() > 10
    assert np.array_equal(
        drawn(here, MODEL, f"--guide_ckpt={GUIDE}"), drawn(here, MODEL, f"--guide_ckpt={GUIDE}", "--guide_scale=2")
    )
    assert np.array_equal(drawn(here, MODEL, f"--guide_ckpt={GUIDE}", "--guide_scale=1"), plain)


@pytest.mark.medium
def test_a_snapshot_an_export_and_the_model_itself_are_guides_too(here):
    """Guided by itself a model draws what it draws alone, up to rounding."""
    plain = drawn(here, MODEL)
    here("export", "--ckpt_path", MODEL, "--out=exported")
    snapshot = next(Path("runs/model/version_0/averages").glob("*.safetensors"))
    for guide in (snapshot, "exported", MODEL):
        assert np.abs(drawn(here, MODEL, f"--guide_ckpt={guide}", "--guide_scale=2") - plain).max() <= 1, guide
    other = next(Path("runs/held/version_0/averages").glob("*.safetensors"))
    assert (
        np.abs(drawn(here, MODEL, f"--guide_ckpt={other}", "--guide_scale=2") - plain).max() <= 1
    )  # the same training


@pytest.mark.medium
def test_a_checkpoint_and_its_export_hold_the_guide_that_the_configuration_names(here):
    expected = drawn(here, MODEL, "--guide_ckpt=runs/guide", "--guide_scale=3")
    held = read(HELD)["guide"]
    guide = read(GUIDE)["state_dict"]
    assert held["file"] == "runs/guide" and all(torch.equal(held["state_dict"][name], guide[name]) for name in guide)
    assert held["sha256"] == weights_hash(load_module(GUIDE).denoiser.state_dict())
    same_training(read(HELD), read(MODEL))  # a guide changes samples and not the training
    shutil.rmtree("runs/guide")
    assert np.array_equal(drawn(here, HELD), expected)
    assert np.array_equal(drawn(here, HELD, "--guide_scale=1"), drawn(here, MODEL))
    here("export", "--ckpt_path", HELD, "--out=exported")
    here("export", "--ckpt_path=exported", "--out=again")
    assert np.array_equal(drawn(here, "again"), expected)
    assert json.loads(Path("again/model.json").read_text())["guide"]["sha256"] == held["sha256"]
    here(*SMALL, "--config=runs/held/version_0/config.yaml", "--ckpt_path=runs/held", "--trainer.max_steps=7")
    assert read(HELD)["global_step"] == 7 and read(HELD)["guide"]["sha256"] == held["sha256"]
    shutil.rmtree("again/guide")


@pytest.mark.medium
def test_receipts_name_the_guide_and_count_its_forwards(here):
    evaluate = ["evaluate", "--ckpt_path", MODEL, "--num_samples=20", "--num_blocks=1", "--extractor=pixels"]
    here(*evaluate, "--device=cpu", "--num_steps=2", f"--guide_ckpt={GUIDE}", "--guide_scale=1,2", "--out=a.json")
    report = json.loads(Path("a.json").read_text())
    digest = weights_hash(load_module(GUIDE).denoiser.state_dict())
    assert report["guide"] == {"file": GUIDE, "sha256": digest}
    plain, guided = report["results"]
    assert (plain["nfe"], plain["network_forwards"], guided["nfe"], guided["network_forwards"]) == (3, 3, 3, 6)
    page = Path("a.md").read_text()
    assert "guide 2" in page and digest in page
    here(
        *["edit", "img2img", "--ckpt_path", MODEL, "--image=flower", "--labels=1", "--starts=[1]", "--num_steps=4"],
        *["--device=cpu", f"--guide_ckpt={GUIDE}", "--out=edited"],
    )
    assert json.loads(Path("edited/record.json").read_text())["guide"]["sha256"] == digest


def test_what_does_not_fit_is_told_in_a_sentence(here, capsys):
    def told(*options, checkpoint=MODEL):
        return stopped(capsys, here, "sample", "--ckpt_path", checkpoint, "--out=drawn", *DRAW, *options)

    assert "--guide_scale 2" in told("--guide_scale=2")
    assert "none.ckpt" in told("--guide_ckpt=none.ckpt")
    assert "guide_scale is nan" in told(f"--guide_ckpt={GUIDE}", "--guide_scale=nan")
    content = read(GUIDE)
    content["diffusion_lit"]["class_names"] = list("abcdefghij")
    torch.save(content, "names.ckpt")
    assert "a, b, c" in told("--guide_ckpt=names.ckpt")
    snapshot = next(Path("runs/model/version_0/averages").glob("*.safetensors"))
    assert "another network" in told(f"--guide_ckpt={snapshot}", checkpoint=GUIDE)
    torch.save({"state_dict": {"a": Path("x")}}, "code.ckpt")
    assert "code.ckpt holds objects" in told("--guide_ckpt=code.ckpt")


@pytest.mark.medium
def test_a_runs_guide_is_of_the_classes_of_its_data_and_looked_at_before_the_run_begins(here, capsys):
    def told(*options):
        return stopped(capsys, here, *SMALL, "--name=told", *options)

    guided = "--model.init_args.sampling.guide_ckpt"
    assert "none.ckpt" in told(f"{guided}=none.ckpt")
    digits = {"class_path": "datamodules.Digits", "init_args": {"batch_size": 16}}
    subset = {"class_path": "datamodules.Subset", "init_args": {"data": digits, "without": ["3"]}}
    without = f"--data={json.dumps(subset)}"
    here(*SMALL, "--name=nine", without, "--trainer.max_steps=1")
    assert "10 classes" in told(without, f"{guided}={GUIDE}")
    assert "9 classes" in told(f"{guided}=runs/nine")
    assert not Path("runs/told").exists()  # nothing is left of them
    here(*SMALL, "--name=held_nine", without, f"{guided}=runs/nine", "--trainer.max_steps=1")
    held = read("runs/held_nine/version_0/checkpoints/last.ckpt")
    assert held["guide"]["diffusion_lit"]["class_names"] == held["diffusion_lit"]["class_names"] == list("012456789")


def test_a_file_that_a_checkpoint_names_is_never_opened(here, capsys):
    content = read(HELD)
    os.mkfifo("pipe")  # whoever opens it waits for ever
    content["hyper_parameters"]["sampling"]["guide_ckpt"] = "pipe"
    del content["guide"]
    torch.save(content, "named.ckpt")
    said = stopped(capsys, here, "sample", "--ckpt_path=named.ckpt", "--out=drawn", *DRAW)
    assert "guided by pipe, which is not loaded" in said
    assert len(drawn(here, "named.ckpt", "--guide_scale=1")) == 6
    content = read(HELD)
    next(iter(content["guide"]["state_dict"].values())).flatten()[0] += 1
    torch.save(content, "changed.ckpt")
    assert "its hash names" in stopped(capsys, here, "sample", "--ckpt_path=changed.ckpt", "--out=drawn", *DRAW)
    content["guide"]["hyper_parameters"]["_class_path"] = "os.system"
    torch.save(content, "class.ckpt")
    assert "os.system" in stopped(capsys, here, "sample", "--ckpt_path=class.ckpt", "--out=drawn", *DRAW)


@pytest.mark.slow
def test_a_guide_of_latents_is_of_the_same_autoencoder_and_held_without_it(lightning, capsys):
    vae, latent = (
        ["fit", "--config", VAE_DIGITS, *TINY_VAE],
        ["fit", "--config", LATENT_DIGITS, *TINY_LATENT, *NO_IMAGES],
    )
    lightning(*vae, *NO_IMAGES, "--trainer.max_steps=2", "--trainer.callbacks=[]")
    for seed, name in enumerate(("model", "guide")):
        lightning(*latent, "--trainer.max_steps=2", f"--name={name}", f"--seed_everything={seed}")
    guided = "--model.init_args.sampling.guide_ckpt=runs/guide"
    lightning(*latent, "--trainer.max_steps=2", "--name=held", "--seed_everything=0", guided)
    expected = drawn(lightning, MODEL, "--guide_ckpt=runs/guide")
    assert np.array_equal(drawn(lightning, HELD), expected)
    assert not np.array_equal(drawn(lightning, MODEL), expected)
    assert "latent_space" not in read(HELD)["guide"]
    content = read(GUIDE)
    content["latent_space"]["mean"] += 1
    torch.save(content, "moved.ckpt")
    said = stopped(capsys, lightning, "sample", "--ckpt_path", MODEL, "--out=drawn", *DRAW, "--guide_ckpt=moved.ckpt")
    assert "latents of the autoencoder" in said
