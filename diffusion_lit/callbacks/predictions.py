"""Writes the samples of `diffusion-lit predict`, in the format of `diffusion-lit sample`."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from diffusion_lit.diffusion.images import from_uint8, to_uint8
from diffusion_lit.report.images import grid_image
from diffusion_lit.runtime.run_folder import WritesToRunFolder, run_folder
from diffusion_lit.words import counted

GRID = 64  # images of the grid at most


class KeepPredictions(WritesToRunFolder):
    """Writes predicted images to samples.npz and the first ones to grid.png, in the order of the data.

    Each batch is written at once, so that memory does not grow with the data.
    """

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: dict[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes a batch of images."""
        if not isinstance(outputs, Tensor) or outputs.dim() != 4:
            return
        parts = run_folder(trainer) / ".parts"
        parts.mkdir(parents=True, exist_ok=True)
        arrays = {"images": to_uint8(outputs).permute(0, 2, 3, 1).cpu().numpy(), "index": batch["index"].cpu().numpy()}
        if "label" in batch:
            arrays["labels"] = batch["label"].cpu().numpy()
        with open(parts / f"{trainer.global_rank}_{batch_idx}.npz", "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clears what an interrupted command left."""
        if trainer.is_global_zero:
            shutil.rmtree(run_folder(trainer) / ".parts", ignore_errors=True)
        trainer.strategy.barrier()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the batches of all ranks together."""
        trainer.strategy.barrier()
        folder = run_folder(trainer)
        if trainer.is_global_zero and (folder / ".parts").is_dir():
            count = gather(folder)
            shutil.rmtree(folder / ".parts")
            print(f"{counted(count, 'sample', 'is', 'are')} in {folder}/: grid.png, samples.npz")


def gather(folder: Path) -> int:
    """Makes one file of the parts that all ranks wrote.

    Args:
        folder: Holds them in `.parts`.
    """
    parts = [dict(np.load(path, allow_pickle=False)) for path in sorted((folder / ".parts").glob("*.npz"))]
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(whole.pop("index"), kind="stable")
    images = whole.pop("images")[order]
    labels: dict[str, Any] = {name: value[order] for name, value in whole.items()}
    np.savez_compressed(folder / "samples.npz", arr_0=images, **labels)
    first = from_uint8(torch.from_numpy(images[:GRID]).permute(0, 3, 1, 2))
    grid_image(first, min(8, len(first))).save(folder / "grid.png")
    return len(images)
