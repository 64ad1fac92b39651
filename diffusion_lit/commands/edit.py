"""`diffusion-lit edit TASK`: what a trained denoiser can do beyond sampling, a command per task.

The tasks themselves are the functions of `diffusion_lit.diffusion.editing`; here are their defaults, their images and
their figures. `TASKS` lists all of them; those that need no image are in edit_draw.py, those that restore one in
edit_restore.py.
"""

from collections.abc import Callable, Sequence

from PIL import Image
from torch import Tensor

from diffusion_lit.commands.edit_draw import anagram, guidance, hybrid, interpolate
from diffusion_lit.commands.edit_options import decibels, in_decibels, seed_names
from diffusion_lit.commands.edit_restore import colorize, deblur, inpaint, super_resolve
from diffusion_lit.commands.edit_run import Edited, ImageEdit, task
from diffusion_lit.commands.edit_steps import Passed
from diffusion_lit.diffusion import editing
from diffusion_lit.diffusion.generate import Sampling, check_follows_ode
from diffusion_lit.diffusion.models import PixelModel
from diffusion_lit.diffusion.samplers import SAMPLERS
from diffusion_lit.report.images import Cell, labelled_grid

BLURS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)


def forward(
    edit: ImageEdit,
    sigmas: list[float] = [0.1, 0.3, 1.0, 3.0, 10.0],  # noqa: B006 (never changed)
    timesteps: list[int] | None = None,
    num_samples: int = 1,
) -> Edited:
    """Noises an image: x = x0 + sigma n at several levels, shown as x / sqrt(1 + sigma^2).

    Args:
        edit: Model, image and output.
        sigmas: Noise levels.
        timesteps: Steps of the model's schedule instead, as JSON: '[250, 500, 750]'.
        num_samples: Draws of the noise, a row each.
    """
    edit.options.unused("Noising an image", "labels", "prompt", "cfg_scale", "guidance_interval", "guidance_rescale")
    model, seeds = edit.model, edit.seeds(num_samples)
    levels = _levels(model, sigmas, timesteps)
    image = edit.image
    images = image.expand(num_samples, -1, -1, -1)
    noisy = {
        sigma: editing.visible(model, editing.forward(model, images, sigma, seeds), sigma).cpu() for sigma in levels
    }
    rows = [[Cell(x) for x in row] for row in zip(images, *noisy.values(), strict=True)]
    figure = labelled_grid(rows, ["image", *levels.values()], seed_names(seeds))
    files = {"input": image} | {f"sigma_{sigma:g}": x for sigma, x in noisy.items()}
    return Edited(figure, files, {"sigmas": list(levels), "timesteps": timesteps, "seeds": list(seeds)})


