"""No number that a user gives is taken in silence where it makes no sense: every class and function, by signature."""

import inspect
import math
import typing
from dataclasses import dataclass, fields

import pytest
import torch

import datamodules
from datamodules.decode import Transform
from diffusion_lit import callbacks, nets
from diffusion_lit.callbacks.watchdog import Watchdog
from diffusion_lit.checks import check_count, check_number, check_numbers, check_share
from diffusion_lit.commands.evaluate_plan import Plan
from diffusion_lit.commands.trainer_settings import check_numbers as check_trainer
from diffusion_lit.diffusion import (
    consistency_loss,
    consistency_parts,
    degradations,
    loss,
    meanflow_loss,
    noise,
    preconditioning,
)
from diffusion_lit.diffusion.cold import ColdSampling
from diffusion_lit.diffusion.editing.composites import Hybrid, gaussian_blur
from diffusion_lit.diffusion.editing.sweeps import NoiseBetween
from diffusion_lit.diffusion.generate import Sampling
from diffusion_lit.diffusion.grids import GRIDS
from diffusion_lit.diffusion.guidance import Autoguidance, ClassifierFreeGuidance, ClassifierGuidance
from diffusion_lit.diffusion.likelihood import Likelihood
from diffusion_lit.diffusion.preconditioning import EDMPreconditioning
from diffusion_lit.diffusion.samplers import SAMPLERS
from diffusion_lit.diffusion.wrappers import ClipX0
from diffusion_lit.evaluation.features import Pixels
from diffusion_lit.evaluation.generation import GenerationJob
from diffusion_lit.modules import DDPM, EDM, VAE, Classifier, ColdDiffusion, Consistency, LatentDiffusion, MeanFlow
from diffusion_lit.modules.optim import WarmupStableDecay
from diffusion_lit.modules.reconstruction import DiscretisedGaussian, DiscretisedLogistic
from diffusion_lit.pretrained.models import Upsampler


def public(module, base=object):
    """Classes that a module defines or exports and that can be built."""
    found = [value for name, value in vars(module).items() if not name.startswith("_")]
    return [one for one in found if inspect.isclass(one) and issubclass(one, base)]


def denoiser(x, sigma, label=None):
    return x * 0.5


denoiser.num_classes = 2
PARAMETER = [torch.nn.Parameter(torch.zeros(1))]
LEVELS = torch.tensor([10.0, 1.0, 0.0])
NET = {"in_channels": 1, "image_size": 16}
LISTS = (tuple, list)
GIVEN = {  # what has no default
    "betas": torch.full((5,), 0.1),
    "sigma": 0.5,
    "blur_sigma": 1.0,
    "first": 0,
    "last": 1,
    "shares": torch.zeros(1),
    "denoiser": denoiser,
    "guide": denoiser,
    "teacher": denoiser,
    "classifier": denoiser,
    "optimizer": torch.optim.SGD(PARAMETER, 0.1),
    "num_steps": 4,
    "num_classes": 2,
    "batch_size": 4,
    "scaling": EDMPreconditioning(),
    "schedule": noise.LinearSchedule(),
    "extractor": None,
    "size": 16,
    "channels": 1,
    "resize": "area",
    "root": ".",
    "given": ".",
    "image": ".",
    "path": ".",
    **NET,
}

PLAN = {
    **dict.fromkeys(field.name for field in fields(Plan)),
    **{"ckpt_path": "none.ckpt", "out": "report.json", "num_samples": 4, "likelihood_images": 4, "num_blocks": 1},
    **{"batch_size": 4, "seed": 0},
}


@dataclass
class Case:
    """A class or function and the arguments without which it cannot be called."""

    call: typing.Callable
    name: str
    extra: dict


