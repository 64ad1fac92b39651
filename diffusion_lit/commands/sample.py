"""`diffusion-lit sample`: images from a checkpoint, which is all that it needs, or from a pretrained model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from lightning.fabric import Fabric
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffusion_lit.checks import check_count, check_number
from diffusion_lit.commands.options import StepsOptions
from diffusion_lit.diffusion.grids import evenly
from diffusion_lit.diffusion.images import to_uint8
from diffusion_lit.diffusion.models import PixelModel
from diffusion_lit.diffusion.samplers import sampler_table
from diffusion_lit.modules.given import as_given
from diffusion_lit.modules.labels import check_guidance, parse_labels
from diffusion_lit.modules.load import give_held_out
from diffusion_lit.modules.protocols import Model, Settings
from diffusion_lit.report.given import given_sheet
from diffusion_lit.report.images import StepRecorder, save_gif, titled_grid
from diffusion_lit.runtime.hardware import pick_device
from diffusion_lit.runtime.ranks import fabric, several
from diffusion_lit.storage.room import try_folder
from diffusion_lit.storage.sample_archive import SampleArchive
from diffusion_lit.words import article, counted

PREVIEW_SIDE = 2048  # approximate side of the grid in pixels
SHOWN = 10  # samples of given.png
RECORDED = 16  # samples whose steps are kept for --trajectory


def sample(
    options: StepsOptions,
    stage_2: str | None = None,
    stage_2_options: dict[str, int | float | str | bool | dict[str, float | str | bool]] | None = None,
    num_samples: int = 64,
    batch_size: int = 64,
    out: str = "runs/samples",
    trajectory: bool = False,
    scale: int | None = None,
    size: str | None = None,
    compile: bool = False,
    devices: int = 1,
    strategy: str = "auto",
) -> None:
    """Draws images from a checkpoint, or from a pretrained model of diffusers.

    Writes OUT/samples.npz (`arr_0`: uint8 images N x H x W x C, and `labels`), batch by batch, and OUT/grid.png with
    the first ones. With --trajectory it adds OUT/trajectory.gif (up to 16 samples, evenly spread over the first batch),
    OUT/trajectory.png (4 of them) and a GIF of each by its number, OUT/trajectory_0.gif, ... Sample i has the seed
    SEED + i and is the same image whatever the batch size and the number of devices. What is not given is as the model
    was trained to be sampled (a pretrained one as its own pipeline samples, which may take 1,000 steps). The average
    (EMA) weights are used.
    With several --num_steps the samples by each lie in OUT/steps_10, OUT/steps_20, ..., and OUT/table.png has the first
    one of each prompt or class in a row, a column per number of steps.
    A model that is given an image is given those of its data's test split, degraded or as they are paired: the sample
    of seed s is given image s. OUT/given.png shows what it was given, the sample, and the image itself.

    Args:
        options: Model, condition and sampling. Without --labels or --prompt, a model with classes or of texts draws
            unconditionally, through its null class or prompt. Each prompt gets as many images.
        stage_2: Name or folder of an upsampler, such as DeepFloyd/IF-II-M-v1.0, that makes the images large.
        stage_2_options: Its settings, as JSON: '{"num_steps": 30, "cfg_scale": 6, "noise_level": 250}'.
        num_samples: Number of images.
        batch_size: Images drawn at a time; does not change them.
        out: Folder for the results.
        trajectory: Also draws how the first images came to be.
        scale: Whole factor by which the GIFs of one sample enlarge pixels; by default small images grow to about 256
            pixels a side.
        size: Height and width of the images, such as 128x192, instead of those that the model was trained on; both
            must divide by the network's factor. Far from the trained size images repeat their parts.
        compile: Compiles the network first, on CUDA into CUDA graphs, which pays from some hundred images on.
        devices: Number of processes, one per device, that share the work.
        strategy: How they are started: `ddp`, or `ddp_fork` within another Python program.

    Raises:
        ValueError: If the model cannot be used or an option does not fit it.
    """
    check_count(devices=devices, num_samples=num_samples, batch_size=batch_size)
    check_number(least=1, most=64, whole=True, scale=scale)
    if scale is not None and not trajectory:
        raise ValueError(
            f"--scale {scale} enlarges the GIFs of --trajectory, which was not given; add it, or leave --scale out."
        )
    try_folder(Path(out))
    module = options.load_model(stage_2=stage_2, stage_2_options=stage_2_options)
    if size is not None:
        take_size(module, size)
    give_held_out(module, options.ckpt_path, options.data_root)
    prompts = options.prompts
    if num_samples < len(prompts):
        raise ValueError(
            f"num_samples is {num_samples} for {counted(len(prompts), 'prompt')}; draw at least one image for each."
        )
    settings = options.settings(module.sampling)
    given = "all" if prompts else options.labels
    classes = parse_labels(given, num_samples, module.num_classes, module.class_names)
    check_guidance(module, settings[0], classes is not None, **options.guidance)
    if compile:  # the network takes 99.5% of a step; its output is consumed before the graph runs again
        module.net.compile(mode="reduce-overhead", dynamic=False)
    jobs = [
        SampleJob(
            *(module, setting, classes, num_samples, options.seed, batch_size, trajectory),
            Path(out) / (f"steps_{setting.num_steps}" if len(settings) > 1 else ""),
            scale,
        )
        for setting in settings
    ]
    if several(devices):
        fabric(devices, options.device, strategy).launch(lambda ranks: draw_all(jobs, Path(out), ranks))
    else:
        module.to(pick_device(options.device))
        draw_all(jobs, Path(out))


def take_size(module: Model, size: str) -> None:
    """Lets a model draw images of another size.

    Args:
        module: The model.
        size: Height and width, such as `128x192`.

    Raises:
        ValueError: If it is none, or the model draws but one size.
    """
    sides = size.lower().split("x")
    if len(sides) != 2 or not all(side.isascii() and side.isdigit() for side in sides):
        raise ValueError(f"--size is {size!r}; give height and width, such as 128x192.")
    if not isinstance(module, PixelModel):
        raise ValueError(f"--size is {size}, but {article(module)} draws one size alone; leave it out.")
    if as_given(module) is not None:
        raise ValueError(f"--size is {size}, but the model draws images as large as those it is given; leave it out.")
    module.draw_size(int(sides[0]), int(sides[1]))


def draw_all(jobs: "Sequence[SampleJob]", folder: Path, ranks: Fabric | None = None) -> None:
    """Does jobs one after another, and shows those of several numbers of steps side by side.

    Args:
        jobs: The jobs, of the same samples.
        folder: Where the table is written.
        ranks: The processes that share the work.
    """
    previews = [job.run(ranks) for job in jobs]
    table = folder / "table.png"
    if ranks is None or ranks.is_global_zero:
        table.unlink(missing_ok=True)
    shown = [preview for preview in previews if preview is not None]
    if len(shown) > 1:
        names, first = shown[0].examples(jobs[0].seed)
        rows = [[preview.samples[index] for preview in shown] for index in first]
        titled_grid(rows, names, [f"{job.settings.num_steps} steps" for job in jobs]).save(table)
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

    def run(self, ranks: Fabric | None = None) -> "Preview | None":
        """Draws all samples, each batch written as it comes; on rank 0 alone where there are several.

        Args:
            ranks: The processes that share the work, which draw batches in turn: who draws a sample is all the same.

        Returns:
            Some of the samples; nothing on other ranks than 0.
        """
        if ranks is not None:
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

    def recorded(self, ranks: Fabric | None) -> list[int]:
        """The samples of the first batch whose steps are kept, evenly spread, so that they are of several classes."""
        size = self._batch(ranks)
        return evenly(0, size - 1, min(RECORDED, size))

    def _batch(self, ranks: Fabric | None) -> int:
        return min(self.batch_size, -(-self.count // (1 if ranks is None else ranks.world_size)))

    def batches(
        self, ranks: Fabric | None = None, recorder: StepRecorder | None = None
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Draws batch after batch, in the order of the samples.

        Args:
            ranks: The processes, each of which draws a batch in each round and sees those of all.
            recorder: Keeps the steps of the first samples.

        Yields:
            Index of the first sample, samples (B, C, H, W) in [-1, 1] on the CPU, and the same in uint8.

        Raises:
            ValueError: On all ranks, if a value is not finite.
        """
        world, rank = (1, 0) if ranks is None else (ranks.world_size, ranks.global_rank)
        size = self._batch(ranks)
        for start in tqdm(range(0, self.count, size * world), desc="sampling", unit="batch", disable=rank > 0):
            first = min(start + rank * size, self.count)
            rows = range(first, min(first + size, self.count))
            drawn = self.draw(rows, recorder if first == 0 else None) if rows else None
            if ranks is not None:
                whole = torch.zeros(size, *self.module.image_shape, device=ranks.device)
                if drawn is not None:
                    whole[: len(rows)] = drawn.to(whole)
                drawn = cast(Tensor, ranks.all_gather(whole)).flatten(0, -4)[: self.count - start]
            assert drawn is not None
            yield start, drawn.cpu(), to_uint8(drawn)

    def draw(self, rows: range, recorder: StepRecorder | None) -> Tensor:
        """Draws one batch.

        Args:
            rows: The samples' indices.
            recorder: Keeps their steps.

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
            save_gif(recorder.frames(columns=4), self.folder / "trajectory.gif")
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
        calls = "as many denoiser calls as each needs" if nfe is None else f"{nfe} denoiser calls each"
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

    def examples(self, seed: int, most: int = 8) -> tuple[list[str], list[int]]:
        """One sample of each class with the classes' names, or the first samples without classes.

        Args:
            seed: Seed of sample 0.
            most: At most so many where there are no classes.

        Returns:
            Names, and the samples' indices.
        """
        if self.names:
            named = [(name, row[0]) for name, row in zip(self.names, self.rows, strict=True) if name]
            return [name for name, _ in named], [index for _, index in named]
        first = sorted(self.wanted)[:most]
        return [f"seed {seed + index}" for index in first], first

    def image(self) -> Image.Image:
        """The grid, the classes' names beside their rows."""
        return titled_grid([[self.samples[index] for index in row] for row in self.rows], self.names)


def help_notes() -> str:
    """The notes below the help: the table of samplers."""
    return sampler_table()
