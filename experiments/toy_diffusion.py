"""The simplest thing that works: mix an image with noise, train a network to take it back, take it back in five steps.

An image x0 and noise n are mixed with a random amount t in (0, 1),

    x_t = (1 - t) x0 + t n,

and a small U-Net that is not told t predicts x0 from x_t by squared error. Drawing starts at t = 1, and each of N steps
moves the mix towards the prediction x0_hat, by 1/N of the way at first and all of it at last:

    x_{t'} = x0_hat + (t' / t) (x_t - x0_hat),        t = 1, 1 - 1/N, ..., 1/N, 0

That is the flow path of the project's own core: `X0Preconditioning()` with `UniformT()` noise levels, and the sampler
`euler` on the grid `trailing`. Only the figures are made for the toy.

    python -m experiments.toy_diffusion
    python -m experiments.toy_diffusion --data.class_path datamodules.FashionMNIST --data.init_args.root FOLDER
"""

from typing import Any

import torch
from torch import Tensor

from diffusion_lit.diffusion.conversions import flow_time_to_sigma
from diffusion_lit.modules.load import load_module
from diffusion_lit.report.images import StepRecorder
from experiments.harness.evaluator import first_images
from experiments.harness.show import lines
from experiments.harness.study import Study, image_rows, main

AMOUNTS = torch.linspace(0, 1, 9).clamp(0.001, 0.999)  # the core keeps t in [1e-3, 1 - 1e-3]


def toy_diffusion(study: Study, num_steps: list[int] = [1, 2, 5, 10, 40]) -> None:  # noqa: B006 (never changed)
    """What is the simplest diffusion model that works?

    A small U-Net that is not told the amount of noise predicts the clean image from its linear mix with noise, and
    draws images in a few steps.

    Args:
        study: Where it works.
        num_steps: Numbers of steps to draw with.
    """
    trained = study.fit({"toy": {}})["toy"]
    module: Any = load_module(trained.ckpt_path)
    evaluator = study.evaluator(trained.ckpt_path)
    real = first_images(evaluator.data, "val", 9)
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(study.setup.seed))

    names = [f"{amount:.2f}" for amount in AMOUNTS.tolist()]
    forward = {f"image {row + 1}": mix(real[row], noise[row], AMOUNTS) for row in range(4)}
    caption = "The forward process: (1 - t) x0 + t n for four held-out images, under the amount of noise t."
    study.figure("forward", image_rows(forward, names), caption)

    with torch.no_grad():
        inputs = torch.cat([mix(real[row : row + 1], noise[row : row + 1], AMOUNTS[row]) for row in range(9)])
        outputs = module.denoiser(inputs / (1 - AMOUNTS)[:, None, None, None], flow_time_to_sigma(AMOUNTS))
    rows = {"image": real, "input": inputs, "output": outputs}
    caption = "What the denoiser is given, and what it makes of it in one call; it is not told the amount of noise t."
    study.figure("denoiser", image_rows(rows, names), caption)
    errors = (outputs - real).square().flatten(1).mean(1)

    recorder = StepRecorder(keep=8)
    module.generate(range(study.setup.seed, study.setup.seed + 8), sampling=module.sampling, callback=recorder)
    steps = len(recorder.x)
    visible = [x / (1 + sigma) for x, sigma in zip(recorder.x, recorder.sigmas, strict=True)]
    mixes = {}
    for step in range(steps):
        mixes[f"{step + 1}: mix"] = visible[step]
        mixes[f"{step + 1}: prediction"] = recorder.x0_hat[step]
    caption = f"The {steps} steps of eight samples: the mix that goes into the network, above the prediction it makes."
    study.figure("five_steps", image_rows(mixes), caption)

    measured: list[dict[str, Any]] = []
    for count in num_steps:
        drawn = study.draw(trained, evaluator, module.sampling.replace(num_steps=count))
        measured.append({"steps": count, **evaluator.measure(drawn)})
        if count == module.sampling.num_steps:
            study.images("samples", drawn.images[:80], f"Samples in {count} steps.")
    study.table("quality", measured, f"{study.setup.num_samples:,} samples against the training images.")
    figure = lines(measured, "steps", {evaluator.metric: [evaluator.metric]}, evaluator, log=True)
    study.figure("quality", figure, "The Fréchet distance to the training images against the steps.")
    best = min(measured, key=lambda row: row[evaluator.metric])
    asked = next((row for row in measured if row["steps"] == module.sampling.num_steps), best)
    floor = "" if evaluator.floor is None else f" (real images get {evaluator.floor[0]:.3g})"
    study.finding(
        f"A network that is not told the noise draws with {evaluator.metric} {asked[evaluator.metric]:.3g} in "
        f"{asked['steps']} steps and at best {best[evaluator.metric]:.3g}, in {best['steps']}{floor}; its squared "
        f"error is {errors[0]:.2g} on a clean image and {errors[-1]:.2g} on pure noise."
    )


def mix(x0: Tensor, noise: Tensor, amount: Tensor) -> Tensor:
    """The linear mix of an image and noise.

    Args:
        x0: An image (C, H, W), or a batch of one.
        noise: Standard normal of the same shape.
        amount: t in [0, 1], shape () or (T,).

    Returns:
        (1 - t) x0 + t n, shape (T, C, H, W).
    """
    t = amount.reshape(-1, 1, 1, 1)
    return (1 - t) * x0 + t * noise


if __name__ == "__main__":
    main(toy_diffusion, "configs/studies/toy_diffusion.yaml")
