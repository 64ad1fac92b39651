"""Learning rates: 1e-3, 1e-4 and 1e-5 at the same number of steps, with or without a decay.

Each training logs its loss on held-out images on the way; at its end it draws samples, and for a few of them every
step from noise to image. Decays, by `--decays`: `none`, `plateau` (ReduceLROnPlateau: halved when the held-out loss
has not fallen for two validations), `exponential` and `cosine` (both over the whole run, to a tenth and to nothing).

    python -m experiments.learning_rates
    python -m experiments.learning_rates --decays '[none, plateau, exponential, cosine]'
    python -m experiments.learning_rates --config configs/ddpm_landscapes.yaml --data.init_args.root FOLDER
"""

from typing import Any

import matplotlib.pyplot as plt
import torch
from PIL import Image

from diffusion_lit.diffusion.grids import evenly
from diffusion_lit.modules.load import load_module
from diffusion_lit.report.images import StepRecorder
from experiments.harness.runs import Trained
from experiments.harness.show import lines
from experiments.harness.study import QUIET, Study, image_rows, main

DECAYS = ("none", "plateau", "exponential", "cosine")


def learning_rates(
    study: Study,
    rates: list[float] = [1e-3, 1e-4, 1e-5],  # noqa: B006 (never changed)
    decays: list[str] = ["none"],  # noqa: B006
) -> None:
    """Which learning rate learns most from the same number of steps?

    Trains the same model with each learning rate, and each decay where several are given, and compares the loss on
    held-out images, the samples, and how they come out of noise.

    Args:
        study: Where it works.
        rates: Learning rates.
        decays: How they fall: none, plateau, exponential, cosine.
    """
    steps = int(study.value("trainer.max_steps"))
    if steps < 2 * int(study.value("trainer.log_every_n_steps")):  # else the learning rates would not be in the figure
        study.options["trainer.log_every_n_steps"] = max(1, steps // 10)
    variants = {
        f"{rate:g}" if decays == ["none"] else f"{rate:g}, {decay}": {
            "model.init_args.optimizer.init_args.lr": rate,
            "model.init_args.lr_scheduler": scheduler(decay, steps),
        }
        for rate in rates
        for decay in decays
    }
    trained = study.fit(variants)
    evaluator = study.evaluator(trained)
    study.figure("loss", losses(trained), "Loss on held-out images and learning rate along the training.")
    rows: list[dict[str, Any]] = []
    for name, run in trained.items():
        drawn = study.draw(run, evaluator)
        loss = run.metrics["val/loss"]
        rows.append({"learning rate": name, "val/loss": loss, **evaluator.measure(drawn), "seconds": run.seconds})
        study.images(f"summary_{name}", drawn.images[:40], f"Samples at learning rate {name}.")
        caption = f"From noise to image at learning rate {name}: x above x0_hat, under the noise level sigma."
        study.figure(f"detailed_{name}", detailed(study, run), caption)
    study.table("quality", rows, f"{study.setup.num_samples:,} samples against the training images, {steps:,} steps.")
    figure = lines(rows, "learning rate", {evaluator.metric: [evaluator.metric]}, evaluator)
    study.figure("quality", figure, "The same as a figure.")
    best, worst = (pick(rows, key=lambda row: row[evaluator.metric]) for pick in (min, max))
    study.finding(
        f"After {steps:,} steps a learning rate of {best['learning rate']} is best with {evaluator.metric} "
        f"{best[evaluator.metric]:.3g} and a held-out loss of {best['val/loss']:.3g}; {worst['learning rate']} gives "
        f"{worst[evaluator.metric]:.3g} and {worst['val/loss']:.3g}."
    )


def scheduler(decay: str, steps: int) -> dict[str, Any] | None:
    """A learning-rate schedule as the configuration of `diffusion-lit fit` has it.

    Args:
        decay: One of `DECAYS`.
        steps: Length of the training.

    Returns:
        Class and arguments, or None for a constant rate.

    Raises:
        ValueError: If there is no such decay.
    """
    found = {
        "none": None,
        "plateau": ("ReduceLROnPlateau", {"factor": 0.5, "patience": 2, "monitor": "val/loss"}),
        "exponential": ("ExponentialLR", {"gamma": 0.1 ** (1 / steps)}),
        "cosine": ("CosineAnnealingLR", {"T_max": steps}),
    }
    if decay not in found:
        raise ValueError(f"There is no decay {decay!r}; choose some of {', '.join(DECAYS)}.")
    chosen = found[decay]
    if chosen is None:
        return None
    package = "lightning.pytorch.cli" if decay == "plateau" else "torch.optim.lr_scheduler"
    return {"class_path": f"{package}.{chosen[0]}", "init_args": chosen[1]}


def losses(trained: dict[str, Trained]) -> plt.Figure:
    """The held-out loss and the learning rate of each training."""
    figure, (loss, rate) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, run in trained.items():
        loss.plot(*run.curves["val/loss"], marker="o", markersize=3, label=name)
        for key, curve in run.curves.items():
            if key.startswith("lr-"):
                rate.plot(*curve, label=name)
    loss.set(xlabel="training step", ylabel="loss on held-out images", yscale="log")
    rate.set(xlabel="training step", ylabel="learning rate", yscale="log")
    for axes in (loss, rate):
        axes.grid(True, which="both", alpha=0.3)
    loss.legend(title="learning rate")
    return figure


def detailed(study: Study, run: Trained, count: int = 3, columns: int = 10) -> Image.Image:
    """Some steps of a few samples, evenly spread, with the noise level of each.

    Returns:
        The figure: for each sample a row of x, at unit variance, above one of x0_hat.
    """
    module: Any = load_module(run.ckpt_path)
    recorder = StepRecorder(keep=count)
    labels = torch.arange(count) % module.num_classes if module.num_classes else None
    module.generate(range(study.setup.seed, study.setup.seed + count), labels, callback=recorder)
    chosen = evenly(0, len(recorder.x) - 1, min(columns, len(recorder.x)))
    rows = {}
    for index in range(count):
        scaled = [recorder.x[step][index] / (1 + recorder.sigmas[step] ** 2) ** 0.5 for step in chosen]
        rows[f"{index + 1}: x"] = torch.stack(scaled)
        rows[f"{index + 1}: x0_hat"] = torch.stack([recorder.x0_hat[step][index] for step in chosen])
    return image_rows(rows, [f"{recorder.sigmas[step]:.3g}" for step in chosen])


if __name__ == "__main__":
    SMALL = {
        **QUIET,
        "trainer.max_steps": 300,
        "trainer.val_check_interval": 50,
        "loss_by_noise_level.batches": 0,
        "model.init_args.net.init_args.model_channels": 16,
    }
    main(learning_rates, "configs/ddpm_digits.yaml", SMALL, num_samples=500)
