"""Guidance: what a stronger pull towards the class buys, and what it costs.

The same seeds and classes are drawn with classifier-free guidance of several scales (Ho & Salimans 2022, arXiv
2207.12598), with a scale per class, within an interval of noise levels only (Kynkäänniemi 2024, arXiv 2404.07724), and
guided by a worse model (autoguidance, Karras 2024, arXiv 2406.02507: a smaller network, trained for less long). The
scale of a class is, of those that were tried, the one with the lowest kernel distance of that class; it was chosen on
the seeds that the plain scales are measured on, so that the scale per class is measured on others.

Accuracy is the share of samples that a classifier of the training images reads as their class. Saturation is the mean
of |x| over that of the training images, and the share of values that were clipped from beyond 1.1.

    python -m experiments.guidance_scale
    python -m experiments.guidance_scale --config configs/edm_fashion_mnist.yaml --data.init_args.root FOLDER
    python -m experiments.guidance_scale --ckpt_path runs/edm_cifar10/version_0/checkpoints/last.ckpt
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from diffusion_lit.diffusion import ClassifierFreeGuidance, Sampling
from diffusion_lit.diffusion.images import from_uint8
from diffusion_lit.evaluation import ClassifierFeatures
from diffusion_lit.evaluation.generation import GenerationJob, Samples, draw_samples
from diffusion_lit.evaluation.metrics import kernel_distance
from diffusion_lit.modules.guides import take_guide
from diffusion_lit.modules.load import load_module
from diffusion_lit.report.images import grid_image
from diffusion_lit.storage.hashing import file_hash
from experiments.harness.evaluator import Evaluator, spread_images
from experiments.harness.study import QUIET, Study, main

COLUMNS = 4  # images of a class in a grid


@dataclass(frozen=True)
class Way:
    """One way of guiding.

    Args:
        name: What it is called.
        sampling: How samples are drawn.
        denoiser: The guided denoiser; none where `sampling` guides.
        record: What determines the denoiser, as plain values.
        scale: Its scale, for the plot of plain ones.
        later: Whether other seeds are drawn than those that the way was chosen on.
    """

    name: str
    sampling: Sampling
    denoiser: nn.Module | None = None
    record: dict[str, Any] | None = None
    scale: float | None = None
    later: bool = False


@dataclass(frozen=True)
class Guided:
    """A module that draws from a guided denoiser in its own's place."""

    module: Any
    denoiser: nn.Module

    @property
    def net(self) -> nn.Module:
        """The network whose forwards are counted."""
        return self.module.net  # type: ignore[no-any-return]

    def generate(self, seeds: Sequence[int], labels: Tensor | None, sampling: Sampling) -> Tensor:
        """Draws one image per seed, (B, C, H, W)."""
        x = sampling.generate(self.denoiser, self.module.x_shape, seeds, labels)  # type: ignore[arg-type]
        return self.module.decode(x)  # type: ignore[no-any-return]


