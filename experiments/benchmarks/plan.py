r"""Estimates of how long a recipe takes on given hardware.

    python -m experiments.benchmarks.plan --gpus 8 --config configs/edm_cifar10.yaml \
        --config configs/paper/edm_cifar10.yaml

The recipe's network is built from the config as `diffusion-lit fit` builds it, its operations are counted, and some
training steps of it are timed on this machine. For other hardware there is no measurement here: its peak is the
vendor's, and which share of it is reached, and how much is lost between several GPUs, are assumptions that are printed
beside the figure and can be given.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffusion_lit.callbacks.cost import network_cost
from diffusion_lit.checks import check_count, check_number
from diffusion_lit.commands.fit import CLI as LightningFit
from diffusion_lit.commands.fit import run
from diffusion_lit.modules.base import DiffusionModule
from diffusion_lit.report.facts import duration, magnitude
from diffusion_lit.runtime.hardware import bf16_pays, device_type, hardware, keep_freed_memory, use_threads
from diffusion_lit.words import article
from experiments.harness.command import command
from experiments.harness.show import markdown

PEAKS = {  # dense bf16 (fp16 where there is no bf16) tensor TFLOP/s with float32 sums, from the vendor's data sheets
    "T4": 65,
    "V100": 125,
    "L4": 121,
    "RTX3090": 71,
    "RTX4090": 165,
    "L40S": 362,
    "A100": 312,
    "H100": 989,
    "H200": 989,
}


class Built(LightningFit):
    """`diffusion-lit fit` up to the point where it would train."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Skips the training."""


@dataclass(frozen=True)
class Recipe:
    """The training that a config describes.

    Args:
        network: Name of the network.
        parameters: Its parameters.
        training: Operations of a training step per image.
        batch_size: Images per step of all devices.
        images: Images in all, None where the run has no end.
        state: Bytes of weights, gradients, optimizer and average.
        activations: Bytes that an image of the batch keeps.
    """

    network: str
    parameters: int
    training: int
    batch_size: int
    images: int | None
    state: int
    activations: int


@dataclass(frozen=True)
class Estimate:
    """Hours on some hardware.

    Args:
        hardware: Which.
        rate: Images per second.
        basis: How the rate was obtained.
    """

    hardware: str
    rate: float
    basis: str


def plan(
    config: list[str],
    gpus: int = 8,
    gpu: list[str] | None = None,
    share: float = 0.22,
    scaling: float = 0.9,
    steps: int = 3,
    batch: int = 8,
    accelerator: str = "auto",
    options: list[str] | None = None,
) -> list[Estimate]:
    """Estimates how long a recipe takes.

    Args:
        config: Configs as for `diffusion-lit fit`, the later override the earlier.
        gpus: Number of GPUs of the named hardware.
        gpu: Their kinds; all that are known when omitted.
        share: Share in (0, 1] of the vendor's peak that training is assumed to reach. The default is counted, not
            measured: in eager mode the paper's network moves 48 GB of memory a step beside 8.1 TFLOP, which leaves 22
            to 26% of an A100's or H100's peak; `make check-gpu` measures it.
        scaling: Share in (0, 1] of their sum that several GPUs are assumed to reach together.
        steps: Training steps that are timed on this machine; 0 for none.
        batch: Images in such a step.
        accelerator: auto, cpu or cuda: where they are timed.
        options: Further words of `diffusion-lit fit`'s command line.

    Returns:
        The estimates, this machine's first.

    Raises:
        ValueError: If there is no such GPU in the table, or a number is out of range.
    """
    kinds = gpu or list(PEAKS)
    for kind in kinds:
        if kind not in PEAKS:
            raise ValueError(f"There is no GPU {kind!r} in the table; choose of {', '.join(PEAKS)}.")
    check_number(above=0, most=1, share=share, scaling=scaling)
    check_count(gpus=gpus, batch=batch)
    check_count(0, steps=steps)
    built = run(["fit", *[f"--config={path}" for path in config], *(options or []), "--trainer.logger=false"], Built)
    recipe = read(built)
    estimates = []
    if steps:
        estimates.append(timed(built.model, recipe, device_type(accelerator), steps, batch))
    together = 1.0 if gpus == 1 else scaling
    for kind in kinds:
        rate = gpus * together * share * PEAKS[kind] * 1e12 / recipe.training
        estimates.append(
            Estimate(
                f"{gpus} x {kind}",
                rate,
                f"assumed: {share:.0%} of the vendor's {PEAKS[kind]} TFLOP/s"
                + (f", {scaling:.0%} of it by {gpus} together" if gpus > 1 else ""),
            )
        )
    print(text(recipe, estimates, gpus))
    return estimates


