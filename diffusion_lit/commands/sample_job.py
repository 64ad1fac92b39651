"""The samples of one setting: drawn batch after batch, written as they come, and shown on grids."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from lightning.fabric import Fabric
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffusion_lit.diffusion.grids import evenly
from diffusion_lit.diffusion.images import to_uint8
from diffusion_lit.modules.given import as_given
from diffusion_lit.modules.protocols import Model, Settings
from diffusion_lit.report.given import given_sheet
from diffusion_lit.report.images import StepRecorder, gif_bytes, titled_grid
from diffusion_lit.storage.sample_archive import SampleArchive
from diffusion_lit.words import counted

PREVIEW_SIDE = 2048  # approximate side of the grid in pixels
SHOWN = 10  # samples of given.png
RECORDED = 16  # samples whose steps are kept for --trajectory


def draw_all(jobs: "Sequence[SampleJob]", folder: Path, ranks: Fabric) -> None:
    """Does jobs one after another, and shows those of several numbers of steps side by side.

    Args:
        jobs: The jobs, of the same samples.
        folder: Where the table is written.
        ranks: The processes that share the work.
    """
    previews = [job.run(ranks) for job in jobs]
    table = folder / "table.png"
    if ranks.is_global_zero:
        table.unlink(missing_ok=True)
    shown = [preview for preview in previews if preview is not None]
    if len(shown) > 1:
        names, first = shown[0].examples(jobs[0].seed)
        rows = [[preview.samples[index] for preview in shown] for index in first]
        titled_grid(rows, names, [counted(job.settings.num_steps or 0, "step") for job in jobs]).save(table)
        print(f"The same samples by each number of steps, side by side: {table}")


@dataclass(frozen=True)
class SampleJob:
    """The samples to draw, and the folder to write them to.

    Args:
        module: The model.
        settings: How.
        classes: Class of each sample, or None.
        count: Number of samples.
        seed: Seed of sample 0.
        batch_size: Samples drawn at a time.
        trajectory: Whether the steps of the first samples are kept.
        folder: Where to.
        scale: Factor by which the GIFs of one sample enlarge pixels.
    """

    module: Model
    settings: Settings
    classes: Tensor | None
    count: int
    seed: int
    batch_size: int
    trajectory: bool
    folder: Path
    scale: int | None = None

    def run(self, ranks: Fabric) -> "Preview | None":
        """Draws all samples, each batch written as it comes, by rank 0.

        Args:
            ranks: The processes that share the work; they draw batches in turn, whichever draws which sample.

        Returns:
            Some of the samples; nothing on other ranks than 0.
        """
        self.module.to(ranks.device)
        if not ranks.is_global_zero:
            for _ in self.batches(ranks):
                pass
            return None
        channels, height, width = self.module.image_shape
        labels = None if self.classes is None else self.classes.numpy()
        recorder = StepRecorder(self.recorded(ranks)) if self.trajectory else None
        preview = Preview(self.classes, self.count, height, self.module.class_names)
        self.folder.mkdir(parents=True, exist_ok=True)
        archive = SampleArchive(self.folder / "samples.npz", (self.count, height, width, channels), labels)
        try:
            with archive:
                for start, images, pixels in self.batches(ranks, recorder):
                    archive.add(pixels.permute(0, 2, 3, 1).numpy())
                    preview.add(start, images)
        finally:
            if archive.partial is not None:
                print(f"{archive.rows} of {self.count} samples were drawn and are in {archive.partial}.")
        self.write(preview, recorder, self.recorded(ranks))
        return preview

    def recorded(self, ranks: Fabric) -> list[int]:
        """The samples of the first batch whose steps are kept, evenly spread, so that they are of several classes."""
        size = self._batch(ranks)
        return evenly(0, size - 1, min(RECORDED, size))

    def _batch(self, ranks: Fabric) -> int:
        return min(self.batch_size, -(-self.count // ranks.world_size))

    def batches(self, ranks: Fabric, recorder: StepRecorder | None = None) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Draws batch after batch, in the order of the samples.

        Args:
            ranks: The processes, each of which draws a batch in each round and sees those of all.
            recorder: Keeps the steps of the first samples.

        Yields:
            Index of the first sample, samples (B, C, H, W) in [-1, 1] on the CPU, and the same in uint8.

        Raises:
            ValueError: On all ranks, if a value is not finite.
        """
        world, rank = ranks.world_size, ranks.global_rank
        size = self._batch(ranks)
        for start in tqdm(range(0, self.count, size * world), desc="sampling", unit="batch", disable=rank > 0):
            first = min(start + rank * size, self.count)
            rows = range(first, min(first + size, self.count))
            whole = torch.zeros(size, *self.module.image_shape, device=ranks.device)
            if rows:
                whole[: len(rows)] = self.draw(rows, recorder if first == 0 else None)
            drawn = cast(Tensor, ranks.all_gather(whole)).flatten(0, -4)[: self.count - start]
            yield start, drawn.cpu(), to_uint8(drawn)

    def draw(self, rows: range, recorder: StepRecorder | None) -> Tensor:
        """Draws one batch.

        Returns:
            Samples (B, C, H, W) in [-1, 1].
        """
        seeds = range(self.seed + rows.start, self.seed + rows.stop)
        chosen = None if self.classes is None else self.classes[rows.start : rows.stop]
        return self.module.generate(seeds, chosen, self.settings, recorder)

    def write(self, preview: "Preview", recorder: StepRecorder | None, recorded: Sequence[int]) -> None:
        """Writes the images to look at, removes those of an earlier run, and prints where everything is.

        Args:
            preview: Some of the samples.
            recorder: How some of them came to be, or None.
            recorded: Their indices.
        """
        for name in ("trajectory.png", "trajectory.gif", "given.png", "samples.partial.npz"):
            (self.folder / name).unlink(missing_ok=True)
        for path in self.folder.glob("trajectory_*.gif"):
            path.unlink()
        preview.image().save(self.folder / "grid.png")
        if recorder is not None and recorder.x:
            recorder.strip(spread=True).save(self.folder / "trajectory.png")
            (self.folder / "trajectory.gif").write_bytes(gif_bytes(recorder.frames(columns=4)))
            for index, gif in zip(recorded, recorder.animations(self.scale), strict=True):
                (self.folder / f"trajectory_{index}.gif").write_bytes(gif)
        given = as_given(self.module)
        if given is not None:
            shown = sorted(preview.wanted)[:SHOWN]
            seeds = [self.seed + index for index in shown]
            sheet = given_sheet(given, seeds, torch.stack([preview.samples[index] for index in shown]))
            sheet.save(self.folder / "given.png")
            print(f"Each {given.told()}; {self.folder}/given.png shows some.")
        nfe = self.settings.nfe
        calls = "as many denoiser calls as each needs" if nfe is None else f"{counted(nfe, 'denoiser call')} each"
        some = "" if preview.shown == self.count else f" (with {preview.shown} of them)"
        verb = "is" if self.count == 1 else "are"
        print(f"{counted(self.count, 'sample')}, {calls}, {verb} in {self.folder}/: grid.png{some}, samples.npz")


