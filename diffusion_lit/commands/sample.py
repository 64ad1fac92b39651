"""`diffusion-lit sample`: images from a checkpoint, which is all that it needs, or from a pretrained model."""

from pathlib import Path

from diffusion_lit.checks import check_count, check_number
from diffusion_lit.commands.options import StepsOptions
from diffusion_lit.commands.sample_job import SampleJob, draw_all
from diffusion_lit.diffusion.models import PixelModel
from diffusion_lit.diffusion.samplers import sampler_table
from diffusion_lit.modules.given import as_given
from diffusion_lit.modules.labels import check_guidance, parse_labels
from diffusion_lit.modules.load import give_held_out
from diffusion_lit.modules.protocols import Model
from diffusion_lit.runtime.ranks import fabric
from diffusion_lit.storage.room import try_folder
from diffusion_lit.words import article, counted

help_notes = sampler_table  # below the help


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
    fabric(devices, options.device, strategy).launch(lambda ranks: draw_all(jobs, Path(out), ranks))


def take_size(module: Model, size: str) -> None:
    """Lets a model draw images of another size.

    Args:
        module: The model.
        size: Height and width, such as `128x192`.

    Raises:
        ValueError: If it is not a size, or the model draws one size only.
    """
    sides = size.lower().split("x")
    if len(sides) != 2 or not all(side.isascii() and side.isdigit() for side in sides):
        raise ValueError(f"--size is {size!r}; give height and width, such as 128x192.")
    if not isinstance(module, PixelModel):
        raise ValueError(f"--size is {size}, but {article(module)} draws one size alone; leave it out.")
    if as_given(module) is not None:
        raise ValueError(f"--size is {size}, but the model draws images as large as those it is given; leave it out.")
    module.draw_size(int(sides[0]), int(sides[1]))
