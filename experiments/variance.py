"""The variance of DDPM's steps: too little, and samples collapse towards their modes; too much, and noise is left over.

One network is trained that also predicts a variance (Nichol & Dhariwal 2021, arXiv 2102.09672), and sampled with that,
with the two extremes of Ho 2020 (arXiv 2006.11239), the posterior's and beta, and with the posterior's times a factor.
Diversity is the standard deviation of the classifier's features around the mean of their class, over that of the
training images: 1 is as varied as real, 0 is one image per class. Sharpness above 1 is left-over noise.

    python -m experiments.variance
    python -m experiments.variance --scales '[0, 0.5, 1.5, 3]' --num_steps 250
    python -m experiments.variance --config configs/ddpm_fashion_mnist.yaml --data.init_args.root FOLDER
"""

from typing import Any

import torch
from torch import Tensor

from diffusion_lit.modules.load import load_module
from experiments.harness.evaluator import spread_images
from experiments.harness.networks import data_of
from experiments.harness.show import lines
from experiments.harness.study import QUIET, Study, image_rows, main
from experiments.noise_cutoff import sharpness


def variance(
    study: Study,
    num_steps: int = 50,
    scales: list[float] = [0.0, 0.25, 0.5, 2.0, 4.0],  # noqa: B006 (never changed)
    ckpt_path: str | None = None,
) -> None:
    """How much noise should a step of ancestral sampling add?

    Samples one network with the posterior variance, beta, the variance that it learned, and scaled variances, from near
    mode collapse to left-over noise.

    Args:
        study: Where it works.
        num_steps: Steps of the sampler; the fewer, the more the variances differ.
        scales: Factors on the posterior variance.
        ckpt_path: A DDPM trained with `HybridLoss`; by default one is trained.
    """
    if ckpt_path is None:
        options = {
            "model.init_args.loss": "diffusion_lit.diffusion.HybridLoss",
            "model.init_args.net.init_args.out_channels": 2 * data_of(study).image_shape[0],
            "model.init_args.sampling.sampler_options": {"variance": "learned"},
        }
        ckpt_path = str(study.fit({"learned variance": options})["learned variance"].ckpt_path)
    module: Any = load_module(ckpt_path)
    evaluator = study.evaluator(ckpt_path)
    default = module.sampling.replace(sampler="ddpm", num_steps=num_steps, grid="trailing")
    ways: dict[str, dict[str, Any]] = {
        f"posterior x {scale:g}": {"variance": "posterior", "variance_scale": scale} for scale in scales if scale < 1
    }
    ways |= {name: {"variance": name} for name in ("posterior", "learned", "beta")}
    ways |= {
        f"posterior x {scale:g}": {"variance": "posterior", "variance_scale": scale} for scale in scales if scale > 1
    }
    real = spread_images(evaluator.data)
    assert evaluator.reference.features is not None
    spread = diversity(evaluator.reference.features.features, evaluator.reference.labels)
    rows: list[dict[str, Any]] = []
    shown = {}
    for name, options in ways.items():
        drawn = study.draw(ckpt_path, evaluator, default.replace(sampler_options=options))
        rows.append(
            {
                "variance": name,
                **evaluator.measure(drawn),
                "diversity": diversity(drawn.features.features, drawn.labels) / spread,
                "sharpness": sharpness(drawn.images) / sharpness(real),
            }
        )
        shown[name] = drawn.images[:12]
    shown["real"] = real[:12]
    caption = f"{study.setup.num_samples:,} samples against the training images, {num_steps:,} steps."
    study.table("quality", rows, caption)
    panels = {
        evaluator.metric: [evaluator.metric],
        "share of images": ["precision", "recall"],
        "over that of training images": ["diversity", "sharpness"],
    }
    figure = lines(rows, "variance", panels, evaluator, xlabel="variance of a step")
    figure.axes[2].axhline(1, color="grey", linestyle="--")
    study.figure("quality", figure, "Quality, diversity and sharpness of each variance, from small to large.")
    study.figure("samples", image_rows(shown), f"Samples of the same seeds and classes in {num_steps:,} steps.")
    least, most = rows[0], rows[-1]
    best = min(rows, key=lambda row: row[evaluator.metric])
    study.finding(
        f"In {num_steps:,} steps the variance '{best['variance']}' is best with {evaluator.metric} "
        f"{best[evaluator.metric]:.3g}; '{least['variance']}' has {least['diversity']:.0%} of real diversity and a "
        f"recall of {least['recall']:.2f}, '{most['variance']}' {most['sharpness']:.1f} times the real sharpness, "
        f"which is noise, and a precision of {most['precision']:.2f}."
    )


def diversity(features: Tensor, labels: Tensor | None) -> float:
    """How far samples lie from the mean of their class.

    Args:
        features: Shape (N, d).
        labels: Classes int64 (N,), or None for one class.

    Returns:
        The root of the mean squared distance.
    """
    labels = torch.zeros(len(features), dtype=torch.int64) if labels is None else labels
    squared = 0.0
    for label in labels.unique():
        own = features[labels == label].double()
        squared += float((own - own.mean(0)).square().sum()) * len(own) / max(1, len(own) - 1)
    return (squared / len(features)) ** 0.5


if __name__ == "__main__":
    SMALL = {
        **QUIET,
        "trainer.max_steps": 600,
        "model.init_args.net.init_args.model_channels": 16,
    }
    main(variance, "configs/ddpm_digits.yaml", SMALL, num_samples=500)