class Preview:
    """As many of the samples as a grid can show; each class has rows of its own.

    Args:
        classes: Class of each sample, or None.
        count: Number of samples.
        side: Pixels of a sample's side.
        names: Names of the classes.
    """

    def __init__(self, classes: Tensor | None, count: int, side: int, names: Sequence[str]) -> None:
        tile = max(side, 64)
        columns, most = (max(1, min(limit, PREVIEW_SIDE // tile)) for limit in (10, 16))
        self.names: list[str] = []
        self.rows: list[range | list[int]] = []
        if classes is None:
            self.rows = [
                range(start, min(start + columns, count)) for start in range(0, min(count, columns * most), columns)
            ]
        else:
            kinds = list(dict.fromkeys(classes.tolist()))[:most]
            for kind in kinds:
                members = (classes == kind).nonzero()[: columns * (most // len(kinds)), 0].tolist()
                self.rows += [members[start : start + columns] for start in range(0, len(members), columns)]
                label = str(names[kind]) if kind < len(names) else str(kind)
                self.names += [label, *[""] * (len(self.rows) - len(self.names) - 1)]
        self.wanted = {index for row in self.rows for index in row}
        self.shown = len(self.wanted)
        self.samples: dict[int, Tensor] = {}

    def add(self, start: int, images: Tensor) -> None:
        """Keeps what is shown of a batch.

        Args:
            start: Index of its first sample.
            images: Samples (B, C, H, W) in [-1, 1].
        """
        for index, image in enumerate(images, start):
            if index in self.wanted:
                self.samples[index] = image.clone()

    def examples(self, seed: int) -> tuple[list[str], list[int]]:
        """One sample of each class with the classes' names, or the first 8 samples without classes.

        Args:
            seed: Seed of sample 0.

        Returns:
            Names, and the samples' indices.
        """
        if self.names:
            named = [(name, row[0]) for name, row in zip(self.names, self.rows, strict=True) if name]
            return [name for name, _ in named], [index for _, index in named]
        first = sorted(self.wanted)[:8]
        return [f"seed {seed + index}" for index in first], first

    def image(self) -> Image.Image:
        """The grid, the classes' names beside their rows."""
        return titled_grid([[self.samples[index] for index in row] for row in self.rows], self.names)
