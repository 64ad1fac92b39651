"""Noise schedules: what they are, how a network is told the time, and what they and their length do for quality.

A schedule is a table of betas; alpha_bar = prod(1 - beta) is the share of the signal that is left, and the log-SNR
log(alpha_bar / (1 - alpha_bar)) what a denoiser has to work with. All schedules are on one figure, the sinusoidal
embedding of the time on another. Then a DDPM is trained with 300, 512 and 1,000 steps, linear and cosine, and samples
by ancestral sampling over all of its own steps, and over a few of them.

    python -m experiments.schedules
    python -m experiments.schedules --config configs/ddpm_fashion_mnist.yaml --data.init_args.root FOLDER
"""

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import torch

from diffusion_lit.diffusion.conversions import sigma_to_log_snr
from diffusion_lit.diffusion.schedules import (
    ContinuousVP,
    CosineSchedule,
    LinearSchedule,
    ScaledLinearSchedule,
    Schedule,
    SigmoidSchedule,
)
from diffusion_lit.modules.load import load_module
from diffusion_lit.nets.layers import Conditioning
from experiments.harness.show import lines
from experiments.harness.study import QUIET, Study, image_rows, main

SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "linear": LinearSchedule,
    "scaled linear": ScaledLinearSchedule,
    "cosine": CosineSchedule,
    "sigmoid": SigmoidSchedule,
    "continuous VP": ContinuousVP,
}


def schedules(
    study: Study,
    num_steps: list[int] = [300, 512, 1000],  # noqa: B006 (never changed)
    compared: list[str] = ["linear", "cosine"],  # noqa: B006
    few: int = 50,
) -> None:
    """Does it matter which noise schedule a DDPM has, and how many steps?

    Draws all schedules and the embedding of the time, trains a DDPM for each schedule and number of steps, and compares
    samples over all of its steps with samples over a few.

    Args:
        study: Where it works.
        num_steps: Lengths of the trained schedules.
        compared: Schedules to train with: linear, scaled linear, cosine, sigmoid, continuous VP.
        few: Steps of the shorter way of sampling.

    Raises:
        ValueError: If there is no such schedule.
    """
    for name in compared:
        if name not in SCHEDULES:
            raise ValueError(f"There is no schedule {name!r}; choose some of {', '.join(SCHEDULES)}.")
    study.figure(
        "schedules",
        curves({name: schedule() for name, schedule in SCHEDULES.items()}),
        "All schedules at 1,000 steps. Betas are the noise added by each step, alpha_bar the share of the signal's "
        "variance that is left, the log-SNR its ratio to the noise.",
    )
    study.figure(
        "embeddings",
        embeddings(),
        "How a network is told the time: the cosines and sines of t at 64 frequencies from 1 to 1/10,000, before its "
        "linear layers. Neighbouring times differ in the fast ones, distant times in the slow ones.",
    )
    variants = {
        f"{name}, {steps}": {
            "model.init_args.schedule": {
                "class_path": f"diffusion_lit.diffusion.{SCHEDULES[name].__name__}",
                "init_args": {"num_steps": steps},
            },
            "model.init_args.sampling": {"sampler": "ddpm", "num_steps": few, "grid": "trailing", "clip_x0": "static"},
        }
        for name in compared
        for steps in num_steps
    }
    trained = study.fit(variants)
    evaluator = study.evaluator(trained)
    rows: list[dict[str, Any]] = []
    shown = {}
    for name, run in trained.items():
        module: Any = load_module(run.ckpt_path)
        schedule, _, steps = name.partition(", ")
        for way, count in ((f"{few} of them", few), ("all steps", int(steps))):
            drawn = study.draw(run, evaluator, module.sampling.replace(num_steps=count))
            rows.append({"schedule": schedule, "steps": int(steps), "sampled over": way, **evaluator.measure(drawn)})
            shown[name] = drawn.images[:12]
    study.table("quality", rows, f"{study.setup.num_samples:,} samples of each against the training images.")
    metric = evaluator.metric
    named = [{**row, "way": f"{row['schedule']}, over {row['sampled over']}"} for row in rows]
    figure = lines(named, "steps", {metric: [metric], "recall": ["recall"]}, evaluator, by="way")
    study.figure("quality", figure, "Quality against the number of steps that a schedule has.")
    study.figure("samples", image_rows(shown), "Samples of the same seeds, over all steps of each schedule.")
    whole = [row for row in rows if row["sampled over"] == "all steps"]
    best, worst = (pick(whole, key=lambda row: row[metric]) for pick in (min, max))
    means = {
        name: sum(values) / len(values)
        for name in compared
        if (values := [row[metric] for row in whole if row["schedule"] == name])
    }
    means_told = " and ".join(f"{value:.3g} with the {name} schedule" for name, value in means.items())
    study.finding(
        f"Over all steps {metric} is {means_told} on average, between {best[metric]:.3g} "
        f"({best['schedule']}, {best['steps']:,} steps) and {worst[metric]:.3g} ({worst['schedule']}, "
        f"{worst['steps']:,} steps)."
    )


def curves(tables: dict[str, Schedule]) -> plt.Figure:
    """Betas, alpha_bar and log-SNR of schedules."""
    figure, panels = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for index, (name, schedule) in enumerate(tables.items()):
        share = torch.arange(schedule.num_steps) / (schedule.num_steps - 1)
        dashes, width = ("-", "--", "-", "-.", ":")[index % 5], 4 if index == 0 else 2  # the last lies on the first
        style: dict[str, Any] = {"label": name, "linestyle": dashes, "linewidth": width}
        for axes, values in zip(
            panels, (schedule.betas, schedule.alpha_bar, sigma_to_log_snr(schedule.sigmas)), strict=True
        ):
            axes.plot(share, values, **style)
    panels[0].set(yscale="log", ylabel="beta")
    panels[1].set(ylabel="alpha_bar")
    panels[2].set(ylabel="log-SNR = log(alpha_bar / (1 - alpha_bar))", ylim=(-12, 12))
    for axes in panels:
        axes.set_xlabel("t / (T - 1)")
        axes.grid(True, alpha=0.3)
    panels[0].legend()
    return figure


def embeddings(features: int = 128, total: int = 1000) -> plt.Figure:
    """The sinusoidal embedding of every time, as the U-Net computes it, and how alike two times look."""
    conditioning = Conditioning(features, features, "positional", 0, 0)
    with torch.no_grad():
        table = conditioning.noise_features(torch.arange(total, dtype=torch.float32))
    figure, (panel, likeness) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained", width_ratios=(3, 2))
    image = panel.imshow(table.T, aspect="auto", cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
    panel.set(xlabel="time t", ylabel=f"feature: {features // 2} cosines, {features // 2} sines")
    figure.colorbar(image, ax=panel)
    for time in (0, total // 2, total - 1):
        likeness.plot(torch.cosine_similarity(table, table[time : time + 1]), label=f"with t = {time}")
    likeness.set(xlabel="time t", ylabel="cosine similarity of embeddings", ylim=(-0.2, 1.05))
    likeness.legend(loc="lower center", ncols=3)
    likeness.grid(True, alpha=0.3)
    return figure


if __name__ == "__main__":
    SMALL = {
        **QUIET,
        "trainer.max_steps": 500,
        "model.init_args.net.init_args.model_channels": 16,
    }
    main(schedules, "configs/ddpm_digits.yaml", SMALL, num_samples=200)
