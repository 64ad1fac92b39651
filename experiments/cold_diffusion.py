r"""Cold diffusion (Bansal 2022, arXiv 2208.09392): blur, mask, pixelation and snow taken back without any noise.

One network per degradation learns to restore images. Test images are fully degraded and restored in one step
(direct), by restoring and degrading again (naive, algorithm 1) and by the difference of two degradations (improved,
algorithm 2). The Fréchet distance is that of the restored images to the very images that they came from; peak
signal-to-noise ratio and structural similarity tell how near each is to its own. From the Gaussian of degraded training
images new ones are drawn.

    python -m experiments.cold_diffusion
    python -m experiments.cold_diffusion --config configs/cold_fashion_mnist.yaml --data.init_args.root FOLDER \
        --degradations Blur,Mask,Pixelate:3,Snow
"""

from dataclasses import replace
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from diffusion_lit.diffusion.cold import RESTORERS, ColdSampling
from diffusion_lit.diffusion.images import from_uint8, psnr, to_uint8
from diffusion_lit.evaluation.metrics import Statistics, frechet_distance
from diffusion_lit.modules.load import load_module
from diffusion_lit.modules.quality import ssim
from diffusion_lit.storage.hashing import file_hash
from experiments.harness.evaluator import Evaluator, spread_images
from experiments.harness.runs import Trained
from experiments.harness.show import image_rows, lines
from experiments.harness.study import QUIET, Study, main

SHOWN = 12


def cold_diffusion(
    study: Study, degradations: str = "Blur,Mask,Pixelate:2,Snow", blurred_steps: str = "2,5,10"
) -> None:
    """Can an image be restored, and drawn, without noise?

    Trains a network per deterministic degradation, restores test images with it in three ways, and draws new ones.

    Args:
        study: Where it works.
        degradations: Classes of diffusion_lit.diffusion, separated by commas, with their number of steps behind a
            colon where it is not the default; the first is looked at over the number of steps too.
        blurred_steps: Numbers of steps of the first, beside 1 and all.
    """
    trained = study.fit(dict(variant(words.strip()) for words in degradations.split(",")))
    evaluator = study.evaluator(trained)
    originals = spread_images(evaluator.data, "test", study.setup.num_samples)
    count = len(originals)
    goal = Statistics.of(evaluator.extractor.extract(originals, 250).features)

    def measure(made: Tensor) -> dict[str, float]:
        restored, real = from_uint8(made), from_uint8(originals)
        distance = frechet_distance(Statistics.of(evaluator.extractor.extract(made, 250).features), goal)
        figures = {"psnr": float(psnr(restored, real).mean()), "ssim": float(ssim(restored, real))}
        return {evaluator.metric: distance, **figures}

    rows, drawn = [], []
    for name, run in trained.items():
        made = {"degraded": degraded(study, run, originals)}
        made |= {sampler: restored(study, run, originals, ColdSampling(sampler)) for sampler in reversed(RESTORERS)}
        shown = {"test image": originals[:SHOWN], **{way: some[:SHOWN] for way, some in made.items()}}
        for way, some in made.items():
            rows.append({"degradation": name, "restored": way, **measure(some)})
        samples = study.draw(run, evaluator)
        drawn.append({"degradation": name, "samples": len(samples.features), **evaluator.measure(samples)})
        shown["drawn anew"] = samples.images[:SHOWN]
        study.figure(
            name.lower(),
            image_rows(shown),
            f"{name}: test images, degraded altogether, restored in three ways; at the bottom images drawn anew.",
        )
    study.table("restored", rows, f"{count:,} test images against themselves, restored.")
    study.table("drawn", drawn, "Images drawn anew by the improved sampler, against the training images.")
    study.figure("restored", draw_bars(rows, evaluator), "Distance of restored test images from the images themselves.")

    first, run = next(iter(trained.items()))
    model: Any = load_module(run.ckpt_path)
    total = int(model.degradation.num_steps)
    counts = sorted({1, total, *(int(word) for word in blurred_steps.split(",") if int(word) < total)})
    ways = [ColdSampling(sampler, steps) for sampler in ("naive", "improved") for steps in counts]
    over = [
        {"restored": way.sampler, "steps": way.num_steps, **measure(restored(study, run, originals, way))}
        for way in ways
    ]
    study.table("steps", over, f"{first} over the number of steps; one naive step is direct restoration.")
    label = f"{evaluator.metric} to the images"
    figure = lines(over, "steps", {label: [evaluator.metric]}, evaluator, by="restored", log=True)
    study.figure("steps", figure, f"{first}: distance over the number of steps.")

    def of(name: str, way: str) -> Any:
        return next(row[evaluator.metric] for row in rows if (row["degradation"], row["restored"]) == (name, way))

    better = [name.lower() for name in trained if of(name, "improved") < of(name, "direct")]
    named = f" ({', '.join(better)})" if better else ""
    study.finding(
        f"Of {count:,} test images under {first.lower()}, the improved sampler's restorations have {evaluator.metric} "
        f"{of(first, 'improved'):.3g}, those in one go {of(first, 'direct'):.3g} and the naive sampler's "
        f"{of(first, 'naive'):.3g}; improved beats direct on {len(better)} of {len(trained)} degradations{named}."
    )


