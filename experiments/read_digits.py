"""Can the digits that a model draws be read, and are they as varied as real ones?

Draws the same number of each class without guidance and asks a support vector machine, trained on the real training
digits, what it reads. Variety is the recall of Kynkäänniemi 2019 (arXiv 1904.06991) on raw pixels: the share of
held-out digits that lie among the samples, beside the share that lie among as many training digits.

    python -m experiments.read_digits --ckpt_path runs/edm_digits
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.svm import SVC
from torch_fidelity.metric_prc import prc_features_to_metric

from datamodules import Digits
from datamodules.loaders import Array
from diffusion_lit.diffusion.images import to_uint8
from diffusion_lit.modules.load import load_module
from diffusion_lit.report.images import titled_grid
from diffusion_lit.runtime.hardware import hardware
from diffusion_lit.runtime.versions import versions
from diffusion_lit.storage.hashing import file_record
from diffusion_lit.storage.runs import find_checkpoint
from experiments.harness.command import command
from experiments.harness.show import keep_json


def read_digits(
    ckpt_path: str,
    per_class: int = 100,
    seed: int = 0,
    num_steps: int | None = None,
    out: str = "runs/studies/read_digits",
) -> dict[str, float]:
    """Draws digits, reads them, and measures their variety.

    Args:
        ckpt_path: Checkpoint of a class-conditional model of `datamodules.Digits`, or the folder of its runs.
        per_class: Samples per class.
        seed: Seed of the first sample.
        num_steps: Sampling steps; those of the model by default.
        out: Folder for grid.png and figures.json, which also holds what they depend on.

    Returns:
        The figures that it prints.
    """
    path = find_checkpoint(ckpt_path)
    module: Any = load_module(path)
    data = Digits(batch_size=1)
    data.prepare_data()
    data.setup()
    labels = torch.arange(10).repeat_interleave(per_class)
    sampling = module.sampling.replace(cfg_scale=1.0, num_steps=num_steps)
    samples = torch.cat(
        [
            module.generate(range(seed + start, seed + start + per_class), labels[start : start + per_class], sampling)
            for start in range(0, len(labels), per_class)
        ]
    )
    real, names = flat(data.reference_images("train")), np.asarray(data.reference_labels("train"))
    held_out, held_out_names = flat(data.reference_images("val")), np.asarray(data.reference_labels("val"))
    reader = SVC(gamma=0.001 * (16 / 255) ** 2).fit(real, names)
    drawn = flat(to_uint8(samples))
    figures = {
        "read as intended": float(reader.score(drawn, labels.numpy())),
        "held-out digits read": float(reader.score(held_out, held_out_names)),
        **variety(drawn, held_out, real),
    }
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [samples[start : start + min(per_class, 20)] for start in range(0, 10 * per_class, per_class)]
    titled_grid([list(row) for row in rows], [str(digit) for digit in range(10)]).save(folder / "grid.png")
    record = {
        "checkpoint": file_record(path),
        "samples": {"per_class": per_class, "seeds": [seed, seed + 10 * per_class - 1], "sampling": sampling.record()},
        "versions": versions(),
        "hardware": hardware(torch.device("cpu"), 1),
    }
    keep_json(folder / "figures.json", figures | record)
    for name, value in figures.items():
        print(f"{name:<46}{value:.3f}")
    return figures


def flat(images: Array) -> np.ndarray:
    """Images (N, C, H, W) as float rows (N, C*H*W) in 0 to 255."""
    return np.asarray(images).reshape(len(images), -1).astype(np.float64)


def variety(samples: np.ndarray, held_out: np.ndarray, train: np.ndarray) -> dict[str, float]:
    """Precision and recall against held-out digits, of the samples and of as many training digits."""
    figures = {}
    for name, rows in (("samples", samples), ("training digits", train[: len(samples)])):
        features = torch.from_numpy(rows), torch.from_numpy(held_out)
        found = prc_features_to_metric(*features, prc_neighborhood=3, prc_batch_size=1000, verbose=False)
        figures[f"precision of {name}"] = float(found["precision"])
        figures[f"recall by {name}"] = float(found["recall"])
    return figures


if __name__ == "__main__":
    command(read_digits)
