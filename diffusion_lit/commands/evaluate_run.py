"""One evaluation from end to end, on every rank: load, draw shards, wait; rank 0 measures and writes the report."""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from lightning.pytorch import LightningDataModule
from torch import Tensor
from tqdm import tqdm

import diffusion_lit.pretrained  # noqa: F401 (reads autoencoders of other libraries)
from diffusion_lit.commands.evaluate_plan import Plan
from diffusion_lit.diffusion.generate import Sampling
from diffusion_lit.diffusion.models import PixelModel
from diffusion_lit.evaluation.bits_per_dim import gather_bits, likelihood_shards
from diffusion_lit.evaluation.choose import make_extractor
from diffusion_lit.evaluation.features import FeatureExtractor
from diffusion_lit.evaluation.generation import (
    GenerationJob,
    class_frequencies,
    draw_labels,
    gather_shards,
    generate_shards,
)
from diffusion_lit.evaluation.measure import ReportedReference, measure, read_references
from diffusion_lit.evaluation.reconstruction import add_reconstructions, reconstructs
from diffusion_lit.evaluation.single_image import is_single
from diffusion_lit.modules.given import as_given
from diffusion_lit.modules.labels import parse_labels
from diffusion_lit.modules.load import load_data
from diffusion_lit.modules.protocols import DataSet, Model, Settings, is_data_set
from diffusion_lit.report.memorization import pairs_image
from diffusion_lit.report.receipt import write_report
from diffusion_lit.report.receipt_page import attributed, setting_name
from diffusion_lit.report.reconstructions import differences_image
from diffusion_lit.runtime.hardware import hardware
from diffusion_lit.runtime.lock import Busy, Lock
from diffusion_lit.runtime.precision import float32_arithmetic
from diffusion_lit.runtime.ranks import meet, rank_zero_alone, rank_zero_first
from diffusion_lit.runtime.versions import versions
from diffusion_lit.storage.checkpoints import read_checkpoint
from diffusion_lit.storage.room import try_folder
from diffusion_lit.words import counted

FORMAT = 1


def guide_of(module: Model, settings: Sequence[Settings]) -> dict[str, str] | None:
    """The file and the hash of the worse model that guides any of the settings, or None."""
    if not isinstance(module, PixelModel):
        return None
    guides = [one.guide_of(module.denoiser) for one in settings if isinstance(one, Sampling)]
    return next((guide.identity() for guide in guides if guide is not None), None)


def run(fabric: Fabric, plan: Plan) -> list[str]:
    """Evaluates; called on every rank.

    Args:
        fabric: Devices and ranks.
        plan: The options.

    Returns:
        The files written, on rank 0; nothing elsewhere.

    Raises:
        ValueError: If the checkpoint, data, extractor and options do not fit together, or weights are missing.
    """
    with ExitStack() as stack:

        def take_place() -> None:
            for folder in (plan.path.parent, *([] if plan.save_samples is None else [Path(plan.save_samples)])):
                try_folder(folder)
            try:
                stack.enter_context(Lock(plan.folder / "lock"))
            except Busy as holder:
                refusal = (
                    f"An evaluation ({holder}) is writing to {plan.out}; wait until it is done, or give another --out."
                )
                raise ValueError(refusal) from None

        rank_zero_alone(take_place, "the place of the report")
        return evaluate(fabric, plan)


def evaluate(fabric: Fabric, plan: Plan) -> list[str]:
    """Evaluates while the report's lock is held; see `run`."""
    started = datetime.now(UTC)
    module = plan.load_model()
    for name in ("per_class", "likelihood"):
        if getattr(plan, name) and module.prompts is not None:
            raise ValueError(f"--{name} needs classes or none, but {plan.pretrained} is a text model; leave it out.")
    settings = plan.settings(module.sampling)
    plan.check_guidance(module, settings)
    reconstructs(plan, module)  # or refuses

    def prepare() -> tuple[DataSet, FeatureExtractor]:
        data = prepare_data(plan, module, fabric.is_global_zero)
        extractor = make_extractor(plan.extractor, plan.extractor_weights, module.image_shape)
        extractor.load(data)
        return data, extractor

    data, extractor = rank_zero_first(prepare, "data and extractor")
    given = as_given(module)
    if given is not None:
        if plan.likelihood:
            raise ValueError(
                "--likelihood is that of images alone, but the model is given an image of each; leave it out."
            )
        given.give(data, "test")
    module.to(fabric.device)
    extractor.to(fabric.device)

    single = is_single(data.reference_images("train"))
    jobs = [make_job(plan, module, data, extractor, setting, len(settings), single) for setting in settings]
    references: dict[str, ReportedReference] = {}
    if fabric.is_global_zero and not single:
        references = read_references(plan, data, extractor, module.image_shape)
    share = sum(len(rows) for job in jobs for rows in job.shards()[fabric.global_rank :: fabric.world_size])
    with tqdm(total=share, desc="sampling", unit="img", disable=not fabric.is_global_zero) as bar:
        for job in jobs:
            generate_shards(job, module, extractor, fabric.global_rank, fabric.world_size, bar.update)
    if plan.likelihood:
        likelihood_shards(plan, module, data, fabric.global_rank, fabric.world_size)
    meet("the samples of other ranks")
    if not fabric.is_global_zero:
        return []

    report = header(plan, module, data, extractor, references)
    seconds = 0.0
    said: dict[str, list[str]] = {}
    for job in jobs:
        samples = gather_shards(job)
        seconds += samples.seconds
        result, warnings, images = measure(plan, job, samples, module, data, extractor, references, fabric.device)
        report["results"].append(result)
        said[setting_name(result)] = warnings
        for name, triples in images.items():
            plan.path.parent.mkdir(parents=True, exist_ok=True)
            pairs_image(triples).save(plan.path.with_name(name))
    report["warnings"] += attributed(said)
    if plan.likelihood:
        report["likelihood"] = gather_bits(plan, module, data)
    if references and reconstructs(plan, module):
        panel = add_reconstructions(report, plan, module, data, extractor, references)
        if panel is not None:
            differences_image(panel).save(plan.path.with_name(report["reconstruction"]["images"]))
    report["run"] = {
        "started": started.isoformat(timespec="seconds"),
        "seconds": round((datetime.now(UTC) - started).total_seconds(), 1),
        "sampling_seconds": round(seconds, 1),
        "batch_size": plan.batch_size,
        **hardware(fabric.device, fabric.world_size),
    }
    written = [str(path) for path in write_report(report, plan.path)]
    if not plan.keep_shards:
        shutil.rmtree(plan.folder, ignore_errors=True)
    return written


