"""The MeanFlow family from end to end: ranks, accumulation, an interruption in bf16, and what it refuses."""

import gc
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import FIT, LAST, at_step, ended, logged, read, same_training

from diffusion_lit.diffusion import Sampling
from diffusion_lit.modules import EDM, MeanFlow
from diffusion_lit.nets import UNet

CONFIG = Path(__file__).resolve().parents[2] / "configs/meanflow_digits.yaml"
GUIDED = [
    "--model.init_args.loss=diffusion_lit.diffusion.MeanFlowLoss",
    "--model.init_args.loss.init_args.guidance=diffusion_lit.diffusion.TrainingGuidance",
    "--model.init_args.loss.init_args.guidance.init_args.cfg_scale=2.0",
    "--model.init_args.noise_levels=diffusion_lit.diffusion.LevelPairs",
    "--model.init_args.noise_levels.init_args.equal=0.3",
]
SHORT = [*FIT[:2], str(CONFIG), *FIT[3:], *GUIDED, "--trainer.val_check_interval=4"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.medium
def test_two_ranks_train_as_one_also_with_accumulation(lightning):
    """A forward-mode derivative through the wrapper of DDP would leave each rank with its own gradient, unnoticed."""
    exact = ["--trainer.precision=32-true", "--trainer.max_steps=4", "--trainer.accumulate_grad_batches=2"]
    lightning(*SHORT, *exact)
    lightning(*SHORT, *exact, "--trainer.devices=2", "--trainer.strategy=ddp_fork", "--name=two")
    one, two = LAST.parent.parent, Path("runs/two/version_0")
    for tag in ("train/loss", "val/loss"):
        assert list(logged(two, tag).values()) == pytest.approx(list(logged(one, tag).values()), rel=2e-4), tag
    before, after = read(LAST)["current_model_state"], read(two / "checkpoints/last.ckpt")["current_model_state"]
    for key, value in before.items():
        assert torch.allclose(value, after[key], atol=2e-3), key
    assert any(float(value.abs().max()) > 0 for key, value in before.items() if "until" in key)  # it has learned of it


@pytest.mark.medium
def test_an_interruption_changes_nothing_in_bf16_with_dropout_and_what_was_learned_is_drawn(lightning, monkeypatch):
    options = ["--trainer.precision=bf16-mixed", "--model.init_args.net.init_args.dropout=0.2"]
    lightning(*SHORT, *options, "--name=unbroken")
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        assert ended(lightning, *SHORT, *options) == 143
    gc.collect()  # the run that was stopped in this process lets go of its folder
    lightning(*SHORT, *options, "--ckpt_path=last")
    assert same_training(read(LAST), read("runs/unbroken/version_0/checkpoints/last.ckpt"))
    draw = ["sample", "--ckpt_path", LAST, "--labels=all", "--device=cpu"]

    def drawn(out, *more):
        lightning(*draw, f"--out={out}", *more)
        return np.load(f"{out}/samples.npz")["arr_0"].astype(int)

    whole = drawn("one", "--num_samples=12", "--labels=3,5")
    assert whole.std() > 10
    assert abs(drawn("again", "--num_samples=12", "--labels=3,5", "--batch_size=5") - whole).max() <= 1
    for name, more in (
        ("several", ["--num_steps=3"]),
        ("ode", ["--sampler=heun", "--grid=uniform_t", "--num_steps=4"]),
    ):
        assert abs(drawn(name, "--num_samples=2", *more) - whole[:2]).max() > 1
    edit = ["edit", "invert", "--ckpt_path", LAST, "--labels=3", "--device=cpu", "--data_index=3", "--out=edit"]
    lightning(*edit, "--num_steps=20")  # told no end of a step it is a flow, which goes up and comes back
    assert json.loads(Path("edit/record.json").read_text())["psnr"] > 20
    lightning("edit", "inpaint", *edit[2:], "--num_samples=1")
    record = json.loads(Path("edit/record.json").read_text())["sampling"]
    assert (record["sampler"], record["num_steps"]) == ("ddpm", 18), "not its one step"


def test_networks_and_models_without_a_second_noise_level_are_refused_in_a_sentence():
    net = UNet(1, 8, 2, 8, (1,), 1, (), noise_embedding="fourier")
    with pytest.raises(ValueError, match="UNet was built without; set takes_until: true"):
        MeanFlow(net)
    with pytest.raises(ValueError, match="sampler meanflow needs a model"):
        EDM(net, sampling=Sampling(sampler="meanflow", num_steps=1)).on_fit_start()
    with pytest.raises(ValueError, match="sampler meanflow needs a model that is told where a step ends"):
        EDM(net).generate([0], sampling=Sampling(sampler="meanflow", num_steps=1))
