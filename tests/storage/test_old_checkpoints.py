"""Checkpoints of version 0.1.0, before the code was laid out in rooms: they sample the same images and train on.

`tests/data/checkpoints_of_0.1.0.zip` holds one of each family after 6 steps on the digits, and what that version made
of it: 4 samples, and the raw weights after 3 further steps.
"""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import read
from safetensors.torch import load

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
KEPT = Path(__file__).resolve().parents[1] / "data" / "checkpoints_of_0.1.0.zip"
FAMILIES = ("edm", "ddpm", "cold", "vae", "latent")
NET = "--model.init_args.net.init_args"


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder of the checkpoints, and what came of them by name."""
    folder = tmp_path_factory.mktemp("kept")
    zipfile.ZipFile(KEPT).extractall(folder)
    return folder, load((folder / "expected.safetensors").read_bytes())


@pytest.mark.parametrize("family", FAMILIES)
def test_it_samples_the_same_images(family, kept, lightning):
    folder, expected = kept
    steps = () if family == "vae" else ("--num_steps=4",)
    lightning("sample", f"--ckpt_path={folder / family}.ckpt", "--num_samples=4", *steps, "--out=drawn", "--device=cpu")
    drawn = np.load("drawn/samples.npz")["arr_0"].astype(int)
    assert np.abs(drawn - expected[f"{family}.samples"].numpy().astype(int)).max() <= 1  # another processor rounds


@pytest.mark.parametrize("family", FAMILIES)
def test_its_export_samples_the_same_images(family, kept, lightning):
    """The autoencoder of a latent model goes with it."""
    checkpoint = kept[0] / f"{family}.ckpt"
    steps = () if family == "vae" else ("--num_steps=2",)
    lightning("export", f"--ckpt_path={checkpoint}", "--out=model")
    lightning("export", "--ckpt_path=model", "--out=again")
    for source, out in ((checkpoint, "a"), ("again", "b")):
        lightning("sample", f"--ckpt_path={source}", "--num_samples=2", *steps, f"--out={out}", "--device=cpu")
    assert np.array_equal(np.load("a/samples.npz")["arr_0"], np.load("b/samples.npz")["arr_0"])


def test_exports_stand_in_for_an_autoencoder_and_a_classifier(kept, lightning):
    from diffusion_lit.evaluation.classifiers import ClassifierFeatures
    from diffusion_lit.modules.autoencoders import load_autoencoder

    for name in ("vae", "classifier"):
        lightning("export", f"--ckpt_path={kept[0] / name}.ckpt", f"--out={name}")
    mine, theirs = load_autoencoder("vae").state_dict(), load_autoencoder(str(kept[0] / "vae.ckpt")).state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in mine.items())
    extractor = ClassifierFeatures("classifier")
    extractor.load()
    assert extractor.features(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).logits.shape == (2, 10)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains_on(family, kept, lightning):
    folder, expected = kept
    for name in {family, "vae"}:  # a latent model finds its VAE where it was
        last = Path(f"runs/{name}_digits/version_0/checkpoints/last.ckpt")
        last.parent.mkdir(parents=True)
        last.write_bytes((folder / f"{name}.ckpt").read_bytes())
    attention = () if family == "vae" else (f"{NET}.attention_resolutions=[]",)
    lightning(
        *["fit", f"--config={CONFIGS / family}_digits.yaml", "--ckpt_path=last", "--trainer.precision=32-true"],
        *["--trainer.max_steps=9", "--trainer.val_check_interval=6", "--trainer.callbacks=[]", "--seed_everything=5"],
        *[f"{NET}.model_channels=4", f"{NET}.channel_mult=[1]", *attention],
    )
    weights = read(f"runs/{family}_digits/version_0/checkpoints/last.ckpt")["current_model_state"]
    for name, value in weights.items():
        assert torch.allclose(value.float(), expected[f"{family}.resumed.{name}"].float(), atol=2e-3), name


def test_a_classifier_measures(kept):
    from diffusion_lit.evaluation.classifiers import ClassifierFeatures

    extractor = ClassifierFeatures(str(kept[0] / "classifier.ckpt"))
    extractor.load()
    assert extractor.features(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).logits.shape == (2, 10)


def test_what_was_the_default_attention_still_loads(kept, tmp_path):
    """Version 0.1.0 attended at maps of 8 by default, and nowhere where there is none: here the only map has 4."""
    from diffusion_lit.modules.load import load_module

    content = read(kept[0] / "edm.ckpt")
    net = content["hyper_parameters"]["net"]["init_args"]
    assert not net["attention_resolutions"]
    net |= {"attention_resolutions": [8], "patch_size": 2}
    stem = "denoiser.net.stem.weight"
    content["state_dict"] = {
        name: value.repeat(1, 4, 1, 1) if name == stem else value for name, value in content["state_dict"].items()
    }
    for name in [name for name in content["state_dict"] if "head" in name or ".out" in name]:
        value = content["state_dict"][name]
        if value.shape and value.shape[0] == 1:
            content["state_dict"][name] = value.repeat(4, *[1] * (value.dim() - 1))
    torch.save(content, tmp_path / "old.ckpt")
    assert load_module(tmp_path / "old.ckpt").net.stem.weight.shape[1] == 4


@pytest.mark.medium
def test_a_run_of_before_goes_on_under_the_configs_of_now(kept, lightning):
    """The configs name the levels with attention otherwise now; the network is the same."""
    args = ["fit", f"--config={CONFIGS}/edm_digits.yaml", f"{NET}.model_channels=4", f"{NET}.channel_mult=[1]"]
    short = ["--trainer.callbacks=[]", "--trainer.val_check_interval=2", "--trainer.precision=32-true"]
    lightning(*args, *short, "--trainer.max_steps=2", f"{NET}.attention_resolutions=[8]")
    lightning(*args, *short, "--trainer.max_steps=4", f"{NET}.attention_resolutions=[-1]", "--ckpt_path=last")
    assert read("runs/edm_digits/version_0/checkpoints/last.ckpt")["global_step"] == 4
