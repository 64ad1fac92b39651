"""A diffusers scheduler's config as this project's schedule, prediction type and settings of sampling.

Such a config says three things at once: the noise levels that the network was trained on and what it predicts (which
belong to the model), and how it is to be sampled: threshold, variance, spacing of the steps (which are a default here).
Its steps are this project's: x_t there is x / sqrt(1 + sigma^2) here.
"""

import inspect
from pathlib import Path
from typing import Any

from diffusion_lit.diffusion.conversions import alpha_bar_to_betas
from diffusion_lit.diffusion.generate import Sampling
from diffusion_lit.diffusion.preconditioning import (
    EpsPreconditioning,
    Preconditioning,
    VPreconditioning,
    X0Preconditioning,
)
from diffusion_lit.diffusion.schedules import Schedule
from diffusion_lit.pretrained.files import library, part_of, read_json

BETAS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"
)  # fmt: skip
SCALINGS: dict[str, type[EpsPreconditioning] | type[VPreconditioning] | type[X0Preconditioning]] = {
    "epsilon": EpsPreconditioning,
    "v_prediction": VPreconditioning,
    "sample": X0Preconditioning,
}
SAMPLER_OF = {
    "DDPMScheduler": "ddpm",
    "DDPMParallelScheduler": "ddpm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "DPMSolverSinglestepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
}  # ddim for every other: DDIM, and multistep methods that have no counterpart here
VARIANCE_OF = {
    "fixed_small": "posterior",
    "fixed_small_log": "posterior",
    "fixed_large": "beta",
    "fixed_large_log": "beta",
    "learned_range": "learned",
}
LEAST_ALPHA_BAR = 1e-10  # in place of 0, where sigma would be infinite; sigma is then 1e5


def read_scheduler(model: Path, part: str = "scheduler") -> dict[str, Any]:
    """A scheduler's config with its class's defaults filled in.

    Args:
        model: The model's folder.
        part: Name of the scheduler in it.

    Returns:
        The config; `_class_name` is its class.

    Raises:
        ValueError: If there is none, or it is of another kind of diffusion than the variance-preserving one.
    """
    diffusers = library("diffusers")
    try:
        folder = part_of(model, part, "scheduler_config.json")
    except ValueError as error:
        raise ValueError(
            f"{model} holds no {part}/scheduler_config.json, which says what noise levels the network was trained on; "
            f"save its {part} beside it."
        ) from error
    given = read_json(folder / "scheduler_config.json")
    name = str(given.get("_class_name", "a scheduler without a name"))
    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    known = inspect.signature(kind.__init__).parameters if inspect.isclass(kind) else {}
    config = {key: parameter.default for key, parameter in known.items() if parameter.default is not parameter.empty}
    config |= given
    if "beta_schedule" not in known:
        raise ValueError(
            f"{folder} has {name}; models trained on betas are what can be read here, with DDPMScheduler, "
            "DDIMScheduler and their like."
        )
    prediction, variance = config.get("prediction_type", "epsilon"), config.get("variance_type") or "fixed_small"
    if prediction not in SCALINGS:
        raise ValueError(f"{folder} has prediction_type {prediction!r}; what can be read is {', '.join(SCALINGS)}.")
    if variance not in VARIANCE_OF and name.startswith("DDPM"):
        raise ValueError(f"{folder} has variance_type {variance!r}; what can be read is {', '.join(VARIANCE_OF)}.")
    return {**config, "prediction_type": prediction, "variance_type": variance}


def make_schedule(config: dict[str, Any]) -> Schedule:
    """The noise levels that a network was trained on.

    Args:
        config: From `read_scheduler`.

    Returns:
        The schedule, from the float32 alpha_bar that the scheduler itself computes with.

    Raises:
        ValueError: If the config makes no schedule, or ends without signal although the network predicts the noise.
    """
    arguments = {key: config[key] for key in BETAS if config.get(key) is not None}
    try:
        alpha_bar = library("diffusers").DDPMScheduler(**arguments).alphas_cumprod.double()
    except (NotImplementedError, TypeError, RuntimeError) as error:
        raise ValueError(f"The scheduler's config makes no schedule: {error}.") from error
    if float(alpha_bar[-1]) < LEAST_ALPHA_BAR and config["prediction_type"] == "epsilon":
        raise ValueError(
            "The scheduler's last step is pure noise (rescale_betas_zero_snr), from which a network that predicts the "
            "noise cannot start; such a model has prediction_type v_prediction or sample."
        )
    return Schedule(alpha_bar_to_betas(alpha_bar.clamp(min=LEAST_ALPHA_BAR)))


def make_scaling(config: dict[str, Any]) -> Preconditioning:
    """The prediction type of a network on its schedule.

    Args:
        config: From `read_scheduler`.

    Returns:
        Eps, v or x0 scaling.
    """
    return SCALINGS[config["prediction_type"]](make_schedule(config))


def learns_variance(config: dict[str, Any]) -> bool:
    """Whether the network's further channels are the variance of a step."""
    return str(VARIANCE_OF.get(config["variance_type"])) == "learned"


def make_sampling(config: dict[str, Any], num_steps: int, cfg_scale: float = 1.0) -> Sampling:
    """How the model's own pipeline samples, as far as this project has its sampler.

    Args:
        config: From `read_scheduler`.
        num_steps: The pipeline's number of steps; at most those of the schedule.
        cfg_scale: The pipeline's guidance.

    Returns:
        Sampler, grid and threshold as the scheduler has them.
    """
    name = config["_class_name"]
    sampler = SAMPLER_OF.get(name, "ddim")
    if sampler == "dpmpp_2m" and str(config.get("algorithm_type")).startswith("sde"):
        sampler = "dpmpp_2m_sde"
    grid, grid_options = _grid(config)
    if sampler == "ddim" and grid not in ("karras", "exponential") and not config.get("set_alpha_to_one", True):
        grid_options["to_zero"] = False
    clip, clip_options = _threshold(config)
    options: dict[str, Any] = {}
    if sampler == "ddpm":
        options["variance"] = VARIANCE_OF[config["variance_type"]]
    elif sampler == "ddim" and clip != "none":
        options["use_clipped_model_output"] = False
    return Sampling(
        sampler=sampler,
        num_steps=min(num_steps, int(config["num_train_timesteps"])),
        grid=grid,
        cfg_scale=cfg_scale,
        clip_x0=clip,
        sampler_options=options,
        grid_options=grid_options,
        clip_options=clip_options,
    )


def _grid(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The scheduler's spacing of steps, and its options."""
    if config.get("use_karras_sigmas"):
        return "karras", {}
    if config.get("use_exponential_sigmas"):
        return "exponential", {}
    spacing = str(config.get("timestep_spacing", "leading"))
    offset = int(config.get("steps_offset") or 0) if spacing == "leading" else 0
    return spacing, {"steps_offset": offset} if offset else {}


def _threshold(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The scheduler's threshold on x0_hat, and its options."""
    if config.get("thresholding"):
        ratio, ceiling = config.get("dynamic_thresholding_ratio", 0.995), config.get("sample_max_value", 1.0)
        return "dynamic", {"percentile": float(ratio), "ceiling": float(ceiling)}
    if config.get("clip_sample"):
        limit = float(config.get("clip_sample_range", 1.0))
        return "static", {} if limit == 1 else {"limit": limit}
    return "none", {}
