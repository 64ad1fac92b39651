"""Where does attention pay: none, linear, full at large or at small feature maps, in one head or in many?

The same U-Net is trained for the same number of steps with attention in different places, and its samples measured
beside what it costs: parameters, the time of a training step, and the activations that the step keeps. Sizes of feature
maps are those behind the stem: `auto` takes the two largest, 16 and 8 of a network of 32-pixel images behind a stem
of 2x2 patches, and 8 and 4 of the digits. More heads at lower resolution means heads of few channels: the deeper level
is wider and so has more of them.

    python -m experiments.attention_ablation
    python -m experiments.attention_ablation --config configs/edm_fashion_mnist.yaml --data.init_args.root FOLDER
"""

from typing import Any

import matplotlib.pyplot as plt

from diffusion_lit.modules.load import load_module
from experiments.harness.evaluator import Evaluator
from experiments.harness.networks import build, cost, step_cost
from experiments.harness.show import image_rows
from experiments.harness.study import QUIET, Study, main

NET = "model.init_args.net.init_args"
ONE_HEAD = 1024  # more channels than any level has


def attention_ablation(study: Study, large: int | None = None, small: int | None = None, seconds: float = 2.0) -> None:
    """Where does attention pay?

    Trains one U-Net with attention in different places, and measures quality, parameters, speed and memory.

    Args:
        study: Where it works.
        large: Size of the larger feature maps; the largest of the network when omitted.
        small: Size of the smaller ones; half of it when omitted.
        seconds: How long the time of a training step is measured.
    """
    net: Any = build(study)
    largest: int = net.image_size // (study.value(f"{NET}.patch_size") or 1)
    large = large or largest
    small = small or large // 2
    places = [str([size])[1:-1] for size in (large, small)]
    variants: dict[str, dict[str, Any]] = {
        "none": _attention(),
        f"linear at {places[0]}": _attention(linear=[large]),
        f"full at {places[0]}": _attention([large]),
        f"full at {places[1]}": _attention([small]),
        f"full at {places[0]} and {places[1]}": _attention([large, small]),
        f"full at {places[0]} and {places[1]}, more heads": _attention([large, small], head_channels=8),
    }
    trained = study.fit(variants)
    evaluator = study.evaluator(trained)
    batch_size = int(study.value("data.init_args.batch_size"))
    rows: list[dict[str, Any]] = []
    shown = {}
    for name, run in trained.items():
        module: Any = load_module(run.ckpt_path).to(study.device)
        drawn = study.draw(run, evaluator)
        rows.append(
            {
                "attention": name,
                **evaluator.measure(drawn),
                "val/loss": run.metrics["val/loss"],
                "parameters M": cost(module.net).parameters / 1e6,
                **step_cost(module.net, batch_size, seconds),
                "ms per sample": 1000 * drawn.seconds / len(drawn.features),
            }
        )
        shown[name] = drawn.images[:12]
    count, steps = study.setup.num_samples, int(study.value("trainer.max_steps"))
    study.table("quality", rows, f"{count:,} samples after {steps:,} steps of batches of {batch_size}.")
    study.figure("quality", draw(rows, evaluator), "Quality against what a training step costs.")
    study.figure("samples", image_rows(shown), "Samples of the same seeds.")
    none, *others = rows
    best, worst = (choose(others, key=lambda row: row[evaluator.metric]) for choose in (min, max))
    dearest = max(others, key=lambda row: row["activations MB"])
    study.finding(
        f"After {steps:,} steps {evaluator.metric} is {none[evaluator.metric]:.3g} without attention, and with it "
        f"between {best[evaluator.metric]:.3g} ({best['attention']}) and {worst[evaluator.metric]:.3g} "
        f"({worst['attention']}); a step of the former takes {best['ms per step'] / none['ms per step']:.2f} times the "
        f"time and {best['parameters M'] / none['parameters M']:.2f} times the parameters, and "
        f"'{dearest['attention']}' keeps {dearest['activations MB'] / none['activations MB']:.2f} times the "
        "activations."
    )


def _attention(full: list[int] | None = None, linear: list[int] | None = None, head_channels: int = ONE_HEAD) -> Any:
    """Options of a network's attention: one head a level unless told otherwise."""
    return {
        f"{NET}.attention_resolutions": full or [],
        f"{NET}.linear_attention_resolutions": linear or [],
        f"{NET}.head_channels": head_channels,
    }


def draw(rows: list[dict[str, Any]], evaluator: Evaluator) -> plt.Figure:
    """Quality against time, memory and parameters."""
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.5), layout="constrained", sharey=True)
    labels = {
        "ms per step": "milliseconds of a training step",
        "activations MB": "activations kept by a step, MB",
        "parameters M": "parameters, millions",
    }
    for axes, (column, label) in zip(panels, labels.items(), strict=True):
        for index, row in enumerate(rows):
            marker = "osD^vP*X"[index % 8]
            axes.plot(
                row[column], row[evaluator.metric], marker, markersize=9, color=f"C{index}", label=row["attention"]
            )
        axes.set_xlabel(label)
        axes.margins(0.15)
        axes.grid(True, alpha=0.3)
    evaluator.draw_floor(panels[0])
    panels[0].set_ylabel(evaluator.metric)
    panels[0].set_ylim(bottom=0)
    panels[0].legend(fontsize=7)
    return figure


if __name__ == "__main__":
    SMALL = {**QUIET, "trainer.max_steps": 600, "model.init_args.sampling.num_steps": 9}
    main(attention_ablation, "configs/edm_digits.yaml", SMALL, num_samples=300)
