"""Arguments of a file that ask for too much are refused in a sentence, before memory or time is spent on them."""

import resource
import sys
import time

import pytest
import torch
from checkpoint_files import NET, RECORD, autoencoder, checkpoint, classifier, latent, write
from torch import nn

from diffusion_lit.evaluation.classifiers import classifier_from_checkpoint
from diffusion_lit.modules.autoencoders import load_autoencoder
from diffusion_lit.modules.load import load_module
from diffusion_lit.storage import size


def net(**changes):
    return {"net": {"class_path": "diffusion_lit.nets.UNet", "init_args": {**NET, **changes}}}


def schedule(num_steps):
    return {"class_path": "diffusion_lit.diffusion.LinearSchedule", "init_args": {"num_steps": num_steps}}


def nested(depth):
    held = []
    for _ in range(depth):
        held = [held]
    return held


DIT = {"in_channels": 1, "image_size": 2**20, "hidden_channels": 64, "num_heads": 2, "depth": 1, "patch_size": 1}
HUGE = {
    "blocks": net(num_blocks=10**9),
    "wide": net(model_channels=10**5),
    "wider": net(model_channels=10**9),
    "levels": net(channel_mult=[1] * 10**5),
    "classes": net(num_classes=10**8),
    "more classes": net(num_classes=10**13),
    "tokens": {"net": {"class_path": "diffusion_lit.nets.DiT", "init_args": DIT}},
    "depth": {"net": {"class_path": "diffusion_lit.nets.DiT", "init_args": DIT | {"image_size": 8, "depth": 10**9}}},
    "steps of a schedule": {
        "scaling": {
            "class_path": "diffusion_lit.diffusion.EpsPreconditioning",
            "init_args": {"schedule": schedule(10**9)},
        }
    },
    "steps of sampling": {"sampling": {"num_steps": 10**12}},
    "brackets": {"loss": "[" * 100_000},
    "nested lists": {"loss": nested(600)},
}


@pytest.mark.parametrize("changes", HUGE.values(), ids=HUGE)
def test_a_checkpoint_that_asks_for_too_much_is_refused_at_once(tmp_path, changes):
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10 * limit)  # to write what cannot be read under the usual one
    path = write(tmp_path / "huge.ckpt", checkpoint(hyper_parameters={**RECORD, **changes}))
    sys.setrecursionlimit(limit)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError, match=r"huge\.ckpt .*(cannot be (built|read)|is not a readable checkpoint)"):
        load_module(path)
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1.5 * 2**20  # KiB


def test_so_is_an_autoencoder_and_a_classifier(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    huge = {"init_args": {"in_channels": 1, "image_size": 8, "model_channels": 6000}}
    with pytest.raises(ValueError, match="weights in .* tensors, but the file holds"):
        load_autoencoder(str(write(tmp_path / "vae.ckpt", autoencoder(**huge))))
    with pytest.raises(ValueError, match="weights in .* tensors, but the file holds"):
        load_module(write(tmp_path / "latent.ckpt", latent(**huge)))
    with pytest.raises(ValueError, match="weights in .* tensors, but the file holds"):
        classifier_from_checkpoint(write(tmp_path / "classifier.ckpt", classifier(width=6000)))


def test_weights_that_are_no_more_than_the_files_are_built(monkeypatch):
    monkeypatch.setattr(size, "NUMBERS", 0)
    monkeypatch.setattr(size, "TENSORS", 0)
    whole = nn.Linear(30, 20)
    with size.no_larger_than(whole.state_dict()):
        nn.Linear(30, 20), nn.Linear(30, 20)  # a model and a copy of it
    with pytest.raises(ValueError, match="weight of its Linear"), size.no_larger_than(whole.state_dict()):
        nn.Linear(30, 60)
    assert torch.isfinite(nn.Linear(30, 60).weight).all()  # outside nothing is counted