def variant(words: str) -> tuple[str, dict[str, Any]]:
    """A degradation as a training's name and options.

    Args:
        words: Its class, and its number of steps behind a colon: `Pixelate:2`.

    Returns:
        The class's name, and the options of `diffusion-lit fit`.
    """
    name, colon, steps = words.partition(":")
    described: Any = f"diffusion_lit.diffusion.{name}"
    if colon:
        described = {"class_path": described, "init_args": {"num_steps": int(steps)}}
    return name, {"model.init_args.degradation": described}


def degraded(study: Study, run: Trained, images: Tensor) -> Tensor:
    """Fully degraded images.

    Args:
        study: Where it works.
        run: The training, whose model knows the degradation.
        images: uint8 (N, C, H, W).

    Returns:
        uint8 (N, C, H, W).
    """
    module: Any = load_module(run.ckpt_path)
    return to_uint8(module.degrade(from_uint8(images), range(len(images)))[0])


def restored(study: Study, run: Trained, originals: Tensor, sampling: ColdSampling) -> Tensor:
    """Images fully degraded and restored; results that exist are reused.

    Args:
        study: Where it works.
        run: The training.
        originals: uint8 (N, C, H, W).
        sampling: How they are restored; over all steps where it does not say.

    Returns:
        uint8 (N, C, H, W).
    """
    module: Any = load_module(run.ckpt_path).to(study.device)
    if sampling.num_steps is None:
        sampling = replace(sampling, num_steps=module.degradation.num_steps)

    def make() -> dict[str, Tensor]:
        made = []
        for rows in torch.split(torch.arange(len(originals)), study.setup.batch_size):
            images = from_uint8(originals[rows]).to(study.device)
            made.append(to_uint8(module.reconstruct(images, sampling, rows.tolist())))
        return {"images": torch.cat(made)}

    record = {"checkpoint": file_hash(run.ckpt_path), "sampling": sampling.record(), "count": len(originals)}
    return study.keep(record, make)["images"]


def draw_bars(rows: list[dict[str, Any]], evaluator: Evaluator) -> plt.Figure:
    """The distance of each way of restoring under each degradation."""
    names = list(dict.fromkeys(row["degradation"] for row in rows))
    ways = list(dict.fromkeys(row["restored"] for row in rows))
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    labels = {evaluator.metric: f"{evaluator.metric} to the images themselves", "psnr": "PSNR in dB"}
    for axes, (column, label) in zip(panels, labels.items(), strict=True):
        for index, way in enumerate(ways):
            places = [place + (index - (len(ways) - 1) / 2) * 0.2 for place in range(len(names))]
            values = [row[column] for row in rows if row["restored"] == way]
            axes.bar(places, values, 0.19, label=way, color="lightgrey" if way == "degraded" else f"C{index - 1}")
        axes.set_xticks(range(len(names)), [name.lower() for name in names])
        axes.set(ylabel=label)
        axes.grid(True, axis="y", alpha=0.3)
    panels[0].set_yscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(ways))
    return figure


if __name__ == "__main__":
    main(cold_diffusion, "configs/cold_digits.yaml", {**QUIET, "trainer.max_steps": 400}, num_samples=500)