def guidance_scale(
    study: Study,
    scales: list[float] = [1.0, 2.5, 5.0, 7.0],  # noqa: B006 (never changed)
    interval: tuple[float, float] = (0.2, 3.0),
    interval_scale: float = 5.0,
    autoguidance: float = 2.0,
    num_steps: int | None = None,
    ckpt_path: str | None = None,
    guide_path: str | None = None,
) -> None:
    """How strong should guidance be?

    Draws the same seeds with scales of classifier-free guidance, a scale per class, guidance within an interval of
    noise levels, and guidance by a worse model.

    Args:
        study: Where it works.
        scales: Scales of classifier-free guidance; 1 is the plain conditional model.
        interval: Noise levels (low, high] within which guidance of `interval_scale` acts.
        interval_scale: That scale.
        autoguidance: Scale of autoguidance.
        num_steps: Sampling steps; those of the model by default.
        ckpt_path: A trained class-conditional model; by default one is trained.
        guide_path: A worse one of the same data; by default one of half the width (of the same, where the
            network has no `model_channels`) is trained for a quarter of the steps.
    """
    model, guide = checkpoints(study, ckpt_path, guide_path)
    module: Any = load_module(model).to(study.device)
    if module.num_classes == 0:
        raise ValueError(f"{model} is unconditional, and guidance needs classes; leave use_labels true.")
    evaluator = study.evaluator(model)
    reader = evaluator.extractor
    if not isinstance(reader, ClassifierFeatures):
        reader = ClassifierFeatures()
        reader.load(evaluator.data)
    labels = torch.arange(study.setup.num_samples) % module.num_classes
    plain = module.sampling.replace(cfg_scale=1.0, num_steps=num_steps)
    real = float(from_uint8(spread_images(evaluator.data)).abs().mean())

    ways = [Way(f"scale {scale:g}", plain.replace(cfg_scale=scale), scale=scale) for scale in scales]
    ways.append(
        Way(
            f"scale {interval_scale:g} for {interval[0]:g} < sigma <= {interval[1]:g}",
            plain.replace(cfg_scale=interval_scale, guidance_interval=interval),
        )
    )
    worse = take_guide(module, str(guide))
    setting = plain.replace(guide_ckpt=str(guide), guide_scale=autoguidance)
    ways.append(Way(f"autoguidance {autoguidance:g}", setting, record={"guide": worse.sha256}))
    drawn = {way.name: draw(study, evaluator, model, module, way, labels) for way in ways}

    best = best_scales(evaluator, {way.scale: drawn[way.name] for way in ways if way.scale is not None}, labels)
    ways.append(
        Way(
            "scale per class",
            plain,
            ClassifierFreeGuidance(module.denoiser, torch.tensor(best), per_class=True),
            {"per_class": best},
            later=True,
        )
    )
    drawn[ways[-1].name] = draw(study, evaluator, model, module, ways[-1], labels)

    rows: list[dict[str, Any]] = []
    for way in ways:
        samples = drawn[way.name]
        logits = reader.extract(samples.images, 250).logits
        assert logits is not None
        rows.append(
            {
                "guidance": way.name,
                **evaluator.measure(samples),
                "accuracy": float((logits.argmax(1) == labels).double().mean()),
                "mean |x|, real = 1": float(from_uint8(samples.images).abs().mean()) / real,
                "clipped": samples.clipped,
                "forwards": samples.forwards,
            }
        )
    count = study.setup.num_samples
    study.table("quality", rows, f"{count:,} samples, every class equally often, against the training images.")
    chosen = dict(zip(module.class_names, best, strict=True))
    study.table(
        "per_class", [{"class": name, "scale": scale} for name, scale in chosen.items()], "Scale of each class."
    )
    lines = [row for row, way in zip(rows, ways, strict=True) if way.scale is not None]
    points = [row for row, way in zip(rows, ways, strict=True) if way.scale is None]
    figure = draw_figures(scales, lines, points, evaluator)
    study.figure("quality", figure, "Quality, variety, accuracy and saturation against the scale of guidance.")
    images = {name: some.images for name, some in drawn.items()}
    study.figure("classes", draw_grids(images, module.class_names), "Every class under each guidance; the same seeds.")

    winner = min(rows, key=lambda row: row[evaluator.metric])
    weak, strong = lines[0], lines[-1]
    study.finding(
        f"Lowest {evaluator.metric} {winner[evaluator.metric]:.3g} with {winner['guidance']}; from {weak['guidance']} "
        f"to {strong['guidance']} it goes from {weak[evaluator.metric]:.3g} to {strong[evaluator.metric]:.3g}, "
        f"precision from {weak['precision']:.0%} to {strong['precision']:.0%}, recall from {weak['recall']:.0%} to "
        f"{strong['recall']:.0%}, accuracy from {weak['accuracy']:.0%} to {strong['accuracy']:.0%} and the share of "
        f"clipped values from {weak['clipped']:.0%} to {strong['clipped']:.0%}."
    )


