"""Bits per dimension of test images, computed by all ranks and resumed after a restart."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion_lit.diffusion.generate import check_follows_ode
from diffusion_lit.diffusion.likelihood import Likelihood
from diffusion_lit.diffusion.models import PixelModel
from diffusion_lit.diffusion.rng import SeededNoise
from diffusion_lit.diffusion.wrappers import Conditioned
from diffusion_lit.evaluation.measure import Evaluation
from diffusion_lit.evaluation.metrics import check_figures, mean_and_deviation
from diffusion_lit.modules.protocols import ImageSource, Model
from diffusion_lit.storage.hashing import key_of
from diffusion_lit.storage.tensors import read_tensors, write_tensors
from diffusion_lit.words import article

SPLIT = "test"
CHUNK = 50


def _solver(module: PixelModel) -> Likelihood:
    """The solver of the integral over the model's noise levels."""
    low, high = module.denoiser.scaling.sampling_range
    prior = (1 + high**2) ** 0.5 if module.denoiser.scaling.variance_preserving else None
    return Likelihood(sigma_min=float(low), sigma_max=float(high), prior_std=prior)


def _record(evaluation: Evaluation) -> dict[str, Any]:
    """All that determines the figure."""
    module = check_likelihood(evaluation.module)
    return {
        "checkpoint": evaluation.plan.model_hash(module),
        "split": SPLIT,
        "fingerprint": evaluation.data.fingerprint(SPLIT),
        "labels": "each image's own class" if module.num_classes else "none",
        "solver": {**vars(_solver(module)), "trace": "Hutchinson, one draw of signs"},
        "seed": evaluation.plan.seed,
    }


def _parts(evaluation: Evaluation, record: dict[str, Any]) -> list[tuple[range, Path, dict[str, Any]]]:
    """The rows of each part, its file, and all that determines it."""
    plan = evaluation.plan
    folder = Path(plan.folder) / f"likelihood_{key_of(record)[:16]}"
    count = min(plan.likelihood_images, len(evaluation.data.reference_images(SPLIT)))
    found = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    return [
        (rows, folder / f"part_{rows.start:08d}.safetensors", {**record, "start": rows.start, "stop": rows.stop})
        for rows in found
    ]


def check_likelihood(module: Model) -> PixelModel:
    """Refuses a model that gives images no likelihood.

    Args:
        module: The model.

    Returns:
        The model.

    Raises:
        ValueError: If it does not denoise images themselves, is given an image of each, or follows no ODE.
    """
    if not isinstance(module, PixelModel):
        raise ValueError(f"The model is {article(module)}, which denoises nothing and gives no likelihood.")
    if module.image_shape != module.x_shape:
        raise ValueError("The model denoises a code and not images, so that it gives them no likelihood.")
    if module.condition is not None:
        raise ValueError("--likelihood is that of images alone, but the model is given an image of each; leave it out.")
    check_follows_ode(module.sampling, "it gives no likelihood")
    return module


def check_test_images(data: ImageSource) -> None:
    """Refuses data without an image to take the likelihood of.

    Raises:
        ValueError: If the test split is empty.
    """
    if len(data.reference_images(SPLIT)) == 0:
        raise ValueError(
            f"--likelihood is that of the images of {SPLIT}, and the data has none; leave it out, or train with a "
            "test_fraction above 0."
        )


def likelihood_shards(evaluation: Evaluation, rank: int, world: int) -> None:
    """Computes this rank's parts; existing ones are reused.

    Args:
        evaluation: The evaluation.
        rank: This process.
        world: Number of processes.

    Raises:
        ValueError: As `check_likelihood`.
    """
    module, data, device = check_likelihood(evaluation.module), evaluation.data, evaluation.device
    images, labels = data.reference_images(SPLIT), data.reference_labels(SPLIT)
    mine = _parts(evaluation, _record(evaluation))[rank::world]
    for rows, path, record in tqdm(mine, desc="likelihood", unit=f"{CHUNK} images", disable=rank > 0):
        if read_tensors(path, record) is None:
            batch = torch.as_tensor(images[rows.start : rows.stop]).to(device)
            label = None
            if module.num_classes and labels is not None:
                label = labels[rows.start : rows.stop].to(device)
            noise = SeededNoise([evaluation.plan.seed + index for index in rows])
            bits = _solver(module).bits_per_dim(Conditioned(module.denoiser, label), batch, noise=noise)
            write_tensors(path, {"bits": bits.double()}, record)


def gather_bits(evaluation: Evaluation) -> dict[str, Any]:
    """Joins the parts of all ranks.

    Returns:
        Mean and standard error (None for one image) of the bits per dimension with their record.

    Raises:
        ValueError: If a part is missing.
    """
    whole = _record(evaluation)
    found: list[Tensor] = []
    for _, path, record in _parts(evaluation, whole):
        part = read_tensors(path, record)
        if part is None:
            raise ValueError(
                f"A part of the likelihood is missing under {evaluation.plan.folder}; run the same command again."
            )
        found.append(part["bits"])
    bits = torch.cat(found)
    mean, deviation = mean_and_deviation(bits.tolist())
    check_figures({"bits_per_dim": mean})
    return {
        "bits_per_dim": mean,
        "standard_error": None if deviation is None else deviation / len(bits) ** 0.5,
        "count": len(bits),
        **whole,
    }
