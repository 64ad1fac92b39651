"""Models and data sets have the members that commands, callbacks and figures ask them for, in the shape asked for."""

import inspect

import pytest
import torch
from torch import nn
from typing_extensions import get_protocol_members

import datamodules
from datamodules import ImageDataModule
from diffusion_lit.diffusion import EDMPreconditioning, Sampling
from diffusion_lit.diffusion.cold import ColdSampling
from diffusion_lit.diffusion.denoiser import Denoiser
from diffusion_lit.modules import DDPM, EDM, VAE, Classifier, ColdDiffusion, LatentDiffusion, protocols
from diffusion_lit.modules.given import as_given
from diffusion_lit.modules.guides import guide_beside
from diffusion_lit.modules.vae import PriorSampling
from diffusion_lit.nets import UNet
from diffusion_lit.nets.autoencoder import Autoencoder
from diffusion_lit.nets.classifier import ConvClassifier
from diffusion_lit.pretrained.models import Cascade, PretrainedLatentModel, PretrainedModel

DATA = sorted(
    (one for one in vars(datamodules).values() if isinstance(one, type) and issubclass(one, ImageDataModule)),
    key=lambda one: one.__name__,
)
SMALL = {"in_channels": 1, "image_size": 8, "model_channels": 8, "channel_mult": (1,), "num_blocks": 1}
MODELS = {
    "EDM": lambda: EDM(UNet(**SMALL)),
    "DDPM": lambda: DDPM(UNet(**SMALL)),
    "VAE": lambda: VAE(Autoencoder(1, 8, 2, 8, (1, 1))),
    "ColdDiffusion": lambda: ColdDiffusion(UNet(**SMALL)),
    "PretrainedModel": lambda: PretrainedModel(
        "x", Denoiser(UNet(**SMALL), EDMPreconditioning()), Sampling(), (1, 8, 8)
    ),
}


def conforms(kind, protocol, instance=None):
    """Whether a class has a protocol's members, and its methods take what the protocol's take."""
    for name in get_protocol_members(protocol):
        assert hasattr(kind if instance is None else instance, name), f"{kind.__name__} has no {name}"
        asked, there = getattr(protocol, name, None), getattr(kind, name, None)
        if not inspect.isfunction(asked) or not callable(there) or hasattr(nn.Module, name):
            continue
        wanted, has = inspect.signature(asked).parameters, inspect.signature(there).parameters
        variadic = any(one.kind is one.VAR_KEYWORD for one in has.values())
        for parameter in list(wanted.values())[1:]:
            named = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            assert not named or parameter.name in has or variadic, f"{kind.__name__}.{name} takes no {parameter.name}"
        extra = [
            one for one in list(has.values())[1:] if one.name not in wanted and one.kind is one.POSITIONAL_OR_KEYWORD
        ]
        spare = sum(one.kind is one.POSITIONAL_ONLY for one in wanted.values())
        assert all(one.default is not one.empty for one in extra[spare:]), f"{kind.__name__}.{name} asks for more"


@pytest.mark.parametrize("kind", DATA, ids=lambda kind: kind.__name__)
def test_every_data_set_is_one(kind):
    for protocol in (protocols.DataSet, protocols.ImageSource, protocols.HasImages, protocols.Continues):
        conforms(kind, protocol)
    assert issubclass(kind, protocols.HasImages) and issubclass(kind, protocols.Continues)
    assert issubclass(kind, protocols.ReadsSplits)
    assert issubclass(kind, protocols.HasPairs) == issubclass(kind, datamodules.PairedFolder)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_one(name):
    model = MODELS[name]()
    conforms(type(model), protocols.Model, model)
    conforms(type(model.sampling), protocols.Settings, model.sampling)
    assert protocols.is_model(model) and as_given(model) is None and guide_beside(model) is None
    assert model.prompts is None and model.image_shape == (1, 8, 8) and model.num_classes == 0
    assert list(model.class_names) == [] and (model.label_dropout is None or 0 <= model.label_dropout <= 1)


@pytest.mark.parametrize("kind", [LatentDiffusion, PretrainedLatentModel, Cascade])
def test_those_that_need_other_models_are_ones_too(kind):
    conforms(kind, protocols.Generates)
    for name in ("image_shape", "num_classes", "prompts", "label_dropout", "init_from"):
        assert hasattr(kind, name)


@pytest.mark.parametrize("settings", [Sampling(), ColdSampling(), PriorSampling()], ids=lambda one: type(one).__name__)
def test_settings_are_ones(settings):
    conforms(type(settings), protocols.Settings, settings)
    assert settings.replace(num_steps=None).record() == settings.record()
    assert settings.guide_ckpt is None and not settings.autoguided
    assert settings.record().keys() == {"sampler", "num_steps", "cfg_scale"} or isinstance(settings, Sampling)


def test_what_draws_or_reconstructs_nothing_is_told_apart():
    classifier = Classifier(ConvClassifier(1, 8, 10))
    assert not protocols.is_model(classifier) and not isinstance(classifier, protocols.Reconstructs)
    assert isinstance(MODELS["VAE"](), protocols.Reconstructs) and issubclass(Autoencoder, protocols.Encodes)
    assert isinstance(MODELS["ColdDiffusion"](), protocols.Reconstructs)
    assert not isinstance(MODELS["EDM"](), protocols.Reconstructs)
    assert not protocols.is_data_set(torch.utils.data.TensorDataset()) and protocols.is_model(MODELS["EDM"]())


def test_the_protocols_that_are_looked_for_at_run_time_name_methods_only():
    """`isinstance` would compute a property, which may need what is not there yet."""
    looked_for = [one for one in vars(protocols).values() if getattr(one, "__dict__", {}).get("_is_runtime_protocol")]
    assert len(looked_for) >= 5
    for protocol in looked_for:
        for name in get_protocol_members(protocol):
            assert inspect.isfunction(getattr(protocol, name)), f"{protocol.__name__}.{name}"