def denoise(
    edit: ImageEdit,
    sigmas: list[float] = [0.1, 0.3, 1.0, 3.0],  # noqa: B006
    timesteps: list[int] | None = None,
    blur_sigma: float | None = None,
    kernel_size: int | None = None,
    kernel_sizes: list[int] | None = None,
    shown_steps: list[int] = [],  # noqa: B006
) -> Edited:
    """Noises an image to several levels and denoises it: by a Gaussian blur, in one step, and step by step.

    Each with its PSNR. Steps are every 30th of 1,000 from the level down, unless told otherwise.

    Args:
        edit: Model, image, condition, sampling and output.
        sigmas: Noise levels.
        timesteps: Steps of the model's schedule instead, as JSON: '[250, 500, 750]'.
        blur_sigma: Standard deviation of the blur in pixels; by default the best of 0.5, 0.75, 1, 1.5, 2 and 3 for each
            level, which knows the answer.
        kernel_size: Side of the blur's kernel in pixels, odd; by default it reaches out to 4 standard deviations.
        kernel_sizes: One for each level instead, as JSON: '[3, 5, 9]'.
        shown_steps: Steps of the grid at which the way down is shown too, as JSON: '[10, 15, 20, 25, 30]'; step 0 is
            all noise. The figure then has a row per level, those steps beside the results.
    """
    model = edit.model
    levels = _levels(model, sigmas, timesteps)
    if kernel_sizes is not None and len(kernel_sizes) != len(levels):
        raise ValueError(f"kernel_sizes is {kernel_sizes} for {len(levels)} noise levels; give one for each.")
    kernels: Sequence[int | None] = kernel_sizes or [kernel_size] * len(levels)
    passed = Passed(model, edit.sampling, sorted(set(shown_steps)))
    passed.check(list(levels))
    draw, image = edit.draw(1), edit.image
    blurs = BLURS if blur_sigma is None else (blur_sigma,)
    made: dict[str, dict[float, Tensor]] = {"noisy": {}, "blur": {}, "one_step": {}, "iterative": {}}
    chosen = {}
    for sigma, size in zip(levels, kernels, strict=True):
        x = editing.forward(model, image, sigma, draw["seeds"])
        noisy = model.decode(x).cpu()
        tried = {blur: editing.gaussian_blur(noisy, blur, size) for blur in blurs}
        best = max(tried, key=lambda blur: decibels(tried[blur], image)[0])
        chosen[f"{sigma:g}"] = best
        once = editing.denoise_once(model, x, sigma, labels=draw["labels"], sampling=edit.sampling)
        made["noisy"][sigma], made["blur"][sigma], made["one_step"][sigma] = noisy, tried[best], once.cpu()
        made["iterative"][sigma] = editing.denoise(model, x, sigma, callback=passed.watch(sigma), **draw).cpu()
    psnr = {name: {f"{s:g}": decibels(x, image)[0] for s, x in each.items()} for name, each in made.items()}
    names = {"noisy": "noisy", "blur": "Gaussian blur", "one_step": "one step", "iterative": "step by step"}
    cells = {
        name: [Cell(x[0], in_decibels(psnr[name][f"{s:g}"])) for s, x in each.items()] for name, each in made.items()
    }
    if shown_steps:
        figure = _strip(passed, levels, cells, names)
    else:
        figure = labelled_grid(list(cells.values()), list(levels.values()), list(names.values()))
    files = {"input": image} | {f"{name}_{s:g}": x for name, each in made.items() for s, x in each.items()}
    facts = {
        "psnr": psnr,
        "blur_sigma": chosen,
        "kernel_size": list(kernels),
        "timesteps": timesteps,
        "shown_steps": {str(step): passed.grid[step] for step in passed.steps},
        "seeds": list(draw["seeds"]),
        "labels": edit.names(draw["labels"]),
    }
    table = [["PSNR in dB", *(text.replace("\n", ", ") for text in levels.values())]]
    table += [[names[name], *(f"{value:.2f}" for value in row.values())] for name, row in psnr.items()]
    return Edited(figure, files | passed.files(), facts, table=table)


def _strip(
    passed: Passed, levels: dict[float, str], cells: dict[str, list[Cell]], names: dict[str, str]
) -> Image.Image:
    """A row per noise level: the noisy image, the steps on the way down, and the results beside each other."""
    results = ("iterative", "one_step", "blur")
    rows = [
        [cells["noisy"][row], *passed.cells(sigma), *(cells[name][row] for name in results)]
        for row, sigma in enumerate(levels)
    ]
    columns = [names["noisy"], *passed.headings(), *(names[name] for name in results)]
    return labelled_grid(rows, columns, list(levels.values()))


def img2img(
    edit: ImageEdit,
    starts: list[int] = [1, 3, 5, 7, 10, 20],  # noqa: B006
    num_samples: int = 1,
) -> Edited:
    """Noises an image to a level and denoises it from there (SDEdit): from free invention to the image itself.

    A start is an index of the grid, 0 being all noise. The grid is every 30th of 1,000 steps unless told otherwise.

    Args:
        edit: Model, image, condition, sampling and output.
        starts: Start levels, a column each.
        num_samples: Results for each level, a row each.
    """
    model, draw, image = edit.model, edit.draw(num_samples), edit.image
    images = image.expand(num_samples, -1, -1, -1)
    levels = {start: editing.start_level(edit.sampling, model.denoiser.scaling, start) for start in starts}
    made = {start: editing.img2img(model, images, start, **draw).cpu() for start in starts}
    values = {start: decibels(x, image) for start, x in made.items()}
    rows = [
        [*(Cell(made[start][row], in_decibels(values[start][row])) for start in starts), Cell(image[0])]
        for row in range(num_samples)
    ]
    columns = [f"start {start}\nsigma {level:.3g}" for start, level in levels.items()]
    figure = labelled_grid(rows, [*columns, "image"], seed_names(draw["seeds"]))
    facts = {
        "starts": {str(start): {"sigma": levels[start], "psnr": values[start]} for start in starts},
        "seeds": list(draw["seeds"]),
        "labels": edit.names(draw["labels"]),
    }
    return Edited(figure, {"input": image} | {f"start_{start}": x for start, x in made.items()}, facts)