def checkpoints(study: Study, ckpt_path: str | None, guide_path: str | None) -> tuple[Path, Path]:
    """The model and the worse one that guides it, trained where they are not given.

    Args:
        study: Where it works.
        ckpt_path: The model, or None.
        guide_path: The guide, or None.
    """
    variants: dict[str, dict[str, Any]] = {} if ckpt_path else {"model": {}}
    if guide_path is None:
        width = study.value("model.init_args.net.init_args.model_channels")
        smaller = {} if width is None else {"model.init_args.net.init_args.model_channels": max(1, int(width) // 2)}
        variants["guide"] = {"trainer.max_steps": max(1, int(study.value("trainer.max_steps")) // 4), **smaller}
    trained = study.fit(variants) if variants else {}
    model = Path(ckpt_path) if ckpt_path else trained["model"].ckpt_path
    return model, Path(guide_path) if guide_path else trained["guide"].ckpt_path


def draw(study: Study, evaluator: Evaluator, path: Path, module: Any, way: Way, labels: Tensor) -> Samples:
    """Draws samples; existing ones are reused."""
    setup = study.setup
    record = {
        "checkpoint": file_hash(path),
        "sampling": way.sampling.record(),
        "guidance": way.record,
        "classes": module.num_classes,
        "extractor": evaluator.extractor.identity(),
    }
    seed = setup.seed + (len(labels) if way.later else 0)
    folder = study.folder / "samples"
    job = GenerationJob(way.sampling, len(labels), seed, labels, record, folder, setup.batch_size, True)
    study.tell(way.name)
    model: Any = module if way.denoiser is None else Guided(module, way.denoiser)
    return draw_samples(job, model, evaluator.extractor)


def best_scales(evaluator: Evaluator, drawn: dict[float, Samples], labels: Tensor) -> list[float]:
    """The scale of each class whose samples are nearest to the class's training images, by kernel distance.

    Raises:
        ValueError: If the training images have no classes.
    """
    features, classes = evaluator.reference.features, evaluator.reference.labels
    if features is None or classes is None:
        raise ValueError("The training images have no classes to guide by; leave use_labels true.")
    best = []
    for label in range(int(labels.max()) + 1):
        real = features.features[classes == label]
        distances = {
            scale: kernel_distance(samples.features.features[labels == label], real) for scale, samples in drawn.items()
        }
        best.append(min(distances, key=lambda scale: distances[scale]))
    return best


def draw_figures(
    scales: list[float], lines: list[dict[str, Any]], points: list[dict[str, Any]], evaluator: Evaluator
) -> plt.Figure:
    """What is measured against the scale; other ways of guiding as horizontal lines."""
    figure, panels = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    columns = [evaluator.metric, "precision", "recall", "accuracy", "mean |x|, real = 1", "clipped"]
    for axes, column in zip(panels.flat, columns, strict=True):
        axes.plot(scales, [row[column] for row in lines], marker="o", color="black", label="classifier-free guidance")
        for index, row in enumerate(points):
            axes.axhline(row[column], color=f"C{index}", linestyle=("--", "-.", ":")[index % 3], label=row["guidance"])
        axes.set(
            xlabel="cfg_scale (1: no guidance)", ylabel="share of values beyond 1.1" if column == "clipped" else column
        )
        axes.grid(True, alpha=0.3)
    evaluator.draw_floor(panels[0, 0])
    panels[0, 0].set_ylim(bottom=0)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=9)
    return figure


def draw_grids(images: dict[str, Tensor], names: list[str]) -> plt.Figure:
    """A grid per guidance, a row per class.

    Args:
        images: uint8 (N, C, H, W) by guidance, of classes 0, 1, 2, ... in turn.
        names: Names of the classes, of which the first ten are shown.
    """
    rows = min(10, len(names))
    columns = min(COLUMNS, min(len(some) for some in images.values()) // len(names))
    figure, panels = plt.subplots(
        1, len(images), figsize=(2.0 * len(images), 0.4 + 2.0 * rows / COLUMNS), layout="constrained", squeeze=False
    )
    shown = torch.arange(rows)[:, None] + len(names) * torch.arange(columns)
    for axes, (name, some) in zip(panels[0], images.items(), strict=True):
        grid = grid_image(from_uint8(some[shown.flatten()]), columns)
        axes.imshow(grid, cmap="gray", interpolation="nearest")
        axes.set_title(name.replace(" for ", "\nfor "), fontsize=8)
        axes.set(xticks=[], yticks=[])
        if axes is panels[0, 0]:
            axes.set_yticks([(row + 0.5) * grid.height / rows for row in range(rows)], names[:rows])
            axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return figure


if __name__ == "__main__":
    SMALL = {**QUIET, "trainer.max_steps": 400, "model.init_args.sampling.num_steps": 9}
    main(guidance_scale, "configs/edm_digits.yaml", SMALL, num_samples=300)