def read(built: Any) -> Recipe:
    """The training that a config describes.

    Args:
        built: `diffusion-lit fit`, with the model, the data and the trainer made.

    Raises:
        ValueError: If the model is not one that denoises.
    """
    module, data, trainer = built.model, built.datamodule, built.trainer
    if not isinstance(module, DiffusionModule):
        raise ValueError(f"A plan is made for models that denoise, and this config trains {article(module)}.")
    cost = network_cost(module.net, module.x_shape)
    images = None
    if trainer.max_steps > 0:
        images = trainer.max_steps * data.batch_size * trainer.accumulate_grad_batches
    return Recipe(
        type(module.net).__name__,
        cost.parameters,
        cost.training,
        data.batch_size,
        images,
        5 * 4 * cost.parameters,  # weights, gradients, Adam's two moments and an average
        cost.activations,
    )


def timed(module: Any, recipe: Recipe, device: str, steps: int, batch: int) -> Estimate:
    """Training steps of the recipe's network on this machine.

    Returns:
        The rate of the median step.
    """
    use_threads()
    module = module.to(device).train()
    optimizer = torch.optim.AdamW(module.denoiser.parameters(), fused=device in ("cpu", "cuda"))
    x0 = torch.rand(batch, *module.x_shape, device=device) * 2 - 1
    half = bf16_pays(device)
    seconds = []
    for step in range(steps + 1):
        start = time.perf_counter()
        draws = module.draw(None, x0.shape, "plan", step)
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = module.loss(module.denoiser, x0, draws.sigma, draws.noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    rate = batch / statistics.median(seconds[1:])
    machine = hardware(torch.device(device), 1)
    reached = rate * recipe.training / 1e9
    return Estimate(
        f"{machine['processor']}, {machine['threads']} threads" if device == "cpu" else machine["processor"],
        rate,
        f"measured now: {steps} steps of {batch} in {'bf16' if half else 'float32'}, {reached:,.0f} GFLOP/s",
    )


def text(recipe: Recipe, estimates: Sequence[Estimate], gpus: int) -> str:
    """The plan as text.

    Args:
        recipe: What is trained.
        estimates: How long it takes.
        gpus: Number of GPUs that share a batch.
    """
    per_gpu = -(-recipe.batch_size // gpus)
    memory = (recipe.state + per_gpu * recipe.activations) / 2**30
    count = "no end of its own" if recipe.images is None else f"{magnitude(recipe.images)} images"
    rows = [
        {
            "hardware": one.hardware,
            "images/s": f"{one.rate:,.4g}",
            "whole run": "" if recipe.images is None else duration(recipe.images / one.rate),
            "basis": one.basis,
        }
        for one in estimates
    ]
    return (
        f"{recipe.network} of {magnitude(recipe.parameters)} parameters, {recipe.training / 1e9:.3g} GFLOP per image "
        f"of a training step; batches of {recipe.batch_size}, {count}.\n"
        f"Memory of each of {gpus} GPUs with {per_gpu} images, in float32: about {memory:.1f} GiB.\n\n"
        f"{markdown(rows)}"
    )


if __name__ == "__main__":
    keep_freed_memory()
    command(plan)
