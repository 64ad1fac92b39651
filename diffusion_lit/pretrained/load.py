"""Reads a pretrained model of diffusers: `load_pretrained("google/ddpm-cifar10-32")`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from diffusion_lit.checks import check_count
from diffusion_lit.pretrained.autoencoders import load_pretrained_autoencoder
from diffusion_lit.pretrained.files import find_model, library, load_part, part_of, read_json, refuse_foreign_parts
from diffusion_lit.pretrained.models import (
    Cascade,
    PretrainedLatentModel,
    PretrainedModel,
    Upsampler,
    make_denoiser,
)
from diffusion_lit.pretrained.networks import ClassNet, PlainNet, TextNet, UpsamplingNet
from diffusion_lit.pretrained.prompts import embed_prompts
from diffusion_lit.pretrained.schedulers import (
    learns_variance,
    make_sampling,
    make_scaling,
    make_schedule,
    read_scheduler,
)
from diffusion_lit.words import article

PARTS = ("unet", "scheduler", "vae", "text_encoder", "tokenizer")
UPSAMPLER_PARTS = ("unet", "scheduler", "image_noising_scheduler")
NETWORKS = ("UNet2DModel", "UNet2DConditionModel")


class Defaults(NamedTuple):
    """How a pipeline samples by default."""

    num_steps: int
    cfg_scale: float


IF_STAGE_1, IF_STAGE_2, STABLE_DIFFUSION = Defaults(100, 7.0), Defaults(50, 4.0), Defaults(50, 7.5)
DDPM_PIPELINE, DDIM_PIPELINE = Defaults(1000, 1.0), Defaults(50, 1.0)


def load_pretrained(
    name: str,
    prompts: Sequence[str] = (),
    negative_prompt: str = "",
    stage_2: str | None = None,
    stage_2_options: dict[str, Any] | None = None,
) -> PretrainedModel:
    """Makes a diffusers model one that samples and edits like those trained here.

    That is a UNet2DModel, or a UNet2DConditionModel with its text encoder (CLIP or T5) on pixels or on the latents of
    an autoencoder, in the layouts of google/ddpm-cifar10-32, Stable Diffusion 1 and 2, and DeepFloyd IF. The denoiser
    is in the coordinates x = x0 + sigma n on the noise levels of the model's own scheduler, which also gives the
    default settings. Prompts are embedded once and kept; the text encoder is freed before the U-Net is loaded.

    Two of diffusers' conventions are not the default of the samplers here: its DDIM keeps the noise of the estimate
    before the threshold (`use_clipped_model_output` False, which the default settings of a model saved with DDIM say),
    and its DDPM adds noise to a last step that does not begin at step 0. The pipelines' safety checkers and watermarks
    are not run; the models' licences ask for care with what is published.

    Args:
        name: A folder that diffusers' `save_pretrained` wrote, or a name OWNER/NAME on the Hugging Face hub.
        prompts: What a text model is asked for: label i means prompt i. Without one it draws for the null prompt.
        negative_prompt: The null prompt, which guidance leads away from.
        stage_2: Name or folder of an upsampler in the layout of DeepFloyd's IF-II, which `generate` then ends with.
        stage_2_options: Its settings where they differ from its own: fields of `Sampling`, and `noise_level`, the step
            to which it noises the small images (250).

    Returns:
        The model, in eval mode, in float32, on the CPU.

    Raises:
        ValueError: If the model is not available, is of another kind, or prompts are given to one that reads none.
    """
    model = find_model(name, PARTS)
    refuse_foreign_parts(model, PARTS)
    unet_class, config = _network_config(model)
    _check_parts(model, config)
    scheduler = read_scheduler(model)
    latent = (model / "vae").is_dir()
    embeddings = _embeddings(model, unet_class, list(prompts), negative_prompt, name)
    channels = int(config.get("in_channels") or 0)
    learned = _learned(config, channels, scheduler, model)
    shape = (channels, *_size(config, model))
    unet = load_part(getattr(library("diffusers"), unet_class), part_of(model, "unet"), low_cpu_mem_usage=False)
    net = _network(unet, (1 + learned) * channels, config, embeddings)
    denoiser = make_denoiser(net, make_scaling(scheduler), learned)
    sampling = make_sampling(scheduler, *_defaults(scheduler, embeddings is not None, latent))
    known = None if embeddings is None else list(prompts)
    if not latent:
        made = PretrainedModel(name, denoiser, sampling, shape, known)
    else:
        autoencoder = load_pretrained_autoencoder(str(model / "vae"))
        scale = float(autoencoder.config["config"].get("scaling_factor", 0.18215))
        if autoencoder.latent_channels != shape[0]:
            raise ValueError(
                f"The U-Net of {name} takes {shape[0]} channels, but its autoencoder makes latents of "
                f"{autoencoder.latent_channels}; get a model whose parts belong together."
            )
        made = PretrainedLatentModel(autoencoder, scale, name, denoiser, sampling, shape, known)
    if stage_2 is None:
        if stage_2_options:
            raise ValueError("stage_2_options were given without stage_2, the upsampler that they are for.")
        return made
    if embeddings is None:
        raise ValueError(f"{name} reads no text, and the second stage {stage_2} is told the first one's prompts.")
    return Cascade(made, load_upsampler(stage_2, embeddings, **(stage_2_options or {})))


def load_upsampler(name: str, embeddings: Tensor, noise_level: int = 250, **changes: Any) -> Upsampler:
    """Reads a second stage in the layout of DeepFloyd's IF-II.

    Args:
        name: A folder, or a name OWNER/NAME on the Hugging Face hub.
        embeddings: The first stage's embeddings, shape (P + 1, L, D), the null prompt's last.
        noise_level: The step to which the small images are noised.
        changes: Fields of `Sampling` that shall differ from those of its own pipeline.

    Returns:
        The upsampler.

    Raises:
        ValueError: If the model is not available or is no such upsampler, or an option is none.
    """
    model = find_model(name, UPSAMPLER_PARTS)
    refuse_foreign_parts(model, UPSAMPLER_PARTS)
    unet_class, config = _network_config(model)
    channels = int(config.get("in_channels") or 0) // 2
    if unet_class != "UNet2DConditionModel" or config.get("class_embed_type") != "timestep" or channels < 1:
        raise ValueError(f"{name} is no upsampler in the layout of IF-II; give DeepFloyd/IF-II-M-v1.0 or its like.")
    scheduler = read_scheduler(model)
    scaling, learned = make_scaling(scheduler), _learned(config, channels, scheduler, model)
    own = make_sampling(scheduler, *IF_STAGE_2)
    try:
        sampling = own.replace(**changes)
    except TypeError as error:
        raise ValueError(f"stage_2_options: {str(error).rpartition(') ')[2] or error}.") from error
    check_count(0, noise_level=noise_level)
    noising = make_schedule(read_scheduler(model, "image_noising_scheduler"))
    unet = load_part(library("diffusers").UNet2DConditionModel, part_of(model, "unet"), low_cpu_mem_usage=False)
    net = UpsamplingNet(unet, (1 + learned) * channels, embeddings)
    shape = (channels, *_size(config, model))
    return Upsampler(make_denoiser(net, scaling, learned), sampling, shape, noising, noise_level)


def _network_config(model: Path) -> tuple[str, dict[str, Any]]:
    """Class and configuration of the U-Net."""
    config = read_json(part_of(model, "unet") / "config.json")
    kind = str(config.get("_class_name", "a network without a name"))
    if kind not in NETWORKS:
        raise ValueError(f"{model} holds {kind}; the networks that can be read are {' and '.join(NETWORKS)}.")
    return kind, config


def _check_parts(model: Path, config: dict[str, Any]) -> None:
    """Refuses what the network would be told and this project has not."""
    index = read_json(model / "model_index.json") if (model / "model_index.json").is_file() else {}
    for part in ("text_encoder_2", "transformer", "vqvae", "bert", "image_encoder", "image_noising_scheduler"):
        if (index.get(part) or [None])[0] is not None:
            way = "; give it as stage_2, after a first stage" if part == "image_noising_scheduler" else ""
            raise ValueError(
                f"{model} is {article(str(index.get('_class_name')))} with {part}, which is not supported here{way}."
            )
    for key, meaning in (("addition_embed_type", "further embeddings"), ("time_cond_proj_dim", "the guidance's scale")):
        if config.get(key) not in (None, "text"):
            raise ValueError(f"The U-Net of {model} is told {meaning} ({key}), which is not supported here.")
    if config["_class_name"] == "UNet2DConditionModel" and config.get("num_class_embeds") is not None:
        raise ValueError(f"The U-Net of {model} is told classes beside texts, which is not supported here.")
    if config.get("class_embed_type") is not None:
        raise ValueError(
            f"The U-Net of {model} has class_embed_type {config['class_embed_type']!r}, like an upsampler; give such a "
            "one as stage_2, after a first stage."
        )


def _embeddings(model: Path, unet: str, prompts: list[str], negative: str, name: str) -> Tensor | None:
    """The table of the prompts' embeddings, the null one last; None for a network that reads no text."""
    if unet == "UNet2DModel":
        if prompts or negative:
            raise ValueError(
                f"A prompt was given, but {name} reads no text; leave it out, or give a text model such as "
                "DeepFloyd/IF-I-M-v1.0."
            )
        return None
    if not (model / "text_encoder" / "config.json").is_file():
        raise ValueError(
            f"{name} holds a network that is told texts, but no text_encoder; give a model that is whole, saved with "
            "its text_encoder and tokenizer."
        )
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("A prompt is empty; to draw for none, leave it out.")
    return embed_prompts(model, [*prompts, negative])


