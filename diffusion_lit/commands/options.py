"""The options that several commands share: the model, its condition, and how it is sampled.

A command takes one of these as an argument, and its parser makes an option of each field.
"""

from dataclasses import dataclass, fields
from itertools import product
from typing import Any, ClassVar, TypeVar

from diffusion_lit.modules.autoencoders import load_autoencoder
from diffusion_lit.modules.guides import take_guide
from diffusion_lit.modules.latent import LatentDiffusion
from diffusion_lit.modules.load import prepared_data
from diffusion_lit.modules.prior import PriorSampling, mixture_of
from diffusion_lit.modules.protocols import DataSet, Model, Settings
from diffusion_lit.modules.vae import VAE
from diffusion_lit.pretrained.load_model import load_model
from diffusion_lit.runtime.ranks import rank_zero_first
from diffusion_lit.words import article

S = TypeVar("S", bound=Settings)

PRIORS = ("standard", "gmm")


@dataclass(frozen=True)
class SamplingOptions:
    """How images are drawn; what is None is as the model was trained to be sampled.

    Args:
        cfg_scale: Guidance, uncond + cfg_scale * (cond - uncond): 1 is the plain conditional model, 0 the
            unconditional one.
        guide_ckpt: Checkpoint of a worse model of the same images, which samples are led away from (autoguidance): of
            a smaller network, an earlier checkpoint of the run, an export, or a snapshot of averages.
        guide_scale: Strength of that, guide + guide_scale * (model - guide): 1 is the model alone, 2 by default.
        sampler: Name of the sampler; `diffusion-lit sample --help` lists them.
        num_steps: Number of sampling steps.
        grid: Noise levels of the steps: karras, exponential, log_snr, uniform_t, leading, linspace, trailing or levels.
        sigma_min: Smallest noise level of the grid above 0.
        sigma_max: Largest noise level of the grid.
        clip_x0: Threshold on predicted images: none, static or dynamic.
        sampler_options: Options of the sampler, as JSON: '{"S_churn": 40}'.
        grid_options: Options of the grid, as JSON: '{"rho": 7}'. '{"levels": [80, 0.8]}' is a grid of these levels.
        guidance_interval: Noise levels within which guidance acts, as JSON: '[0.3, 5]'.
        guidance_rescale: Share in [0, 1] of the rescaling of guided predictions.
    """

    lists: ClassVar[dict[str, Any]] = {}  # the options that are lists, and what each is a list of

    cfg_scale: float | None = None
    guide_ckpt: str | None = None
    guide_scale: float | None = None
    sampler: str | None = None
    num_steps: int | None = None
    grid: str | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    clip_x0: str | None = None
    sampler_options: dict[str, int | float | str | bool] | None = None
    grid_options: dict[str, int | float | str | bool | list[float]] | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float | None = None

    @property
    def guidance(self) -> dict[str, Any]:
        """The options of guidance as given, by their names."""
        names = ("cfg_scale", "guidance_interval", "guidance_rescale", "guide_scale")
        return {name: getattr(self, name) for name in names}

    def settings(self, default: S) -> list[S]:
        """The settings with what is given in place, one for each combination of the options that are lists.

        Args:
            default: The model's own.

        Returns:
            At least one.

        Raises:
            ValueError: If a list cannot be read, or settings do not fit together.
        """
        fixed = {one.name: getattr(self, one.name) for one in fields(SamplingOptions) if one.name not in self.lists}
        values = [dict.fromkeys(_words(name, getattr(self, name), kind)) for name, kind in self.lists.items()]
        return [default.replace(**dict(zip(self.lists, each, strict=True)), **fixed) for each in product(*values)]