def cases():
    found = [
        *public(noise, noise.Schedule),
        *public(noise, noise.NoiseLevels),
        *public(preconditioning, preconditioning.Preconditioning),
        *public(loss, torch.nn.Module),
        *(meanflow_loss.LevelPairs, meanflow_loss.AdaptiveWeight),
        *public(consistency_loss, torch.nn.Module),
        *public(consistency_parts, consistency_parts.Gap),
        *public(consistency_parts, consistency_parts.Distance),
        *public(consistency_parts, consistency_parts.PathPoint),
        *public(degradations, degradations.Degradation),
        *(getattr(callbacks, name) for name in callbacks.__all__),
        *(ClipX0, ClassifierFreeGuidance, Autoguidance, ClassifierGuidance, Sampling, ColdSampling, Likelihood),
        *(WarmupStableDecay, DiscretisedGaussian, DiscretisedLogistic, Watchdog, Transform),
        *(nets.UNet, nets.DiT, nets.Autoencoder, nets.ConvClassifier, nets.Augment),
        *(getattr(datamodules, name) for name in datamodules.__all__ if name != "Subset"),
        *(Hybrid, NoiseBetween),
    ]
    for one in dict.fromkeys(found):
        if not inspect.isabstract(one) and one not in (noise.Schedule, preconditioning.Preconditioning):
            yield Case(one, one.__name__, {})
    unet = nets.UNet(1, 16, 2, model_channels=8, num_blocks=1)
    for module, net, more in (
        *((module, unet, {}) for module in (DDPM, EDM, ColdDiffusion, Consistency)),
        (MeanFlow, nets.UNet(1, 16, 2, model_channels=8, num_blocks=1, takes_until=True), {}),
        (LatentDiffusion, unet, {"vae_ckpt": "runs/none"}),
        (VAE, nets.Autoencoder(1, 16, model_channels=8), {}),
        (Classifier, nets.ConvClassifier(1, 16, 2), {}),
    ):
        yield Case(module, module.__name__, {"net": net, **more})
    yield Case(meanflow_loss.TrainingGuidance, "TrainingGuidance", {"cfg_scale": 2.0})
    yield Case(datamodules.Subset, "Subset", {"data": datamodules.Digits(batch_size=4)})
    yield Case(Plan, "evaluate", PLAN)
    job = {"sampling": Sampling(), "count": 4, "seed": 0, "labels": None, "record": {}, "folder": None}
    yield Case(GenerationJob, "GenerationJob", job)
    yield Case(Pixels().extract, "Pixels.extract", {"images": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)})
    yield Case(gaussian_blur, "gaussian_blur", {"images": torch.zeros(1, 1, 8, 8)})
    for name, grid in GRIDS.items():
        yield Case(grid, name, {"levels": [80.0, 8.0, 0.8, 0.08]} if name == "levels" else {})
    for name, sampler in SAMPLERS.items():
        call = {"denoise": denoiser, "x": torch.zeros(1, 1, 2, 2), "sigmas": LEVELS}
        yield Case(sampler.function, name, call)


def numeric(annotation):
    """Whether a parameter takes numbers, whether these are whole, and whether there may be several."""
    kinds = (typing.get_args(annotation) or (annotation,)) if typing.get_origin(annotation) not in LISTS else ()
    several = [kind for kind in (annotation, *kinds) if typing.get_origin(kind) in LISTS]
    kinds = [*kinds, *(one for kind in several for one in typing.get_args(kind))]
    return (float in kinds or int in kinds) and str not in kinds, float not in kinds, bool(several)


def parameters():
    for case in cases():
        target = case.call.__init__ if inspect.isclass(case.call) else case.call
        try:
            hints = typing.get_type_hints(target)
        except NameError:
            hints = {}
        for parameter in inspect.signature(case.call).parameters.values():
            is_number, whole, several = numeric(hints.get(parameter.name, parameter.annotation))
            if is_number and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                yield pytest.param(case, parameter.name, whole, several, id=f"{case.name}-{parameter.name}")


def arguments(case):
    needed = inspect.signature(case.call).parameters.values()
    needed = [one.name for one in needed if one.default is inspect.Parameter.empty and one.name not in case.extra]
    return {**case.extra, **{name: GIVEN[name] for name in needed if name in GIVEN}}


