"""`lightning sample`: pictures from a checkpoint, which is all that it needs, or from a pretrained model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor
from tqdm import tqdm

from diffusion_lit.checks import check_count
from diffusion_lit.diffusion.generate import Sampling
from diffusion_lit.diffusion.images import to_uint8
from diffusion_lit.diffusion.samplers import sampler_table
from diffusion_lit.modules.labels import parse_labels
from diffusion_lit.pretrained.load_model import load_model
from diffusion_lit.report.images import StepRecorder, grid_image, save_gif
from diffusion_lit.runtime.hardware import pick_device
from diffusion_lit.runtime.ranks import fabric, meet, several


def sample(
    ckpt_path: str | None = None,
    pretrained: str | None = None,
    prompt: list[str] | None = None,
    negative_prompt: str = "",
    stage_2: str | None = None,
    stage_2_options: dict[str, int | float | str | bool | dict[str, float | str | bool]] | None = None,
    num_samples: int = 64,
    labels: str | None = None,
    cfg_scale: float | None = None,
    sampler: str | None = None,
    num_steps: int | None = None,
    grid: str | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    clip_x0: str | None = None,
    sampler_options: dict[str, float | str | bool] | None = None,
    grid_options: dict[str, float | str | bool] | None = None,
    guidance_interval: tuple[float, float] | None = None,
    guidance_rescale: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
    out: str = "out",
    trajectory: bool = False,
    compile: bool = False,
    device: str = "auto",
    devices: int = 1,
    strategy: str = "auto",
) -> None:
    """Draws pictures from a checkpoint, or from a pretrained model of diffusers.

    Writes OUT/grid.png and OUT/samples.npz (`arr_0`: uint8 pictures N x H x W x C, and `labels`), and with --trajectory
    OUT/trajectory.png and OUT/trajectory.gif. Sample i has the seed SEED + i and is the same picture whatever the batch
    size and the number of devices. What is not given is as the model was trained to be sampled (a pretrained one as its
    own pipeline samples, which may take 1,000 steps). The average (EMA) weights are used.

    Args:
        ckpt_path: Checkpoint file, such as runs/edm_digits/version_0/checkpoints/last.ckpt, or a folder of `lightning
            export`.
        pretrained: A model of diffusers instead, in safetensors: its name on the Hugging Face hub, such as
            google/ddpm-cifar10-32 or DeepFloyd/IF-I-M-v1.0, or its folder. Needs the extra `pretrained`.
        prompt: What a text model shall show: --prompt "a rocket ship"; again for more, each of which gets as many
            pictures. Without it, it draws for its null prompt.
        negative_prompt: The null prompt of a text model, which guidance leads away from.
        stage_2: Name or folder of an upsampler, such as DeepFloyd/IF-II-M-v1.0, that makes the pictures large.
        stage_2_options: Its settings, as JSON: '{"num_steps": 30, "cfg_scale": 6, "noise_level": 250}'.
        num_samples: Number of pictures.
        labels: Classes to draw: `all` (a row of the grid per class), or a list such as 3,3,7 that is repeated until
            there are enough. Without it, a model with classes draws unconditionally, through its null class.
        cfg_scale: Guidance, uncond + cfg_scale * (cond - uncond): 1 is the plain conditional model, 0 the
            unconditional one.
        sampler: Name of the sampler; the table below lists them.
        num_steps: Number of sampling steps.
        grid: Noise levels of the steps: karras, exponential, log_snr, uniform_t, leading, linspace or trailing.
        sigma_min: Smallest noise level of the grid above 0.
        sigma_max: Largest noise level of the grid.
        clip_x0: Threshold on predicted pictures: none, static or dynamic.
        sampler_options: Options of the sampler, as JSON: '{"S_churn": 40}'.
        grid_options: Options of the grid, as JSON: '{"rho": 7}'.
        guidance_interval: Noise levels within which guidance acts, as JSON: '[0.3, 5]'.
        guidance_rescale: Share in [0, 1] of the rescaling of guided predictions.
        seed: Seed of the first sample.
        batch_size: Pictures drawn at a time; does not change them.
        out: Folder for the results.
        trajectory: Also draws how the first pictures came to be.
        compile: Compiles the network first, on CUDA into CUDA graphs, which pays from some hundred pictures on.
        device: `auto` (an accelerator where there is one), `cpu`, `cuda`, `cuda:1`, ...
        devices: Number of processes, one per device, that share the work.
        strategy: How they are started: `ddp`, or `ddp_fork` within another Python program.

    Raises:
        ValueError: If the model cannot be used or an option does not fit it.
    """
    check_count(devices=devices, num_samples=num_samples, batch_size=batch_size)
    given = {"negative_prompt": negative_prompt, "stage_2": stage_2, "stage_2_options": stage_2_options}
    module = load_model(ckpt_path, pretrained, prompt or (), **given)
    if labels is not None and getattr(module, "prompts", None) is not None:
        raise ValueError(
            f"--labels {labels} was given, but {pretrained} reads texts and has no classes; say what it shall show by "
            "--prompt."
        )
    if prompt and num_samples < len(prompt):
        raise ValueError(f"num_samples is {num_samples} for {len(prompt)} prompts; draw at least one picture for each.")
    labels = "all" if prompt else labels
    settings: Sampling = module.sampling.but(
        cfg_scale=cfg_scale,
        sampler=sampler,
        num_steps=num_steps,
        grid=grid,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        clip_x0=clip_x0,
        sampler_options=sampler_options,
        grid_options=grid_options,
        guidance_interval=guidance_interval,
        guidance_rescale=guidance_rescale,
    )
    classes = parse_labels(labels, num_samples, module.num_classes)
    if compile:  # a step is the network but for half a percent; its output is used up before the graph runs again
        module.net.compile(mode="reduce-overhead", dynamic=False)
    job = Job(module, settings, classes, num_samples, seed, batch_size, trajectory)
    columns = -(-num_samples // module.num_classes) if labels == "all" else min(10, num_samples)
    finish = partial(write, classes=classes, columns=columns, folder=Path(out), nfe=settings.nfe)
    if several(devices):
        fabric(devices, device, strategy).launch(partial(draw_shared, job=job, finish=finish))
    else:
        module.to(pick_device(device))
        finish(job.draw(range(num_samples)))


class Drawn(NamedTuple):
    """Samples (N, C, H, W) in [-1, 1] on the CPU, and how the first ones came to be."""

    samples: Tensor
    recorder: StepRecorder | None


@dataclass(frozen=True)
class Job:
    """What is to be drawn.

    Args:
        module: The model.
        settings: How.
        classes: Class of each sample, or None.
        count: Number of samples.
        seed: Seed of sample 0.
        batch_size: Samples drawn at a time.
        trajectory: Whether the steps of the first samples are kept.
    """

    module: Any
    settings: Sampling
    classes: Tensor | None
    count: int
    seed: int
    batch_size: int
    trajectory: bool

    def draw(self, rows: range) -> Drawn:
        """Draws some of the samples.

        Args:
            rows: Which, without gaps.

        Returns:
            Them, and the steps of the first ones where row 0 is among them.
        """
        first = self.trajectory and rows.start == 0
        recorder = StepRecorder(keep=min(16, self.count)) if first else None
        batches: list[Tensor] = []
        starts = range(rows.start, rows.stop, self.batch_size)
        for start in tqdm(starts, desc="sampling", unit="batch", disable=rows.start > 0):
            batch = range(start, min(start + self.batch_size, rows.stop))
            seeds = range(self.seed + batch.start, self.seed + batch.stop)
            chosen = None if self.classes is None else self.classes[batch.start : batch.stop]
            watch = recorder if start == 0 else None
            batches.append(self.module.generate(seeds, chosen, self.settings, watch).cpu())
        return Drawn(torch.cat(batches) if batches else torch.empty(0, *self.module.image_shape), recorder)


def draw_shared(ranks: Fabric, job: Job, finish: Callable[[Drawn], None]) -> None:
    """Draws this rank's part of the samples: sample i is a function of its seed, so that who draws it is all the same.

    Args:
        ranks: The processes.
        job: What to draw.
        finish: What rank 0 does with all samples.
    """
    world, rank, shape = ranks.world_size, ranks.global_rank, job.module.image_shape
    job.module.to(ranks.device)
    share = -(-job.count // world)
    mine = job.draw(range(min(rank * share, job.count), min((rank + 1) * share, job.count)))
    padded = torch.zeros(share, *shape, device=ranks.device)
    padded[: len(mine.samples)] = mine.samples.to(padded)
    meet("the samples of other ranks")
    gathered = cast(Tensor, ranks.all_gather(padded)).reshape(-1, *shape)[: job.count].cpu()
    if ranks.is_global_zero:
        finish(Drawn(gathered, mine.recorder))


def write(drawn: Drawn, classes: Tensor | None, columns: int, folder: Path, nfe: int | None) -> None:
    """Writes the grid, the arrays and, where it was kept, the trajectory.

    Args:
        drawn: The samples.
        classes: Their classes, or None.
        columns: Columns of the grid.
        folder: Where to.
        nfe: Denoiser calls per sample, or None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    grid_image(drawn.samples, columns).save(folder / "grid.png")
    arrays: dict[str, Any] = {"arr_0": to_uint8(drawn.samples).permute(0, 2, 3, 1).numpy()}
    if classes is not None:
        arrays["labels"] = classes.numpy()
    np.savez_compressed(folder / "samples.npz", **arrays)
    if drawn.recorder is not None:
        drawn.recorder.strip().save(folder / "trajectory.png")
        save_gif(drawn.recorder.frames(columns=4), folder / "trajectory.gif")
    calls = "as many denoiser calls as each needs" if nfe is None else f"{nfe} denoiser calls each"
    print(f"{len(drawn.samples)} samples, {calls}, are in {folder}/: grid.png, samples.npz")


def help_notes() -> str:
    """The table of samplers, which closes the command's help."""
    return sampler_table()