def prepare_data(plan: Plan, module: Model, first: bool) -> DataSet:
    """The data that the checkpoint was trained on, or what the user gave instead, set up.

    Args:
        plan: The options.
        module: The model.
        first: Whether this process downloads.

    Returns:
        The data module.

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


def make_job(
    plan: Plan,
    module: Model,
    data: DataSet,
    extractor: FeatureExtractor,
    setting: Settings,
    settings: int,
    single: bool,
) -> GenerationJob:
    """The samples of one setting.

    Args:
        plan: The options.
        module: The model.
        data: The data.
        extractor: The loaded extractor.
        setting: How samples are drawn.
        settings: Number of settings.
        single: Whether the model was trained on one image.

    Returns:
        The job.
    """
    labels, rule = choose_labels(plan, module, data)
    record = {
        "format": FORMAT,
        "checkpoint": plan.model_hash(module),
        "sampling": setting.record(),
        "guide": guide_of(module, [setting]),
        "labels": rule,
        **({} if (given := as_given(module)) is None else {"given": given.told()}),
        "image_shape": list(module.image_shape),
        "extractor": extractor.identity(),
    }
    save_to = None
    if plan.save_samples is not None:
        name = f"{setting.sampler}_{setting.num_steps}_cfg{setting.cfg_scale:g}"
        save_to = Path(plan.save_samples) / (name if settings > 1 else "")
    keep = plan.memorization or single
    return GenerationJob(setting, plan.total, plan.seed, labels, record, plan.folder, plan.batch_size, keep, save_to)


def choose_labels(plan: Plan, module: Model, data: DataSet) -> tuple[Tensor | None, str]:
    """The class of every sample, and a description of how it was chosen.

    Args:
        plan: The options.
        module: The model.
        data: The data.

    Returns:
        Classes int64 (total,) or None, and the rule.
    """
    given = "all" if plan.prompts else plan.labels
    labels = parse_labels(given, plan.num_samples, module.num_classes, module.class_names)
    if labels is not None:
        return labels.repeat(plan.num_blocks), f"as given, {given}, in each block of {plan.num_samples}"
    if module.prompts is not None:
        return None, "none: the null prompt"
    frequencies = class_frequencies(data, module.num_classes)
    if frequencies is None:
        return None, "none: the model is unconditional"
    shares = ", ".join(f"{share:.6g}" for share in frequencies.tolist())
    seeds = range(plan.seed, plan.seed + plan.total)
    return draw_labels(seeds, frequencies), f"drawn by each sample's own generator from training frequencies {shares}"


def header(
    plan: Plan, module: Model, data: DataSet, extractor: FeatureExtractor, references: dict[str, ReportedReference]
) -> dict[str, Any]:
    """The report without its results.

    Args:
        plan: The options.
        module: The model.
        data: The data.
        extractor: The loaded extractor.
        references: The references by name.

    Returns:
        Plain values: all that would change a figure.
    """
    checkpoint = {} if plan.ckpt_path is None else read_checkpoint(plan.ckpt_path)
    weights = "as trained: the checkpoint keeps no average" if checkpoint else "as published"
    if "current_model_state" in checkpoint:
        weights = "average (EMA)"
    elif "weights" in checkpoint:
        weights = f"{checkpoint['weights']}, as exported"
    warnings = attributed({f"reference {name}": reference.warnings for name, reference in references.items()})
    if plan.num_blocks < 3:
        warnings.append(f"{counted(plan.num_blocks, 'block')} of samples: their scatter needs at least 3.")
    arguments = dict(data.hparams) if isinstance(data, LightningDataModule) else {}
    parameters = {name: value for name, value in arguments.items() if not name.startswith("_")}
    return {
        "format": FORMAT,
        "checkpoint": {
            "file": str(plan.ckpt_path or plan.pretrained),
            "sha256": plan.model_hash(module),
            "module": f"{type(module).__module__}.{type(module).__name__}",
            "step": checkpoint.get("global_step"),
            "weights": weights,
            **({"init_from": begun} if (begun := module.init_from) else {}),
        },
        **({"guide": guide} if (guide := guide_of(module, plan.settings(module.sampling))) else {}),
        "data": {"class": f"{type(data).__module__}.{type(data).__name__}", **parameters},
        "extractor": {**extractor.identity(), "metric": extractor.metric},
        "samples": {
            "num_samples": plan.num_samples,
            "num_blocks": plan.num_blocks,
            "seeds": [plan.seed, plan.seed + plan.total - 1],
            "labels": choose_labels(plan, module, data)[1],
            **({} if (given := as_given(module)) is None else {"given": given.told()}),
            "precision": "float32 weights and sampling, uint8 images, float32 features, float64 statistics",
            "float32": float32_arithmetic(),
        },
        "versions": versions(),
        "references": {name: reference.summary for name, reference in references.items()},
        "results": [],
        "warnings": warnings,
    }
