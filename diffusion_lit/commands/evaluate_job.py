"""What an evaluation works on: the data, and the samples of each setting with their classes."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from diffusion_lit.commands.evaluate_plan import Plan
from diffusion_lit.diffusion.generate import Sampling
from diffusion_lit.diffusion.models import PixelModel
from diffusion_lit.evaluation.generation import GenerationJob, class_frequencies, draw_labels
from diffusion_lit.evaluation.measure import Evaluation
from diffusion_lit.modules.given import as_given
from diffusion_lit.modules.labels import parse_labels
from diffusion_lit.modules.load import load_data
from diffusion_lit.modules.protocols import DataSet, Model, Settings, is_data_set

FORMAT = 1


def guide_of(module: Model, settings: Sequence[Settings]) -> dict[str, str] | None:
    """The file and the hash of the worse model that guides any of the settings, or None."""
    if not isinstance(module, PixelModel):
        return None
    guides = [one.guide_of(module.denoiser) for one in settings if isinstance(one, Sampling)]
    return next((guide.identity() for guide in guides if guide is not None), None)


def prepare_data(plan: Plan, module: Model, first: bool) -> DataSet:
    """The data that the checkpoint was trained on, or what the user gave instead, set up.

    Raises:
        ValueError: If its images have another shape than the model's, or it is no data to compare with.
    """
    if plan.data is None and plan.ckpt_path is None:
        raise ValueError(
            f"{plan.pretrained} brings no data along; say what to compare it with, such as --data datamodules.CIFAR10."
        )
    data = plan.data if plan.data is not None else load_data(str(plan.ckpt_path), root=plan.data_root)
    if not is_data_set(data):
        raise ValueError(f"{type(data).__name__} has no reference images; use one of datamodules.")
    if first:
        data.prepare_data()
    for stage in ("fit", "test"):
        data.setup(stage)
    if tuple(data.image_shape) != tuple(module.image_shape):
        raise ValueError(
            f"The data's images have shape {tuple(data.image_shape)} and the model's {tuple(module.image_shape)}; "
            "evaluate against data of the same size."
        )
    return data


def make_job(evaluation: Evaluation, setting: Settings, settings: int, single: bool) -> GenerationJob:
    """The samples of one setting.

    Args:
        evaluation: The evaluation.
        setting: How samples are drawn.
        settings: Number of settings.
        single: Whether the model was trained on one image.
    """
    plan: Plan = evaluation.plan
    module = evaluation.module
    labels, rule = choose_labels(evaluation)
    record = {
        "format": FORMAT,
        "checkpoint": plan.model_hash(module),
        "sampling": setting.record(),
        "guide": guide_of(module, [setting]),
        "labels": rule,
        **({} if (given := as_given(module)) is None else {"given": given.told()}),
        "image_shape": list(module.image_shape),
        "extractor": evaluation.extractor.identity(),
    }
    save_to = None
    if plan.save_samples is not None:
        name = f"{setting.sampler}_{setting.num_steps}_cfg{setting.cfg_scale:g}"
        save_to = Path(plan.save_samples) / (name if settings > 1 else "")
    keep = plan.memorization or single
    return GenerationJob(setting, plan.total, plan.seed, labels, record, plan.folder, plan.batch_size, keep, save_to)


def choose_labels(evaluation: Evaluation) -> tuple[Tensor | None, str]:
    """The class of every sample, and a description of how it was chosen.

    Returns:
        Classes int64 (total,) or None, and the rule.
    """
    plan: Plan = evaluation.plan
    module = evaluation.module
    given = "all" if plan.prompts else plan.labels
    labels = parse_labels(given, plan.num_samples, module.num_classes, module.class_names)
    if labels is not None:
        return labels.repeat(plan.num_blocks), f"as given, {given}, in each block of {plan.num_samples}"
    if module.prompts is not None:
        return None, "none: the null prompt"
    frequencies = class_frequencies(evaluation.data, module.num_classes)
    if frequencies is None:
        return None, "none: the model is unconditional"
    shares = ", ".join(f"{share:.6g}" for share in frequencies.tolist())
    seeds = range(plan.seed, plan.seed + plan.total)
    return draw_labels(seeds, frequencies), f"drawn by each sample's own generator from training frequencies {shares}"