@dataclass(frozen=True)
class DrawOptions(SamplingOptions):
    """A model, its condition, and how it is sampled.

    Args:
        ckpt_path: Checkpoint file, such as runs/edm_digits/version_0/checkpoints/last.ckpt, or a folder of `lightning
            export`.
        pretrained: A model of diffusers instead, in safetensors: its name on the Hugging Face hub, such as
            google/ddpm-cifar10-32 or DeepFloyd/IF-I-M-v1.0, or its folder. Needs the extra `pretrained`.
        prompt: What a text model shall show: --prompt "a rocket ship"; again for more.
        negative_prompt: The null prompt of a text model, which guidance leads away from.
        labels: Classes by number or name, such as 3,3,7; `all`, each equally often, where a command draws many images.
        seed: Seed of the first image; the next ones follow.
        device: `auto` (an accelerator where there is one), `cpu`, `cuda`, `cuda:1`, ...
        prior: What a VAE draws from: `standard`, the prior that it was trained with, or `gmm`, a Gaussian mixture
            fitted to its latents of training images (once, then from the cache).
        decoder: Checkpoint of a VAE, or the folder of its runs, whose decoder was trained on the model's own encoder
            (`frozen_encoder`) and takes the place of a latent model's.
        data_root: Where the checkpoint's own data lies now.
    """

    ckpt_path: str | None = None
    pretrained: str | None = None
    prompt: list[str] | None = None
    negative_prompt: str = ""
    labels: str | None = None
    seed: int = 0
    device: str = "auto"
    prior: str | None = None
    decoder: str | None = None
    data_root: str | None = None

    @property
    def prompts(self) -> list[str]:
        """The prompts, in order."""
        return list(self.prompt or [])

    def load_model(self, **further: Any) -> Model:
        """The model, in eval mode, on the CPU.

        Args:
            further: Further arguments of `diffusion_lit.pretrained.load_pretrained`.

        Returns:
            The model.

        Raises:
            ValueError: If not one model is given, --labels stands beside a text model, or the guide does not fit.
        """
        model = load_model(
            self.ckpt_path, self.pretrained, self.prompts, negative_prompt=self.negative_prompt, **further
        )
        if self.labels is not None and model.prompts is not None:
            raise ValueError(
                f"--labels {self.labels} was given, but {self.pretrained} is a text model and has no classes; say what "
                "it shall show by --prompt."
            )
        if self.decoder is not None:
            self._choose_decoder(model)
        if self.prior is not None:
            self._choose_prior(model)
        if self.guide_ckpt is not None:
            take_guide(model, self.guide_ckpt)
        return model

    def _choose_decoder(self, model: Model) -> None:
        """Gives a latent model the decoder that is asked for."""
        if not isinstance(model, LatentDiffusion):
            raise ValueError(
                f"--decoder {self.decoder} is for latent diffusion, and {self.ckpt_path or self.pretrained} is "
                f"{article(model)}; leave it out."
            )
        model.space.take_decoder(load_autoencoder(str(self.decoder)), f"--decoder {self.decoder}")

    def _choose_prior(self, model: Model) -> None:
        """Gives a VAE the prior that is asked for."""
        if self.prior not in PRIORS:
            raise ValueError(f"--prior is {self.prior!r}; choose one of {', '.join(PRIORS)}.")
        if not isinstance(model, VAE):
            raise ValueError(
                f"--prior {self.prior} is for a VAE, and {self.ckpt_path or self.pretrained} is {article(model)}, "
                "which draws by its sampler; leave it out."
            )
        if self.prior == "gmm":
            model.sampling = PriorSampling(
                rank_zero_first(lambda: mixture_of(model.net, self._training_data()), "the mixture")
            )

    def _training_data(self) -> DataSet:
        """The data that the checkpoint was trained on, set up."""
        assert self.ckpt_path is not None
        return prepared_data(self.ckpt_path, "fit", root=self.data_root)


@dataclass(frozen=True)
class StepsOptions(DrawOptions):
    """As `DrawOptions`, with a list of steps, each of which is drawn.

    Args:
        num_steps: Number of sampling steps; a list such as 10,20 draws the same samples by each.
    """

    num_steps: str | None = None  # type: ignore[assignment]
    lists = {"num_steps": int}  # noqa: RUF012 (a ClassVar, as the parent says)


@dataclass(frozen=True)
class SweepOptions(DrawOptions):
    """As `DrawOptions`, with lists of samplers, steps and strengths of guidance, every combination of which is drawn.

    Args:
        cfg_scale: Guidance, uncond + cfg_scale * (cond - uncond); a list such as 1,2.5 takes each.
        guide_scale: Autoguidance, guide + guide_scale * (model - guide); a list such as 1,2 takes each.
        sampler: Name of the sampler; a list such as heun,ddim takes each.
        num_steps: Number of sampling steps; a list such as 9,18 takes each.
    """

    cfg_scale: str | None = None  # type: ignore[assignment]
    guide_scale: str | None = None  # type: ignore[assignment]
    sampler: str | None = None
    num_steps: str | None = None  # type: ignore[assignment]
    lists = {"sampler": str, "num_steps": int, "cfg_scale": float, "guide_scale": float}  # noqa: RUF012


def _words(option: str, text: str | None, kind: Any) -> list[Any]:
    """The values of a list on the command line; one None where it was not given."""
    if text is None:
        return [None]
    try:
        return [kind(word.strip()) for word in str(text).split(",")]
    except ValueError as error:
        raise ValueError(f"--{option} {text} is not a list of numbers such as 9,18,35.") from error