def _size(config: dict[str, Any], model: Path) -> tuple[int, int]:
    size = config.get("sample_size")
    if size is None:
        raise ValueError(f"The U-Net of {model} does not say for what size it is made: set sample_size in its config.")
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _learned(config: dict[str, Any], channels: int, scheduler: dict[str, Any], model: Path) -> bool:
    """Whether the U-Net gives a variance that its scheduler reads; checks the number of its channels."""
    given, learned = int(config.get("out_channels") or 0), learns_variance(scheduler)
    if given not in (channels, 2 * channels):
        raise ValueError(
            f"The U-Net of {model} takes {channels} channels and gives {given}: it is told an image or a mask beside "
            "what it denoises, which is not supported here; give a plain model."
        )
    if learned and given == channels:
        raise ValueError(
            f"The scheduler of {model} has variance_type {scheduler['variance_type']!r}, but the U-Net gives "
            f"{given} channels, which is the prediction alone; a learned variance takes {2 * channels}."
        )
    return learned


def _network(unet: nn.Module, channels: int, config: dict[str, Any], embeddings: Tensor | None) -> PlainNet:
    """The U-Net behind the interface of its conditions."""
    if embeddings is not None:
        return TextNet(unet, channels, embeddings)
    if config.get("num_class_embeds"):
        return ClassNet(unet, channels, int(config["num_class_embeds"]))
    return PlainNet(unet, channels)


def _defaults(scheduler: dict[str, Any], text: bool, latent: bool) -> Defaults:
    """Steps and guidance of the pipeline that the model is saved with."""
    if text:
        return STABLE_DIFFUSION if latent else IF_STAGE_1
    return DDPM_PIPELINE if scheduler["_class_name"].startswith("DDPM") else DDIM_PIPELINE
