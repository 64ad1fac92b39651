"""Images during training: a grid of samples, and the trajectory from noise to image.

Seeds and labels are fixed, so that the images of different epochs compare.
"""

from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor

from diffusion_lit.callbacks.intervals import ends
from diffusion_lit.callbacks.loggers import show_image
from diffusion_lit.checks import check_count, check_number
from diffusion_lit.modules.base import DiffusionModule
from diffusion_lit.modules.given import as_given
from diffusion_lit.modules.protocols import is_model
from diffusion_lit.report.given import given_sheet
from diffusion_lit.report.images import StepRecorder, gif_bytes, png_bytes, titled_grid
from diffusion_lit.runtime.ranks import rank_zero_alone, share_rows
from diffusion_lit.runtime.run_folder import WritesToRunFolder, run_folder

MOST = 1024  # images that a callback draws at once: more are a slip of the keyboard


class DrawingCallback(WritesToRunFolder):
    """Base of callbacks that draw images with fixed seeds after validation.

    Args:
        every: Draws at every n-th validation and at the end of the run; 0 for never.
        seed: Sample i has the seed `seed + i`.
    """

    def __init__(self, every: int = 1, seed: int = 0) -> None:
        check_count(0, every=every, seed=seed)
        self.every = every
        self.seed = seed
        self.validations = 0

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws at the interval, on all ranks, with the averaged weights."""
        if trainer.sanity_checking or not is_model(pl_module):
            return
        self.validations += 1
        ended = trainer.state.fn == "fit" and ends(trainer)
        if self.every and (self.validations % self.every == 0 or ended):
            self.show(trainer, cast(DiffusionModule, pl_module))

    def state_dict(self) -> dict[str, int]:
        """The number of validations seen, which a resumed run counts on from."""
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restores the count."""
        self.validations = state_dict["validations"]

    def show(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Draws and shows the samples; called on all ranks, which share the work."""
        raise NotImplementedError

    def samples(
        self, module: DiffusionModule, labels: Tensor | None, count: int, recorder: StepRecorder | None = None
    ) -> Tensor:
        """The first `count` samples, drawn by all ranks together.

        Args:
            module: The model.
            labels: Class of each, int64 (count,), or None.
            count: Number of samples.
            recorder: Keeps each step where given, of all samples.

        Returns:
            Samples (count, C, H, W) in [-1, 1] on the CPU.
        """

        def some(rows: range) -> Tensor:
            seeds = range(self.seed + rows.start, self.seed + rows.stop)
            chosen = None if labels is None else labels[rows.start : rows.stop]
            return module.generate(seeds, chosen, callback=recorder)

        if recorder is not None and module.sampling.nfe is None:  # each rank might take other steps
            drawn = rank_zero_alone(lambda: some(range(count)), "a trajectory")
            return torch.empty(0) if drawn is None else drawn
        drawn = share_rows(module, count, some)
        if recorder is not None:
            recorder.x = gather_steps(module, recorder.x, count)
            recorder.x0_hat = gather_steps(module, recorder.x0_hat, count)
        return drawn

    def write(self, trainer: Trainer, tag: str, name: str, image: Image.Image, gif: bytes | None = None) -> None:
        """Writes an image under the run's folder and shows it in the run's loggers, on rank 0.

        Args:
            trainer: The trainer.
            tag: The loggers' name of it.
            name: The file's name folder; the file is called by the training step.
            image: The image, or the frame that gives the size where `gif` is given.
            gif: The bytes of an animation, written in the image's stead.
        """
        if cast(Any, trainer).fast_dev_run or not trainer.is_global_zero:
            return
        encoded, ending = (gif, "gif") if gif is not None else (png_bytes(image), "png")
        try:
            folder = run_folder(trainer) / name
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"step_{trainer.global_step:07d}.{ending}"
            path.write_bytes(encoded)
            for logger in trainer.loggers:
                show_image(logger, tag, path, image.size, trainer.global_step)
        except OSError as error:
            rank_zero_warn(f"An image of {name} could not be written: {error}. Training goes on.")


class SampleGrid(DrawingCallback):
    """A grid of samples: one row per class where there are classes.

    Args:
        rows: Number of rows of an unconditional model's grid; a conditional one has a row per class, 10 at the most.
        columns: Number of columns.
        every: Draws at every n-th validation; 0 for never.
        seed: Seed of the first sample.
    """

    def __init__(self, rows: int = 8, columns: int = 8, every: int = 1, seed: int = 0) -> None:
        super().__init__(every, seed)
        check_count(rows=rows, columns=columns)
        check_size("sample_grid", rows, columns)
        self.rows = rows
        self.columns = columns

    def show(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Draws the grid."""
        rows = min(module.num_classes, 10) or self.rows
        labels = torch.arange(rows).repeat_interleave(self.columns) if module.num_classes else None
        samples = self.samples(module, labels, rows * self.columns)
        names = [str(name) for name in module.class_names[:rows]] if module.num_classes else []
        grid = titled_grid([list(row) for row in torch.split(samples, self.columns)], names)
        self.write(trainer, "samples", "samples", grid)
        given = as_given(module)
        if given is not None:
            first = samples[: self.columns]
            seeds = range(self.seed, self.seed + len(first))
            self.write(trainer, "given", "given", given_sheet(given, seeds, first))


class Trajectory(DrawingCallback):
    """The trajectory from noise to image: a strip of x above x0_hat, and an animation.

    Args:
        count: Number of samples in the strip; the animation shows 16.
        columns: Number of steps that the strip shows.
        every: Draws at every n-th validation; 0 for never.
        seed: Seed of the first sample.
    """

    def __init__(self, count: int = 4, columns: int = 10, every: int = 1, seed: int = 0) -> None:
        super().__init__(every, seed)
        named: dict[str, Any] = {"trajectory.count": count, "trajectory.columns": columns}
        check_number(least=1, most=MOST, whole=True, **named)
        self.count = count
        self.columns = columns

    def show(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Draws the strip and the animation, of a model that samples step by step."""
        count = max(self.count, 16)
        labels = torch.arange(count) % module.num_classes if module.num_classes else None
        recorder = StepRecorder(keep=count)
        self.samples(module, labels, count, recorder)
        if not recorder.x or not trainer.is_global_zero:
            return
        frames = recorder.frames(columns=4)
        self.write(trainer, "trajectory/animation", "trajectory", frames[-1], gif_bytes(frames))
        self.write(trainer, "trajectory/strip", "trajectory", recorder.strip(self.columns, self.count))


def check_size(name: str, rows: int, columns: int) -> None:
    """Refuses a grid of too many images."""
    if rows * columns > MOST:
        raise ValueError(
            f"{name} has {rows} rows of {columns} columns, which are too many; give at most {MOST:,} images in all."
        )


def gather_steps(module: LightningModule, steps: list[Tensor], count: int) -> list[Tensor]:
    """Gathers the recorded steps of all ranks. Called on all ranks.

    Args:
        module: What drew them.
        steps: This rank's, (B, C, H, W) for each step; none where the model draws in one go.
        count: Number of samples of all ranks.

    Returns:
        For each step (count, C, H, W).
    """
    if not steps:
        return []
    mine = torch.stack(steps, 1)
    return list(share_rows(module, count, lambda rows: mine).unbind(1))
