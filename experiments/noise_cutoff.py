"""Ancestral sampling that stops adding noise: after k of its steps the rest take the mean alone.

Each step of DDPM's sampler moves to the mean of q(x_next | x, x0_hat) and adds noise. The option `noise_until` of the
sampler leaves the noise out after the first k steps. Sharpness is the mean squared Laplacian of the samples over that
of the training images: 1 is as sharp (or as noisy) as real, below is smoother.

    python -m experiments.noise_cutoff
    python -m experiments.noise_cutoff --num_steps 1000 --until '[0, 300, 600, 900, 1000]'
    python -m experiments.noise_cutoff --config configs/ddpm_fashion_mnist.yaml --data.init_args.root FOLDER
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from diffusion_lit.diffusion.images import from_uint8
from diffusion_lit.modules.load import load_module
from experiments.harness.evaluator import spread_images
from experiments.harness.show import lines
from experiments.harness.study import QUIET, Study, image_rows, main


def noise_cutoff(
    study: Study,
    num_steps: int = 100,
    until: list[int] | None = None,
    ckpt_path: str | None = None,
) -> None:
    """What happens when ancestral sampling stops adding noise before its end?

    Draws samples of the same seeds whose first k steps add noise and whose other steps take the mean alone.

    Args:
        study: Where it works.
        num_steps: Steps of the sampler.
        until: The numbers k of steps that add noise; by default 0, 10, 30, 60, 90, 95 and 100% of them.
        ckpt_path: A trained DDPM; by default one is trained.
    """
    path = ckpt_path or str(study.fit({"ddpm": {}})["ddpm"].ckpt_path)
    cuts = until or sorted({round(num_steps * share) for share in (0, 0.1, 0.3, 0.6, 0.9, 0.95, 1)})
    module: Any = load_module(path)
    evaluator = study.evaluator(path)
    default = module.sampling.replace(sampler="ddpm", num_steps=num_steps, grid="trailing")
    real = spread_images(evaluator.data)
    scale = sharpness(real)
    rows, shown = [], {}
    for cut in cuts:
        drawn = study.draw(path, evaluator, default.replace(sampler_options={"noise_until": cut}))
        rows.append({"noise until": cut, **evaluator.measure(drawn), "sharpness": sharpness(drawn.images) / scale})
        shown[f"k = {cut}"] = drawn.images[:12]
    shown["real"] = real[:12]
    caption = f"{study.setup.num_samples:,} samples against the training images, {num_steps:,} steps."
    panels = {
        evaluator.metric: [evaluator.metric],
        "mean squared Laplacian, real = 1": ["sharpness"],
        "share of images": ["precision", "recall"],
    }
    study.table("quality", rows, caption)
    figure = lines(rows, "noise until", panels, evaluator, xlabel=f"steps of {num_steps:,} that add noise")
    figure.axes[1].axhline(1, color="grey", linestyle="--")
    study.figure("quality", figure, "Quality and sharpness against where the noise stops.")
    study.figure(
        "samples",
        image_rows(shown),
        f"Samples of the same seeds: the first k of {num_steps:,} steps add noise, the others take the mean.",
    )
    best, none, full = min(rows, key=lambda row: row[evaluator.metric]), rows[0], rows[-1]
    told = [
        f"{row[evaluator.metric]:.3g} (recall {row['recall']:.2f}, {row['sharpness']:.0%} of real sharpness)"
        for row in (best, none, full)
    ]
    study.finding(
        f"Noise in the first {best['noise until']:,} of {num_steps:,} steps is best, with {evaluator.metric} "
        f"{told[0]}; noise in the first {none['noise until']:,} gives {told[1]}, in the first {full['noise until']:,} "
        f"{told[2]}."
    )


def sharpness(images: Tensor) -> float:
    """The mean squared Laplacian of images, which edges and noise make large.

    Args:
        images: Images (N, C, H, W), uint8.

    Returns:
        Of images scaled to [-1, 1], away from their border.
    """
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    pixels = from_uint8(images).flatten(0, 1)[:, None]
    return float(conv2d(pixels, kernel).square().mean())


if __name__ == "__main__":
    SMALL = {
        **QUIET,
        "trainer.max_steps": 600,
        "model.init_args.net.init_args.model_channels": 16,
    }
    main(noise_cutoff, "configs/ddpm_digits.yaml", SMALL, num_samples=500)
