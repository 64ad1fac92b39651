"""No step of training and no call of a network while sampling makes the host wait for the device.

The device `meta` stands for a GPU: what it has computed cannot be read, so that a host fails that looks at a value. A
copy to it that would wait for a GPU is counted. `make check-gpu` asks the same of a GPU itself.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_net import TinyNet
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from datamodules import Digits
from datamodules.loaders import Split, TrainLoader
from diffusion_lit.diffusion.conditions import DegradedImage
from diffusion_lit.diffusion.degradations import Mask
from diffusion_lit.diffusion.denoiser import Denoiser
from diffusion_lit.diffusion.generate import Sampling
from diffusion_lit.diffusion.loss import DenoisingLoss, LearnedUncertainty
from diffusion_lit.diffusion.noise import LinearSchedule
from diffusion_lit.diffusion.preconditioning import EDMPreconditioning, EpsPreconditioning, FlowPreconditioning
from diffusion_lit.diffusion.samplers import SAMPLERS
from diffusion_lit.modules import DDPM, EDM, VAE, Classifier, ColdDiffusion, Consistency
from diffusion_lit.nets import Autoencoder, ConvClassifier, UNet
from diffusion_lit.nets.augment import Augment

META = torch.device("meta")


def unet(channels=1, **options):
    return UNet(channels, 8, 3, model_channels=8, channel_mult=(1, 2), num_blocks=1, **options)


class OfMeta(torch.Generator):
    """A generator that says it draws on meta, which has none."""

    device = META


class Copies(TorchDispatchMode):
    """Counts copies from the host's memory that its device would hold up."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to, name = kwargs.get("device"), function.overloadpacket.__name__
        if name == "_to_copy" and to is not None and args[0].device.type == "cpu" and torch.device(to) == META:
            self.found += [] if kwargs.get("non_blocking") else [tuple(args[0].shape)]
        if name == "copy_" and args[0].device == META and args[1].device.type == "cpu":
            self.found += [] if args[2:3] == (True,) or kwargs.get("non_blocking") else [tuple(args[0].shape)]
        return function(*args, **kwargs)


class Made(TorchFunctionMode):
    """Counts tensors that the device is given by value, which is a copy too."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to = kwargs.get("device")
        value = function in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor)
        if value and to is not None and torch.device(to) == META:
            self.found.append(args[0])
        return function(*args, **kwargs)


def copies_of(work):
    """What the device was given while it worked, the second time: tables stay where they were brought."""
    with torch.inference_mode(False):
        work()
        with Made() as made, Copies() as copies:
            work()
    return made.found + copies.found


@pytest.mark.parametrize("scaling", [EDMPreconditioning(), EpsPreconditioning(LinearSchedule())], ids=["edm", "eps"])
@pytest.mark.parametrize("name", [name for name, one in SAMPLERS.items() if not one.takes_until and name != "rk45"])
def test_sampling_waits_for_nothing(name, scaling):
    """rk45 is left out: whether its step is taken back depends on what the network said."""
    denoiser = Denoiser(TinyNet(1, num_classes=3), scaling).eval().to(META)
    sampling = Sampling(sampler=name, num_steps=4, cfg_scale=2.0, guidance_interval=(0.1, 10.0))
    assert copies_of(lambda: sampling.generate(denoiser, (1, 8, 8), [0, 1], torch.tensor([0, 2]))) == []


def test_a_sampler_of_steps_of_any_length_waits_for_nothing():
    denoiser = Denoiser(unet(takes_until=True), FlowPreconditioning()).eval().to(META)
    sampling = Sampling(sampler="meanflow", num_steps=2)
    assert copies_of(lambda: sampling.generate(denoiser, (1, 8, 8), [0, 1], torch.tensor([0, 2]))) == []


def test_a_batch_waits_for_nothing():
    images, labels = torch.zeros(16, 1, 8, 8, dtype=torch.uint8), torch.zeros(16, dtype=torch.long)
    data = Digits(batch_size=4, random_flip=True)
    loader = TrainLoader(
        Split(images, labels),
        batch_size=4,
        device=META,
        augment=lambda images, key: data.augment(images, torch.Generator(), slice(None)),
    )
    assert copies_of(lambda: next(iter(loader))) == []


FAMILIES = {
    "edm": lambda: EDM(unet(augment_dim=9), augment=Augment()),
    "edm-learned": lambda: EDM(unet(), loss=DenoisingLoss(LearnedUncertainty())),
    "ddpm": lambda: DDPM(unet()),
    "given": lambda: EDM(unet(condition_channels=2), condition=DegradedImage(Mask(4))),
    "consistency": lambda: Consistency(unet()),
    "cold": lambda: ColdDiffusion(UNet(1, 8, 0, 8, (1, 2), 1, ()), Mask(4)),
    "vae": lambda: VAE(Autoencoder(1, 8, 2, 8, (1, 2))),
    "classifier": lambda: Classifier(ConvClassifier(1, 8, 3)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_waits_for_nothing(family, monkeypatch):
    """MeanFlow is left out: once a step the host asks how many of the steps that it learns have a length."""
    module = FAMILIES[family]().to(META).train()
    generator, autocast = torch.Generator, torch.autocast
    state = SimpleNamespace(get_rng_state=torch.get_rng_state, set_rng_state=lambda state: None)
    monkeypatch.setattr(torch, "meta", state, raising=False)
    monkeypatch.setattr(
        torch, "Generator", lambda device="cpu": OfMeta() if torch.device(device) == META else generator(device)
    )
    monkeypatch.setattr(
        torch, "autocast", lambda kind, **options: nullcontext() if kind == "meta" else autocast(kind, **options)
    )
    batch = {"image": torch.zeros(4, 1, 8, 8, device=META), "label": torch.zeros(4, dtype=torch.long, device=META)}

    def step():
        loss = module.training_step(batch, 0)
        (loss["loss"] if isinstance(loss, dict) else loss).backward()

    assert copies_of(step) == []
