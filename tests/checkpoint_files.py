"""Checkpoints as `diffusion-lit fit` writes them, made without a training."""

import copy
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import instantiate_module

from diffusion_lit.modules.autoencoders import describe, load_autoencoder
from diffusion_lit.modules.latent_space import LatentSpace
from diffusion_lit.nets.autoencoder import Autoencoder
from diffusion_lit.nets.classifier import ConvClassifier
from diffusion_lit.storage.checkpoint_io import SafeCheckpointIO
from diffusion_lit.storage.snapshots import Snapshots

NET = {
    "in_channels": 1,
    "image_size": 8,
    "num_classes": 10,
    "model_channels": 8,
    "channel_mult": [1],
    "num_blocks": 1,
    "attention_resolutions": [],
}
RECORD = {
    "_class_path": "diffusion_lit.modules.EDM",
    "_instantiator": "lightning.pytorch.cli.instantiate_module",
    "net": {"class_path": "diffusion_lit.nets.UNet", "init_args": NET},
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}},
    "lr_scheduler": {"class_path": "diffusion_lit.modules.WarmupStableDecay", "init_args": {"warmup_steps": 5}},
}
DATA = {"_class_path": "datamodules.Digits", "batch_size": 16}


def model():
    torch.manual_seed(0)
    record = copy.deepcopy({name: value for name, value in RECORD.items() if name != "_instantiator"})
    return instantiate_module(LightningModule, record)


def checkpoint(**changes):
    return {
        "state_dict": model().state_dict(),
        "hyper_parameters": copy.deepcopy(RECORD),
        "datamodule_hyper_parameters": copy.deepcopy(DATA),
        "global_step": 3,
        "pytorch-lightning_version": "2.6.4",
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}],
        **changes,
    }


def write(path, content):
    SafeCheckpointIO().save_checkpoint(content, path)
    return path


def autoencoder(**changes):
    net = Autoencoder(in_channels=1, image_size=8, latent_channels=2, model_channels=8, channel_mult=(1, 1))
    state = {f"net.{name}": value for name, value in net.state_dict().items()}
    return {"state_dict": state, "autoencoder": {**describe(net), **changes}}


def latent(**changes):
    space = LatentSpace(load_autoencoder(str(write(Path("vae.ckpt"), autoencoder()))), (1, 8, 8))
    net = {**NET, "in_channels": 2, "image_size": 4}
    record = {
        "_class_path": "diffusion_lit.modules.LatentDiffusion",
        "net": {"class_path": "diffusion_lit.nets.UNet", "init_args": net},
        "vae_ckpt": "vae.ckpt",
    }
    built = instantiate_module(LightningModule, copy.deepcopy(record))
    return checkpoint(hyper_parameters=record, state_dict=built.state_dict(), latent_space={**space.state(), **changes})


def classifier(**changes):
    net = ConvClassifier(1, 8, 10)
    state = {f"net.{name}": value for name, value in net.state_dict().items()}
    return {"state_dict": state, "classifier": {**net.config, **changes}}


def combined(folder):
    """The one snapshot of a folder, as it is read."""
    return Snapshots(folder).combine({file[2]: 1.0 for file in Snapshots(folder).files})
