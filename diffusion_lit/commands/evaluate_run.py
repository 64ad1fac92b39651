"""One evaluation from end to end, on every rank: load, draw shards, wait; rank 0 measures and writes the report."""

import shutil
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from lightning.pytorch import LightningDataModule
from tqdm import tqdm

import diffusion_lit.pretrained  # noqa: F401 (reads autoencoders of other libraries)
from diffusion_lit.commands.evaluate_job import FORMAT, choose_labels, guide_of, make_job, prepare_data
from diffusion_lit.commands.evaluate_plan import Plan
from diffusion_lit.evaluation.bits_per_dim import check_likelihood, check_test_images, gather_bits, likelihood_shards
from diffusion_lit.evaluation.choose import make_extractor
from diffusion_lit.evaluation.features import FeatureExtractor
from diffusion_lit.evaluation.generation import GenerationJob, gather_shards, generate_shards
from diffusion_lit.evaluation.measure import Evaluation, ReportedReference
from diffusion_lit.evaluation.memorization import held_out_split
from diffusion_lit.evaluation.reconstruction import add_reconstructions, reconstructs
from diffusion_lit.evaluation.single_image import is_single
from diffusion_lit.modules.given import as_given
from diffusion_lit.modules.protocols import DataSet, Model, Settings
from diffusion_lit.report.memorization import pairs_image
from diffusion_lit.report.receipt import write_report
from diffusion_lit.report.receipt_page import attributed
from diffusion_lit.report.receipt_tables import setting_name
from diffusion_lit.report.reconstructions import differences_image
from diffusion_lit.runtime.hardware import hardware
from diffusion_lit.runtime.lock import Busy, Lock
from diffusion_lit.runtime.precision import float32_arithmetic
from diffusion_lit.runtime.ranks import meet, rank_zero_alone, rank_zero_first
from diffusion_lit.runtime.versions import versions
from diffusion_lit.storage.checkpoints import read_checkpoint
from diffusion_lit.storage.room import try_folder
from diffusion_lit.words import counted


def run(fabric: Fabric, plan: Plan) -> list[str]:
    """Evaluates; called on every rank.

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
    settings = checked_settings(plan, module)

    def prepare() -> tuple[DataSet, FeatureExtractor]:
        data = prepare_data(plan, module, fabric.is_global_zero)
        extractor = make_extractor(plan.extractor, plan.extractor_weights, module.image_shape)
        extractor.load(data)
        return data, extractor

    data, extractor = rank_zero_first(prepare, "data and extractor")
    if (given := as_given(module)) is not None:
        given.give(data, "test")
    module.to(fabric.device)
    evaluation = Evaluation(plan, module, data, extractor.to(fabric.device), fabric.device)
    single = is_single(data.reference_images("train"))
    if plan.memorization and not single:
        held_out_split(data)  # or refuses
    if plan.likelihood:
        check_test_images(data)
    jobs = [make_job(evaluation, setting, len(settings), single) for setting in settings]
    references = evaluation.references() if fabric.is_global_zero and not single else {}
    draw(fabric, evaluation, jobs)
    if not fabric.is_global_zero:
        return []
    report = header(evaluation, references)
    seconds = add_results(report, evaluation, jobs, references)
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


def checked_settings(plan: Plan, module: Model) -> list[Settings]:
    """The settings to measure, after all that can be refused without the data."""
    for name in ("per_class", "likelihood"):
        if getattr(plan, name) and module.prompts is not None:
            raise ValueError(f"--{name} needs classes or none, but {plan.pretrained} is a text model; leave it out.")
    settings = plan.settings(module.sampling)
    plan.check_guidance(module, settings)
    reconstructs(plan, module)  # or refuses
    if plan.likelihood:
        check_likelihood(module)
    return settings


def draw(fabric: Fabric, evaluation: Evaluation, jobs: list[GenerationJob]) -> None:
    """Makes this rank's shards of all samples and likelihoods, and waits for the other ranks."""
    module, extractor, (rank, world) = evaluation.module, evaluation.extractor, (fabric.global_rank, fabric.world_size)
    share = sum(len(rows) for job in jobs for rows in job.shards()[rank::world])
    with tqdm(total=share, desc="sampling", unit="img", disable=not fabric.is_global_zero) as bar:
        for job in jobs:
            generate_shards(job, module, extractor, rank, world, bar.update)
    if evaluation.plan.likelihood:
        likelihood_shards(evaluation, rank, world)
    meet("the samples of other ranks")


def add_results(
    report: dict[str, Any], evaluation: Evaluation, jobs: list[GenerationJob], references: dict[str, ReportedReference]
) -> float:
    """Puts the figures of all settings into a report, and draws its images; on rank 0.

    Returns:
        Seconds that sampling took, all ranks together.
    """
    plan: Plan = evaluation.plan
    seconds = 0.0
    said: dict[str, list[str]] = {}
    for job in jobs:
        samples = gather_shards(job)
        seconds += samples.seconds
        result, warnings, images = evaluation.measure(job, samples, references)
        report["results"].append(result)
        said[setting_name(result)] = warnings
        for name, triples in images.items():
            plan.path.parent.mkdir(parents=True, exist_ok=True)
            pairs_image(triples).save(plan.path.with_name(name))
    report["warnings"] += attributed(said)
    if plan.likelihood:
        report["likelihood"] = gather_bits(evaluation)
    if references and reconstructs(plan, evaluation.module):
        panel = add_reconstructions(report, evaluation, references)
        if panel is not None:
            differences_image(panel).save(plan.path.with_name(report["reconstruction"]["images"]))
    return seconds


def header(evaluation: Evaluation, references: dict[str, ReportedReference]) -> dict[str, Any]:
    """The report without its results.

    Returns:
        Plain values: all that would change a figure.
    """
    plan: Plan = evaluation.plan
    module, data, extractor = evaluation.module, evaluation.data, evaluation.extractor
    checkpoint = {} if plan.ckpt_path is None else read_checkpoint(plan.ckpt_path)
    weights = "as trained: the checkpoint keeps no average" if checkpoint else "as published"
    if "current_model_state" in checkpoint:
        weights = "average (EMA)"
    elif "weights" in checkpoint:
        weights = f"{checkpoint['weights']}, as exported"
    warnings = attributed({f"reference {name}": reference.warnings for name, reference in references.items()})
    warnings += [] if references else plan.idle_with_one_image()
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
            "labels": choose_labels(evaluation)[1],
            **({} if (given := as_given(module)) is None else {"given": given.told()}),
            "precision": "float32 weights and sampling, uint8 images, float32 features, float64 statistics",
            "float32": float32_arithmetic(),
        },
        "versions": versions(),
        "references": {name: reference.summary for name, reference in references.items()},
        "results": [],
        "warnings": warnings,
    }