@pytest.mark.parametrize(("case", "name", "whole", "several"), parameters())
def test_every_number_is_looked_at(case, name, whole, several):
    """NaN never passes, nor does infinity but where the range is open; a count is whole and not negative."""
    nonsense = [math.nan, -math.inf, *([2.5, -5, True] if whole else [])]
    for value in nonsense:
        with pytest.raises(ValueError, match=r"nan|inf|2\.5|-5|True"):
            case.call(**{**arguments(case), name: [value, value] if several else value})


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: callbacks.EMA(half_life=math.nan), "half_life is nan"),
        (lambda: callbacks.EMA(ramp_up=-5), "ramp_up is -5"),
        (lambda: callbacks.LossByNoiseLevel(sigmas=(-1,)), "sigmas is -1"),
        (lambda: callbacks.LastCheckpoint(-1), "every_n_train_steps is -1"),
        (lambda: WarmupStableDecay(torch.optim.SGD(PARAMETER, 0.1), warmup_steps=-5), "warmup_steps is -5"),
        (lambda: Sampling(cfg_scale=math.nan), "cfg_scale is nan"),
        (lambda: Sampling().replace(cfg_scale=math.nan), "cfg_scale is nan"),
        (lambda: nets.UNet(1, 16, attention_resolutions=(3,)), "attention_resolutions has 3"),
        (lambda: nets.UNet(1, 16, linear_attention_resolutions=(32,)), "linear_attention_resolutions has 32"),
        (lambda: nets.UNet(1, 16, channel_mult=()), "channel_mult is empty"),
        (lambda: nets.UNet(1, 16, channel_mult=(1, 0)), "channel_mult is 0"),
        (lambda: EDM(nets.UNet(1, 16, attention_resolutions=()), label_dropout=math.nan), "label_dropout is nan"),
        (lambda: DDPM(nets.UNet(1, 16, attention_resolutions=()), label_dropout=-1), "label_dropout is -1"),
        (lambda: VAE(nets.Autoencoder(1, 16), kl_weight=math.nan), "kl_weight is nan"),
        (lambda: VAE(nets.Autoencoder(1, 16), kl_warmup_steps=-5), "kl_warmup_steps is -5"),
        (lambda: Classifier(nets.ConvClassifier(1, 16, 2), label_smoothing=math.nan), "label_smoothing is nan"),
        (lambda: Classifier(nets.ConvClassifier(1, 16, 2), shift=-1), "shift is -1"),
        (lambda: Upsampler(None, Sampling(), (1, 8, 8), noise.LinearSchedule(), math.nan), "noise_level is nan"),
        (lambda: Upsampler(None, Sampling(), (1, 8, 8), noise.LinearSchedule(), 1000), "noise_level is 1000"),
        (lambda: ClassifierFreeGuidance(denoiser, torch.tensor([1.0, math.nan])), "cfg_scale is nan"),
    ],
)
def test_what_trained_to_ruin_in_silence_is_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("accumulate_grad_batches", -2, 4),
        ("accumulate_grad_batches", 0, None),
        ("gradient_clip_val", math.nan, 1.0),
        ("gradient_clip_val", -1.0, 0),
        ("check_val_every_n_epoch", -1, None),
        ("log_every_n_steps", -1, 50),
        ("max_steps", -2, -1),
        ("max_epochs", 2.5, -1),
        ("num_sanity_val_steps", -2, -1),
        ("val_check_interval", math.nan, "00:10:00"),
        ("limit_val_batches", -0.5, 0),
        ("limit_train_batches", math.nan, 1.0),
        ("overfit_batches", -1, 0.0),
    ],
)
def test_numbers_of_the_trainer_that_lightning_takes_in_silence_are_refused(name, bad, good):
    with pytest.raises(ValueError, match=f"trainer.{name} is {bad}"):
        check_trainer({name: bad})
    check_trainer({name: good})


def test_a_refusal_is_one_sentence_with_the_range():
    for call, words in (
        (
            lambda: check_number(above=0, rho=0, hint=", such as 7"),
            "rho is 0; give a finite number above 0, such as 7.",
        ),
        (lambda: check_number(least=0, below=1, p=1), "p is 1; give a finite number from 0 to below 1."),
        (lambda: check_number(least=1, most=3, whole=True, n=4), "n is 4; give a whole number from 1 to 3."),
        (lambda: check_number(x=math.inf), "x is inf; give a finite number."),
        (lambda: check_count(n=2.5), "n is 2.5; give a whole number from 1 on."),
        (lambda: check_share(p="a"), "p is 'a'; give a finite number from 0 to 1."),
        (lambda: check_numbers("s", [], empty=False), "s is empty; give at least one number."),
        (lambda: check_numbers("s", [1, -1], above=0), "s is -1; give a finite number above 0."),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == words
    check_number(least=0, a=None, b=0, c=1e9)
    check_number(infinite=True, a=math.inf)
