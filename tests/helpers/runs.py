"""Short runs of the command, and what they leave."""

from pathlib import Path

import pytest
import torch

from diffusion_lit.callbacks import Throughput

DIGITS = Path(__file__).resolve().parents[2] / "configs/edm_digits.yaml"


FIT = [
    *["fit", "--config", str(DIGITS), "--name=run", "--trainer.accelerator=cpu", "--trainer.max_steps=6"],
    *["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.callbacks=[]"],
    *["--model.init_args.net.init_args.model_channels=16", "--model.init_args.lr_scheduler=null"],
    *["--data.init_args.batch_size=16", "--sample_grid.every=0", "--trajectory.every=0"],
    *["--loss_by_noise_level.batches=0", "--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=3"],
]


LAST = Path("runs/run/version_0/checkpoints/last.ckpt")


def read(path):
    return torch.load(path, weights_only=True)


def same_training(one, other):
    """Whether two checkpoints hold the same training, bit for bit."""
    for key in ("state_dict", "current_model_state"):
        assert one[key].keys() == other[key].keys()
        assert all(torch.equal(value, other[key][name]) for name, value in one[key].items()), key
    for mine, theirs in zip(one["optimizer_states"], other["optimizer_states"], strict=True):
        for index, state in mine["state"].items():
            assert all(torch.equal(value, theirs["state"][index][name]) for name, value in state.items())
    return True


def at_step(monkeypatch, step, act):
    """Lets something happen at the end of a training step."""
    before = Throughput.on_train_batch_end

    def hook(self, trainer, module, *args):
        before(self, trainer, module, *args)
        if trainer.global_step == step and trainer.fit_loop.epoch_loop.batch_progress.current.ready:
            act(trainer)

    monkeypatch.setattr(Throughput, "on_train_batch_end", hook)


def ended(run, *args):
    with pytest.raises(SystemExit) as caught:
        run(*args)
    return caught.value.code


def logged(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


DIGITS = Path(__file__).resolve().parents[2] / "configs/edm_digits.yaml"


TINY = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.callbacks=[]",
    "--model.init_args.net.init_args.model_channels=16",
    "--model.init_args.sampling.num_steps=2",
    "--data.init_args.batch_size=16",
    "--trainer.limit_val_batches=3",
    "--sample_grid.columns=2",
    "--trajectory.count=1",
]


def stopped(capsys, run, *args, status=2):
    """Runs a command that must stop, and returns the one sentence that it says."""
    with pytest.raises(SystemExit) as caught:
        run(*args)
    assert caught.value.code == status
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


CONFIGS = Path(__file__).resolve().parents[2] / "configs"


VAE_DIGITS, LATENT_DIGITS = CONFIGS / "vae_digits.yaml", CONFIGS / "latent_digits.yaml"


TINY_TRAINING = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--data.init_args.batch_size=16",
    "--trainer.limit_val_batches=3",
]


TINY_VAE = [*TINY_TRAINING, "--model.init_args.net.init_args.model_channels=8"]


TINY_LATENT = [
    *[*TINY_TRAINING, "--trainer.callbacks=[]", "--model.init_args.net.init_args.model_channels=16"],
    *["--model.init_args.sampling.num_steps=2", "--sample_grid.columns=1", "--trajectory.count=1"],
    "--model.init_args.cache_dir=latents",
]


NO_IMAGES = ["--sample_grid.every=0", "--trajectory.every=0", "--loss_by_noise_level.batches=0"]