def invert(edit: ImageEdit) -> Edited:
    """Takes an image up the probability-flow ODE to its noise and back, and says how near it comes (PSNR).

    Takes 100 steps, with heun where the model's own sampler draws noise or takes its own map, unless told otherwise.

    Args:
        edit: Model, image, condition, sampling and output.
    """
    model, draw, image = edit.model, edit.draw(1), edit.image
    x = editing.invert(model, image, labels=draw["labels"], sampling=edit.sampling)
    sigma = float(edit.sampling.sigmas(model.denoiser.scaling)[0])
    back = editing.denoise(model, x, sigma, labels=draw["labels"], sampling=edit.sampling).cpu()
    noise = editing.visible(model, x, sigma).cpu()
    value, mean, std = decibels(back, image)[0], float((x / sigma).mean()), float((x / sigma).std())
    cells = [Cell(image[0]), Cell(noise[0], f"sigma {sigma:.3g}"), Cell(back[0], in_decibels(value))]
    figure = labelled_grid([cells], ["image", "its noise", "back"], [""])
    facts = {"psnr": value, "sigma": sigma, "noise_mean": mean, "noise_std": std, "labels": edit.names(draw["labels"])}
    table = [["PSNR in dB", "sigma", "noise's mean", "noise's std"]]
    table += [[f"{value:.2f}", f"{sigma:.4g}", f"{mean:.4f}", f"{std:.4f}"]]
    return Edited(figure, {"input": image, "noise": noise, "result": back}, facts, table=table)


def _along_the_ode(model: PixelModel) -> Sampling:
    """100 steps without noise."""
    own = model.sampling
    check_follows_ode(own, "no image can be taken back to its noise")
    if SAMPLERS[own.sampler].stochastic or SAMPLERS[own.sampler].takes_until:
        own = own.replace(sampler="heun")
    return own.replace(sampler_options={}, num_steps=100)


def _strided(model: PixelModel) -> Sampling:
    """The model's settings on the grid on which editing counts its start levels."""
    return editing.strided(model.sampling, model.denoiser.scaling)


def _revising(model: PixelModel) -> Sampling:
    """The model's settings with a sampler that draws noise."""
    return editing.revising(model.sampling)


def _levels(model: PixelModel, sigmas: Sequence[float], timesteps: Sequence[int] | None) -> dict[float, str]:
    """The noise levels asked for, each with its heading: as they are, or at steps of the model's schedule."""
    if timesteps is None:
        return {sigma: f"sigma {sigma:g}" for sigma in sigmas}
    schedule = model.denoiser.scaling.schedule
    if schedule is None:
        raise ValueError(f"--timesteps {list(timesteps)} was given, but the model has no schedule; give --sigmas.")
    last = len(schedule.sigmas) - 1
    for step in timesteps:
        if not 0 <= step <= last:
            raise ValueError(f"There is no step {step} in --timesteps; the model's schedule has steps 0 to {last}.")
    return {float(schedule.sigmas[t]): f"t {t}\nsigma {float(schedule.sigmas[t]):.3g}" for t in timesteps}


TASKS: dict[str, Callable[..., None]] = {
    "forward": task(forward, settings=None),
    "denoise": task(denoise, _strided),
    "img2img": task(img2img, _strided),
    "inpaint": task(inpaint, _revising),
    "anagram": task(anagram),
    "hybrid": task(hybrid),
    "interpolate": task(interpolate),
    "invert": task(invert, _along_the_ode),
    "guidance": task(guidance),
    "colorize": task(colorize, _revising),
    "super_resolve": task(super_resolve, _revising),
    "deblur": task(deblur, _revising),
}
"""The tasks by name, each with how it samples where it is not as the model was trained to be sampled."""
