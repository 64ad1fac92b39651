"""Which average of the weights samples best? Widths and training times swept after the run, from its snapshots.

Train with several power-function averages and snapshots of them, then reconstruct any width (Karras 2024, arXiv
2312.02696, section 3.2) and measure the Fréchet distance of its samples to the training images:

    diffusion-lit fit --config configs/edm_digits.yaml --ema.sigma_rel '[0.05, 0.1]' --ema.snapshot_every 50
    python -m experiments.posthoc_ema --ckpt_path runs/edm_digits/version_0/checkpoints/last.ckpt

The same seeds are used for each average, so that they differ by their weights alone; the floor is that of real images
against real ones at the same number.
"""

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from diffusion_lit.diffusion.images import to_uint8
from diffusion_lit.evaluation import ClassifierFeatures, FeatureExtractor
from diffusion_lit.evaluation.features import Features
from diffusion_lit.evaluation.generation import class_frequencies, draw_labels
from diffusion_lit.modules.load import load_module, prepared_data
from diffusion_lit.modules.posthoc import reconstruct
from diffusion_lit.storage.checkpoints import read_checkpoint
from diffusion_lit.storage.snapshots import Snapshots
from experiments.harness.command import command
from experiments.harness.evaluator import Evaluator
from experiments.harness.show import keep_figure, keep_json, lines


def posthoc_ema(
    ckpt_path: str,
    sigma_rels: list[float] | None = None,
    steps: list[int] | None = None,
    num_samples: int = 1000,
    batch_size: int = 250,
    seed: int = 0,
    num_steps: int | None = None,
    extractor: FeatureExtractor | None = None,
    device: str = "cpu",
    out: str = "runs/studies/posthoc_ema",
) -> dict[str, Any]:
    """Sweeps widths (and times) of the average to the best Fréchet distance.

    Args:
        ckpt_path: Checkpoint of a run with `--ema.snapshot_every`.
        sigma_rels: Widths to try; 0.02 to 0.25 by default.
        steps: Training times to try; the last by default.
        num_samples: Samples per average.
        batch_size: Samples drawn at a time.
        seed: Seed of the first sample.
        num_steps: Sampling steps; those of the model by default.
        extractor: What images are compared by; a classifier of the data set by default.
        device: Where samples are drawn.
        out: Folder for figures.json and posthoc_ema.png.

    Returns:
        The figures that it prints.
    """
    snapshots = Snapshots(Path(ckpt_path).resolve().parent.parent / "averages")
    module: Any = load_module(ckpt_path).to(device)
    data = prepared_data(ckpt_path)
    measure = extractor or ClassifierFeatures()
    measure.load(data)
    evaluator = Evaluator(data, measure, num_samples)
    seeds = range(seed, seed + num_samples)
    labels = draw_labels(seeds, class_frequencies(data, module.num_classes))
    sampling = module.sampling.replace(num_steps=num_steps)

    def distance(state: dict[str, torch.Tensor]) -> float:
        module.load_state_dict(state, strict=False)
        parts = []
        for start in range(0, num_samples, batch_size):
            rows = slice(start, min(start + batch_size, num_samples))
            made = module.generate(seeds[rows], None if labels is None else labels[rows], sampling)
            parts.append(measure.features(to_uint8(made)))
        return evaluator.distance(Features.cat(parts))

    rows = []
    for step in steps or [snapshots.steps[-1]]:
        for width in sigma_rels or [0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25]:
            rows.append({"step": step, "sigma_rel": width, "distance": distance(reconstruct(snapshots, width, step))})
            print(f"step {step:>7}  sigma_rel {width:<6g} {measure.metric} {rows[-1]['distance']:.4g}", flush=True)
    raw = distance(read_checkpoint(ckpt_path).get("current_model_state", {}))
    best = min(rows, key=lambda row: row["distance"])
    print(f"best: sigma_rel {best['sigma_rel']:g} at step {best['step']}: {best['distance']:.4g}")
    print(f"raw weights: {raw:.4g}")
    if evaluator.floor is not None:
        print("real against real at {1:,} images: {0:.4g}".format(*evaluator.floor))
    figures = {
        "rows": rows,
        "best": best,
        "raw": raw,
        "floor": evaluator.floor,
        "num_samples": num_samples,
        "metric": measure.metric,
        "kept": sorted({width for _, width, _ in snapshots.files}),
    }
    folder = Path(out)
    keep_json(folder / "figures.json", figures)
    keep_figure(folder / "posthoc_ema.png", draw(figures, evaluator))
    return figures


def draw(figures: dict[str, Any], evaluator: Evaluator) -> Figure:
    """The distance over the width, a line for each training time."""
    rows = [{**row, "step": f"step {row['step']}"} for row in figures["rows"]]
    width = "width sigma_rel of the average (grey lines: kept in training)"
    figure = lines(rows, "sigma_rel", {evaluator.metric: ["distance"]}, evaluator, by="step", xlabel=width, log=True)
    axes = figure.axes[0]
    axes.set_ylabel(f"{evaluator.metric} at {figures['num_samples']:,} samples")
    axes.axhline(figures["raw"], color="black", linestyle=":", label="raw weights")
    for kept in figures["kept"]:
        axes.axvline(kept, color="lightgrey", zorder=0)
    axes.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    command(posthoc_ema)
