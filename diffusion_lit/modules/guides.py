"""The worse model of autoguidance, read from its file and put beside the model that it guides.

A checkpoint never has a file opened that it names: of a run whose settings name a guide it holds the guide itself, and
`modules.load` builds it from there.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

from diffusion_lit.diffusion.denoiser import Denoiser
from diffusion_lit.diffusion.guidance import Guide
from diffusion_lit.diffusion.models import PixelModel
from diffusion_lit.modules.autoencoders import part_of
from diffusion_lit.modules.labels import class_names_of
from diffusion_lit.modules.latent import LatentDiffusion
from diffusion_lit.modules.load import HELD, load_module
from diffusion_lit.modules.warm_start import Source
from diffusion_lit.storage.checkpoints import read_checkpoint
from diffusion_lit.storage.hashing import weights_hash
from diffusion_lit.storage.runs import find_checkpoint
from diffusion_lit.words import article, counted, few


def guide_beside(model: object) -> Guide | None:
    """The worse model that guides a model, None if there is none."""
    guide = model.denoiser.guide if isinstance(model, PixelModel) else None
    return guide if isinstance(guide, Guide) else None


def expect_guide(model: object, data: object) -> None:
    """Reads the guide that a run's settings name, so that it is told before the run begins if there is none that fits.

    That of latents waits for their scale, which is known when training starts.

    Args:
        model: The model.
        data: Its data, which knows the classes' names.

    Raises:
        ValueError: As `take_guide`.
    """
    if not isinstance(model, PixelModel) or model.sampling.guide_ckpt is None:
        return
    if isinstance(model, LatentDiffusion):
        Source.read(find_checkpoint(model.sampling.guide_ckpt))
        return
    model.class_names = class_names_of(data, model)
    take_guide(model, model.sampling.guide_ckpt)


def take_guide(model: object, given: str) -> Guide:
    """Loads a worse model and puts it beside a model, whose sampling may then name it as `guide_ckpt`.

    Args:
        model: The model.
        given: A checkpoint, a run, an export, or a snapshot of averages of the same network.

    Returns:
        The guide, `model.denoiser.guide` from now on.

    Raises:
        ValueError: If there is no such file, it cannot be used, or it is of other images, latents or classes.
    """
    if not isinstance(model, PixelModel):
        raise ValueError(f"--guide_ckpt {given} guides a denoiser, and the model is {article(model)}; leave it out.")
    path = find_checkpoint(given)
    denoiser, content = _of_snapshot(model, path) if path.suffix == ".safetensors" else _of_checkpoint(model, path)
    guide = Guide(denoiser, given, weights_hash(denoiser.state_dict()), content)
    model.denoiser.guide = guide
    return guide


def _of_checkpoint(model: PixelModel, path: Path) -> tuple[Denoiser, dict[str, Any]]:
    """The denoiser that a checkpoint describes, and what another checkpoint keeps of it."""
    guide = load_module(path)
    if not isinstance(guide, PixelModel):
        raise ValueError(f"{path} holds {article(guide)}, which does not denoise and cannot guide.")
    for what, mine, its in (
        ("images of shape", tuple(model.image_shape), tuple(guide.image_shape)),
        ("what it denoises of shape", tuple(model.x_shape), tuple(guide.x_shape)),
        ("latents of the autoencoder", *(_space(one) for one in (model, guide))),
    ):
        if mine != its:
            raise ValueError(f"The guide {path} has {what} {its}, and the model {mine}; take one of the same data.")
    names, known = list(model.class_names), list(guide.class_names)
    if guide.num_classes and (guide.num_classes != model.num_classes or (names and names != known)):
        raise ValueError(
            f"The guide {path} knows {counted(guide.num_classes, 'class')}, {few(known)}, and the model "
            f"{model.num_classes}, {few(names)}; take one of the same classes, or an unconditional one."
        )
    checkpoint = read_checkpoint(path)
    return guide.denoiser, {name: checkpoint[name] for name in HELD if name in checkpoint}


def _of_snapshot(model: PixelModel, path: Path) -> tuple[Denoiser, dict[str, Any]]:
    """The model's own network with the weights of a snapshot, and what a checkpoint keeps of it."""
    state, denoiser = Source.read(path).state, deepcopy(model.denoiser)
    own, theirs = denoiser.state_dict(), part_of(state, "denoiser")
    trained = dict(denoiser.named_parameters())
    odd = [name for name, value in own.items() if name not in theirs or theirs[name].shape != value.shape]
    odd = [name for name in odd if name in trained or name in theirs]
    if odd:
        raise ValueError(
            f"The snapshot {path} is of another network than the model: denoiser.{odd[0]} does not fit. Guide by the "
            "checkpoint of its run, which says what network it is."
        )
    denoiser.load_state_dict({name: theirs.get(name, value) for name, value in own.items()})
    whole = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    whole |= {name: value for name, value in state.items() if name in whole}
    known = {"class_names": list(model.class_names)}
    return denoiser, {
        "hyper_parameters": dict(model.hparams) if isinstance(model, LightningModule) else {},
        "state_dict": whole,
        "diffusion_lit": known,
    }


def _space(model: PixelModel) -> str:
    """The kind of latents that a model denoises, with their scale; empty for images."""
    if not isinstance(model, LatentDiffusion):
        return ""
    space, scale = model.space, ""
    if space.mean is not None and space.std is not None:
        scale = weights_hash({"mean": space.mean, "std": space.std.to(torch.float64)})[:8]
    return f"{space.sha256[:12]} at scale {scale}"
