"""Sampling from end to end: settings in, images out.

A `Sampling` names a sampler, a grid and a guidance, and draws x0 from any denoiser. Callbacks, `diffusion-lit sample`
and evaluation all use it, so that the same settings and seeds give the same images. Sample i depends on its own seed
alone: the start is sigma_max * n, or sqrt(1 + sigma_max^2) * n on a variance-preserving path, and n and all later draws
come from the generator of that seed.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diffusion_lit.checks import check_number, check_numbers, check_share
from diffusion_lit.diffusion.conversions import SAME
from diffusion_lit.diffusion.denoiser import Denoiser
from diffusion_lit.diffusion.grids import GRIDS, check_levels
from diffusion_lit.diffusion.guidance import Autoguidance, ClassifierFreeGuidance, GivenImage, Guide
from diffusion_lit.diffusion.preconditioning import Preconditioning
from diffusion_lit.diffusion.rng import SeededNoise
from diffusion_lit.diffusion.samplers import SAMPLERS
from diffusion_lit.diffusion.samplers.common import Noise
from diffusion_lit.diffusion.wrappers import ClipX0, Conditioned, DenoiserWrapper
from diffusion_lit.words import counted

CLIP_OPTIONS = {"none": set[str](), "static": {"limit"}, "dynamic": {"limit", "percentile", "ceiling"}}

NUM_STEPS, GRID = 18, "karras"  # by default

StepCallback = Callable[[int, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Sampling:
    """How images are drawn from a denoiser.

    Args:
        sampler: Name of a sampler, a key of `diffusion_lit.diffusion.SAMPLERS`.
        num_steps: Number of steps N, at least 1; with `levels` in `grid_options` as many as these by default, else the
            first N of them.
        grid: Name of a grid of noise levels, a key of `diffusion_lit.diffusion.GRIDS`.
        sigma_min: Smallest noise level above 0 of the grid; by default that of the model.
        sigma_max: Largest noise level of the grid, where sampling starts; by default that of the model.
        cfg_scale: Classifier-free guidance, `uncond + cfg_scale * (cond - uncond)`: 1 is the plain conditional model,
            0 the unconditional one.
        guide_ckpt: Checkpoint of a worse model of the same images that guides too (autoguidance, Karras 2024): a
            smaller network, an earlier checkpoint, an export or a snapshot of an average.
        guide_scale: Its strength, `guide + guide_scale * (model - guide)`: 1 is the model alone.
        guidance_interval: Noise levels (lo, hi) within which guidance of both kinds acts; everywhere when omitted
            (Kynkäänniemi 2024).
        guidance_rescale: Share in [0, 1] of the rescaling of guided predictions (Lin 2023, section 3.4).
        clip_x0: Threshold on predicted images: `none`, `static` (to [-1, 1]) or `dynamic` (a quantile, Saharia 2022).
        sampler_options: Further arguments of the sampler, such as `{"S_churn": 40}` or `{"eta": 0.5}`.
        grid_options: Further arguments of the grid, such as `{"rho": 7}`. `{"levels": [80, 0.8]}` makes the grid
            `levels`: just these noise levels.
        clip_options: Further arguments of the threshold: `limit`, and of a dynamic one `percentile` and `ceiling`.

    Raises:
        ValueError: If a name is unknown, `num_steps` is below 1, or the range of noise levels is empty.
    """

    sampler: str = "heun"
    num_steps: int = NUM_STEPS
    grid: str = GRID
    sigma_min: float | None = None
    sigma_max: float | None = None
    cfg_scale: float = 1.0
    guide_ckpt: str | None = None
    guide_scale: float = 2.0
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0
    clip_x0: str = "none"
    sampler_options: dict[str, Any] = field(default_factory=dict)
    grid_options: dict[str, Any] = field(default_factory=dict)
    clip_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses what no sampler could run."""
        _one_of("sampler", self.sampler, SAMPLERS)
        self._take_levels()
        _one_of("grid", self.grid, GRIDS)
        _one_of("clip_x0", self.clip_x0, CLIP_OPTIONS)
        check_number(least=1, most=1_000_000, whole=True, num_steps=self.num_steps)
        check_number(above=0, sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        check_number(cfg_scale=self.cfg_scale, guide_scale=self.guide_scale)
        check_share(guidance_rescale=self.guidance_rescale)
        check_numbers("guidance_interval", self.guidance_interval, least=0, infinite=True)
        if self.sigma_min is not None and self.sigma_max is not None and self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"sigma_min {self.sigma_min} is not below sigma_max {self.sigma_max}; give a rising range."
            )
        of_sampler = _options_of(SAMPLERS[self.sampler].function, "noise", "callback")
        _check_options(f"sampler {self.sampler!r}", self.sampler_options, of_sampler)
        of_grid = _options_of(GRIDS[self.grid], "sigma_min", "sigma_max")
        _check_options(f"grid {self.grid!r}", self.grid_options, of_grid)
        _check_options(f"threshold {self.clip_x0!r}", self.clip_options, CLIP_OPTIONS[self.clip_x0])

    def _take_levels(self) -> None:
        """Explicit noise levels are the grid, and their number that of the steps, where nothing else was said."""
        given = self.grid_options.get("levels", () if self.grid == "levels" and not self.grid_options else None)
        if given is None or self.grid not in (GRID, "levels"):
            return
        check_levels(given)
        object.__setattr__(self, "grid", "levels")
        if self.num_steps == NUM_STEPS:
            object.__setattr__(self, "num_steps", len(given))
        _check_steps(self.num_steps, given)

    def replace(self, **changes: Any) -> "Sampling":
        """The same settings with some replaced, `None` meaning unchanged.

        Options of the sampler, the grid and the threshold belong to their name: they are dropped when the name changes.
        Noise levels among the options of the grid are the grid, with a step for each.

        Args:
            changes: Fields and their new values.

        Returns:
            New settings.
        """
        changes = {name: value for name, value in changes.items() if value is not None}
        if "levels" in changes.get("grid_options", {}):
            check_levels(changes["grid_options"]["levels"])
            if changes.get("grid", "levels") != "levels":
                raise ValueError(f"The grid {changes['grid']!r} has no option 'levels', which are a grid of their own.")
            changes = {"grid": "levels", "num_steps": len(changes["grid_options"]["levels"]), **changes}
        for name, options in (("sampler", "sampler_options"), ("grid", "grid_options"), ("clip_x0", "clip_options")):
            if changes.get(name, getattr(self, name)) != getattr(self, name):
                changes.setdefault(options, {})
        _check_steps(changes.get("num_steps"), changes.get("grid_options", self.grid_options).get("levels"))
        return replace(self, **changes)

    def sigmas(self, scaling: Preconditioning) -> Tensor:
        """The grid of noise levels for a model.

        Args:
            scaling: The model's prediction type, which knows the noise levels that it was trained on.

        Returns:
            Float64 noise levels of shape (N+1,), falling, ending in 0.
        """
        return GRIDS[self.grid](
            self.num_steps, scaling, sigma_min=self.sigma_min, sigma_max=self.sigma_max, **self.grid_options
        )

    @property
    def autoguided(self) -> bool:
        """Whether a worse model guides."""
        return self.guide_ckpt is not None and self.guide_scale != 1

    @property
    def nfe(self) -> int | None:
        """Denoiser calls per sample; None for an adaptive sampler, whose number is not fixed."""
        return SAMPLERS[self.sampler].nfe(self.num_steps)

    def record(self) -> dict[str, Any]:
        """The settings as plain values, for receipts.

        Returns:
            A dictionary that `Sampling(**record)` turns back; `nfe` is not in it.
        """
        return asdict(self)

    def wrap(self, denoiser: Denoiser, labels: Tensor | None, condition: Tensor | None = None) -> Conditioned:
        """The callable for the sampler: clipped, guided and bound to its inputs.

        Args:
            denoiser: The model.
            labels: Class indices of shape (B,), or None for unconditional sampling.
            condition: Condition images (B, C', H, W), or None for the null condition.

        Returns:
            `denoise(x, sigma) -> x0_hat`.
        """
        return Conditioned(self.guide(denoiser, labels is not None, condition), labels)

    def guide(self, denoiser: Denoiser, labelled: bool, condition: Tensor | None = None) -> Any:
        """A denoiser under the guidance and the threshold of these settings, its labels not yet bound; see `guided`."""
        return self.clip(self.guided(denoiser, labelled, condition))

    def guided(self, denoiser: Denoiser, labelled: bool, condition: Tensor | None = None) -> Any:
        """A denoiser under the guidance of these settings alone.

        Args:
            denoiser: The model.
            labelled: Whether it will be called with labels.
            condition: Condition images (B, C', H, W), by which it is guided then; None for the null condition. Without
                labels and images there is no guidance.

        Returns:
            `denoiser(x, sigma, label) -> x0_hat`.

        Raises:
            ValueError: If a worse model is to guide and was not loaded.
        """
        guidance = (self.cfg_scale, self.guidance_interval, self.guidance_rescale)
        guide = self.guide_of(denoiser)
        if condition is not None:
            if guide is not None:
                raise ValueError(
                    f"guide_ckpt is {self.guide_ckpt}, but a model that is given an image is guided by the image alone "
                    "(cfg_scale); leave it out."
                )
            return GivenImage(denoiser, condition, *guidance)
        model = denoiser if guide is None else Autoguidance(denoiser, guide, self.guide_scale, self.guidance_interval)
        return ClassifierFreeGuidance(model, *guidance) if labelled else model

    def clip(self, denoiser: Any) -> Any:
        """A denoiser under the threshold of these settings, where they have one.

        Args:
            denoiser: Any denoiser.

        Returns:
            A denoiser.
        """
        return denoiser if self.clip_x0 == "none" else ClipX0(denoiser, self.clip_x0 == "dynamic", **self.clip_options)

    def guide_of(self, denoiser: Any) -> Guide | None:
        """The worse model that guides, which was put beside the denoiser.

        Args:
            denoiser: The model.

        Returns:
            The guide, or None where these settings have none.

        Raises:
            ValueError: If it was not put there, or another was.
        """
        if not self.autoguided:
            return None
        guide: Guide | None = getattr(denoiser, "guide", None)
        if guide is None or guide.file != self.guide_ckpt:
            raise ValueError(
                f"Sampling is to be guided by {self.guide_ckpt}, which is not loaded: give --guide_ckpt "
                f"{self.guide_ckpt}, or in Python take_guide(model, {self.guide_ckpt!r}) of "
                "diffusion_lit.modules.guides; with --guide_scale 1 the model draws alone."
            )
        return guide

    @torch.no_grad()
    def generate(
        self,
        denoiser: Denoiser,
        shape: Sequence[int],
        seeds: Sequence[int],
        labels: Tensor | None = None,
        callback: StepCallback | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Draws one image per seed.

        Args:
            denoiser: The model, in eval mode, on the device that shall do the work.
            shape: Shape (C, H, W) of one image.
            seeds: One seed per image; image i is a function of `seeds[i]`, `labels[i]` and these settings alone.
            labels: Class indices of shape (B,), or None for unconditional sampling.
            callback: Called as `callback(step, x, x0_hat, sigma)` at each step.
            condition: Condition images (B, C', H, W) for models that are given one, or None for the null condition.

        Returns:
            Images x0 of shape (B, C, H, W), in [-1, 1] up to the model's own overshoot.

        Raises:
            ValueError: If a label is outside the model's classes, or the model has none.
        """
        device = next(denoiser.parameters()).device
        labels = check_labels(labels, denoiser.num_classes, len(seeds))
        noise = SeededNoise(seeds)
        x = self.start(denoiser.scaling, noise(torch.empty(len(seeds), *shape, device=device)))
        denoise = self.wrap(denoiser, labels, condition)
        return self.finish(denoiser.scaling, self.run(denoise, x, noise=noise, callback=callback))

    def start(self, scaling: Preconditioning, noise: Tensor) -> Tensor:
        """The state that sampling starts from.

        Args:
            scaling: The model's prediction type.
            noise: Standard normal noise (B, C, H, W).

        Returns:
            sigma_max * noise, or sqrt(1 + sigma_max^2) * noise on a variance-preserving path.
        """
        sigma_max = self.sigmas(scaling)[0]
        return noise * (sigma_max.square().add(1).sqrt() if scaling.variance_preserving else sigma_max).float()

    def finish(self, scaling: Preconditioning, x: Tensor) -> Tensor:
        """The image in the state that sampling ends with.

        Args:
            scaling: The model's prediction type.
            x: The state at the grid's last level, shape (B, C, H, W).

        Returns:
            x itself; where the grid ends above 0 on a variance-preserving path, x / sqrt(1 + sigma^2), as it is there.
        """
        sigma = float(self.sigmas(scaling)[-1])
        return x / (1 + sigma**2) ** 0.5 if scaling.variance_preserving and sigma > 0 else x

    def run(
        self,
        denoise: DenoiserWrapper,
        x: Tensor,
        sigmas: Tensor | None = None,
        *,
        noise: Noise,
        callback: StepCallback | None = None,
    ) -> Tensor:
        """Takes a state along the grid of these settings, or along other levels as if they were a part of it.

        Options that count steps keep their meaning per step: churn is divided over the whole grid, and noise ends at
        the same level as on the whole grid.

        Args:
            denoise: `denoise(x, sigma) -> x0_hat` with the attribute `scaling`.
            x: The state at `sigmas[0]`, shape (B, C, H, W).
            sigmas: Levels (M+1,), falling, or rising for a deterministic sampler; the whole grid by default.
            noise: Draws standard normal noise like its argument.
            callback: Called as `callback(step, x, x0_hat, sigma)` at each step.

        Returns:
            The state at `sigmas[-1]`, shape (B, C, H, W).

        Raises:
            ValueError: If the levels or an option do not suit the sampler.
        """
        grid = self.sigmas(denoise.scaling)
        sigmas = grid if sigmas is None else sigmas
        options = self._options(denoise.scaling, grid, sigmas)
        return SAMPLERS[self.sampler].function(denoise, x, sigmas, noise=noise, callback=callback, **options)

    def _options(self, scaling: Preconditioning, grid: Tensor, sigmas: Tensor) -> dict[str, Any]:
        """The sampler's options for some levels; churn is limited so that it stays below the largest trained level."""
        options = dict(self.sampler_options)
        churn = options.get("S_churn", 0.0)
        if churn and scaling.sigma_max < float("inf"):
            gamma = min(churn / self.num_steps, 2**0.5 - 1)
            ceiling = scaling.sigma_max / (1 + gamma)
            options["S_tmax"] = min(options.get("S_tmax", float("inf")), ceiling)
        if churn:
            options["S_churn"] = churn * (len(sigmas) - 1) / (len(grid) - 1)
        if options.get("noise_until") is not None:
            options["noise_until"] = max(
                0, options["noise_until"] - int((grid > sigmas[0].to(grid) * (1 + SAME)).sum())
            )
        return options


def refuse_clipping(sampling: Sampling) -> None:
    """Refuses a threshold on what is not an image.

    Args:
        sampling: The settings for a model of latents.

    Raises:
        ValueError: If they clip.
    """
    if sampling.clip_x0 != "none":
        raise ValueError(
            f"clip_x0 is {sampling.clip_x0!r}, which bounds pixels to [-1, 1], but latents have no bounds; use none."
        )


def check_follows_ode(sampling: Sampling, what: str) -> None:
    """Refuses a consistency model where the probability-flow ODE is needed.

    Args:
        sampling: The model's own settings.
        what: What is not possible, as the end of a sentence.

    Raises:
        ValueError: If the model's estimate is the end of a path, and so gives no slope.
    """
    sampler = SAMPLERS[sampling.sampler]
    if sampler.order == 0 and not sampler.takes_until:  # told no end, a MeanFlow is a flow
        raise ValueError(
            f"The model draws by {sampling.sampler}: it maps noise to an image at once and follows no ODE, so that "
            f"{what}; take the diffusion model that it was tuned from."
        )


def check_labels(labels: Tensor | None, num_classes: int, count: int) -> Tensor | None:
    """Refuses labels that the model cannot take.

    Args:
        labels: Class indices of shape (B,), or None.
        num_classes: Number of the model's classes, 0 for an unconditional model.
        count: Number of samples B.

    Returns:
        The labels as int64 on the CPU, where the denoiser looks at them at every call without waiting for a device, or
        None.

    Raises:
        ValueError: If there are labels and the model has no classes, a label is outside [0, num_classes), or their
            number is not `count`.
    """
    if labels is None:
        return None
    if num_classes == 0:
        raise ValueError("The model is unconditional and takes no labels; leave them out.")
    if labels.shape != (count,):
        raise ValueError(
            f"{counted(count, 'sample', 'needs', 'need')} {counted(count, 'label')}, but labels have shape "
            f"{tuple(labels.shape)}."
        )
    labels = labels.cpu()
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if outside.numel():
        raise ValueError(f"Label {int(outside[0])} is outside the model's classes 0 to {num_classes - 1}.")
    return labels.long()


def _check_steps(num_steps: int | None, levels: Sequence[float] | None) -> None:
    """Refuses more steps than there are explicit noise levels."""
    if isinstance(num_steps, int) and levels is not None and num_steps > len(levels):
        raise ValueError(
            f"num_steps is {num_steps}, but there are {len(levels)} levels, {list(levels)}; give a level for each "
            "step, or fewer steps."
        )


def _options_of(function: Callable[..., Tensor], *others: str) -> set[str]:
    """Names of the options of a sampler or a grid: its arguments by keyword alone, but for some."""
    parameters = inspect.signature(function).parameters.values()
    return {one.name for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY} - {*others}


def _check_options(what: str, options: dict[str, Any], known: set[str]) -> None:
    for option in options:
        if option not in known:
            allowed = f"it takes {', '.join(sorted(known))}" if known else "it takes none"
            raise ValueError(f"The {what} has no option {option!r}; {allowed}.")


def _one_of(what: str, name: str, table: Any) -> None:
    if name not in table:
        raise ValueError(f"There is no {what} {name!r}; choose one of {', '.join(table)}.")
