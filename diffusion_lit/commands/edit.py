"""`diffusion-lit edit TASK`: what a trained denoiser can do beyond sampling, a command per task.

The tasks themselves are the functions of `diffusion_lit.diffusion.editing`; here are their defaults, their images and
their figures.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffusion_lit.checks import check_count, check_number
from diffusion_lit.commands.edit_options import ImageOptions, Options, decibels, in_decibels, seed_names
from diffusion_lit.commands.edit_restore import colorize, deblur, inpaint, super_resolve
from diffusion_lit.commands.edit_steps import Passed
from diffusion_lit.diffusion import editing
from diffusion_lit.diffusion.generate import check_follows_ode
from diffusion_lit.diffusion.grids import evenly
from diffusion_lit.diffusion.models import PixelModel
from diffusion_lit.diffusion.samplers import SAMPLERS
from diffusion_lit.modules.labels import check_guidance
from diffusion_lit.report.images import Cell, animation, grid_image, labelled_grid

BLURS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)


def forward(
    options: ImageOptions,
    sigmas: list[float] = [0.1, 0.3, 1.0, 3.0, 10.0],  # noqa: B006 (never changed)
    timesteps: list[int] | None = None,
    num_samples: int = 1,
) -> None:
    """Noises an image: x = x0 + sigma n at several levels, shown as x / sqrt(1 + sigma^2).

    Args:
        options: Model, image and output.
        sigmas: Noise levels.
        timesteps: Steps of the model's schedule instead, as JSON: '[250, 500, 750]'.
        num_samples: Draws of the noise, a row each.
    """
    options.unused("Noising an image", "labels", "prompt", "cfg_scale", "guidance_interval", "guidance_rescale")
    model = options.load()
    named = _levels(model, sigmas, timesteps)
    sigmas = list(named)
    seeds, image = options.seeds(num_samples), options.read(model)
    images = image.expand(num_samples, -1, -1, -1)
    noisy = {
        sigma: editing.visible(model, editing.forward(model, images, sigma, seeds), sigma).cpu() for sigma in sigmas
    }
    rows = [[Cell(image[0])] + [Cell(noisy[sigma][row]) for sigma in sigmas] for row in range(num_samples)]
    figure = labelled_grid(rows, ["image", *named.values()], seed_names(seeds))
    files = {"input": image} | {f"sigma_{sigma:g}": noisy[sigma] for sigma in sigmas}
    facts = {"sigmas": sigmas, "timesteps": timesteps, "seeds": list(seeds)}
    options.write("forward", model, None, figure, files, facts)


def denoise(
    options: ImageOptions,
    sigmas: list[float] = [0.1, 0.3, 1.0, 3.0],  # noqa: B006
    timesteps: list[int] | None = None,
    blur_sigma: float | None = None,
    kernel_size: int | None = None,
    kernel_sizes: list[int] | None = None,
    shown_steps: list[int] = [],  # noqa: B006
) -> None:
    """Noises an image to several levels and denoises it: by a Gaussian blur, in one step, and step by step.

    Each with its PSNR. Steps are every 30th of 1,000 from the level down, unless told otherwise.

    Args:
        options: Model, image, condition, sampling and output.
        sigmas: Noise levels.
        timesteps: Steps of the model's schedule instead, as JSON: '[250, 500, 750]'.
        blur_sigma: Standard deviation of the blur in pixels; by default the best of 0.5, 0.75, 1, 1.5, 2 and 3 for each
            level, which knows the answer.
        kernel_size: Side of the blur's kernel in pixels, odd; by default it reaches out to 4 standard deviations.
        kernel_sizes: One for each level instead, as JSON: '[3, 5, 9]'.
        shown_steps: Steps of the grid at which the way down is shown too, as JSON: '[10, 15, 20, 25, 30]'; step 0 is
            all noise. The figure then has a row per level, those steps beside the results.
    """
    model = options.load()
    named = _levels(model, sigmas, timesteps)
    sigmas = list(named)
    if kernel_sizes is not None and len(kernel_sizes) != len(sigmas):
        raise ValueError(f"kernel_sizes is {kernel_sizes} for {len(sigmas)} noise levels; give one for each.")
    sizes: Sequence[int | None] = kernel_sizes or [kernel_size] * len(sigmas)
    kernels = dict(zip(sigmas, sizes, strict=True))
    sampling = options.sampling(model, editing.strided(model.sampling, model.denoiser.scaling))
    passed = Passed(model, sampling, sorted(set(shown_steps)))
    passed.check(sigmas)
    image, labels, seeds = options.read(model), options.condition(model, 1), options.seeds(1)
    blurs = BLURS if blur_sigma is None else (blur_sigma,)
    made: dict[str, dict[float, Tensor]] = {"noisy": {}, "blur": {}, "one_step": {}, "iterative": {}}
    chosen = {}
    for sigma in sigmas:
        x = editing.forward(model, image, sigma, seeds)
        noisy = model.decode(x).cpu()
        tried = {blur: editing.gaussian_blur(noisy, blur, kernels[sigma]) for blur in blurs}
        best = max(tried, key=lambda blur: decibels(tried[blur], image)[0])
        chosen[f"{sigma:g}"] = best
        made["noisy"][sigma] = noisy
        made["blur"][sigma] = tried[best]
        made["one_step"][sigma] = editing.denoise_once(model, x, sigma, labels=labels, sampling=sampling).cpu()
        made["iterative"][sigma] = editing.denoise(
            model, x, sigma, labels=labels, seeds=seeds, sampling=sampling, callback=passed.watch(sigma)
        ).cpu()
    figures = {name: {f"{s:g}": decibels(each[s], image)[0] for s in sigmas} for name, each in made.items()}
    names = {"noisy": "noisy", "blur": "Gaussian blur", "one_step": "one step", "iterative": "step by step"}
    cells = {
        name: [Cell(each[s][0], in_decibels(figures[name][f"{s:g}"])) for s in sigmas] for name, each in made.items()
    }
    figure = labelled_grid(list(cells.values()), list(named.values()), list(names.values()))
    if shown_steps:
        figure = _strip(passed, named, cells, names)
    images = {"input": image} | {f"{name}_{s:g}": each[s] for name, each in made.items() for s in sigmas}
    images |= passed.files()
    facts = {
        "psnr": figures,
        "blur_sigma": chosen,
        "kernel_size": list(kernels.values()),
        "timesteps": timesteps,
        "shown_steps": {str(step): passed.grid[step] for step in passed.steps},
        "seeds": list(seeds),
        "labels": options.names(model, labels),
    }
    table = [["PSNR in dB", *(text.replace("\n", ", ") for text in named.values())]]
    table += [[names[name], *(f"{value:.2f}" for value in row.values())] for name, row in figures.items()]
    options.write("denoise", model, sampling, figure, images, facts, table=table)


def _strip(
    passed: Passed, levels: dict[float, str], cells: dict[str, list[Cell]], names: dict[str, str]
) -> Image.Image:
    """A row per noise level: the noisy image, the steps on the way down, and the results beside each other."""
    rows = [
        [cells["noisy"][row], *passed.cells(sigma), *(cells[name][row] for name in ("iterative", "one_step", "blur"))]
        for row, sigma in enumerate(levels)
    ]
    columns = [names["noisy"], *passed.headings(), *(names[name] for name in ("iterative", "one_step", "blur"))]
    return labelled_grid(rows, columns, list(levels.values()))


def img2img(
    options: ImageOptions,
    starts: list[int] = [1, 3, 5, 7, 10, 20],  # noqa: B006
    num_samples: int = 1,
) -> None:
    """Noises an image to a level and denoises it from there (SDEdit): from free invention to the image itself.

    A start is an index of the grid, 0 being all noise. The grid is every 30th of 1,000 steps unless told otherwise.

    Args:
        options: Model, image, condition, sampling and output.
        starts: Start levels, a column each.
        num_samples: Results for each level, a row each.
    """
    model = options.load()
    sampling = options.sampling(model, editing.strided(model.sampling, model.denoiser.scaling))
    seeds, image = options.seeds(num_samples), options.read(model)
    images, labels = image.expand(num_samples, -1, -1, -1), options.condition(model, num_samples)
    levels = {start: editing.start_level(sampling, model.denoiser.scaling, start) for start in starts}
    made = {
        start: editing.img2img(model, images, start, labels=labels, seeds=seeds, sampling=sampling).cpu()
        for start in starts
    }
    values = {start: decibels(made[start], image) for start in starts}
    rows = [
        [*[Cell(made[start][row], in_decibels(values[start][row])) for start in starts], Cell(image[0])]
        for row in range(num_samples)
    ]
    columns = [f"start {start}\nsigma {levels[start]:.3g}" for start in starts]
    figure = labelled_grid(rows, [*columns, "image"], seed_names(seeds))
    facts = {
        "starts": {str(start): {"sigma": levels[start], "psnr": values[start]} for start in starts},
        "seeds": list(seeds),
        "labels": options.names(model, labels),
    }
    named = {"input": image} | {f"start_{start}": made[start] for start in starts}
    options.write("img2img", model, sampling, figure, named, facts)


def anagram(
    options: Options,
    view: list[str] = ["identity", "rotate_180"],  # noqa: B006
    num_samples: int = 6,
) -> None:
    """Draws images that show something else under each view: turned round, mirrored, cut up, in the negative.

    Views: identity, flip_horizontal, flip_vertical, rotate_90, rotate_180, rotate_270, jigsaw, permute, negative.

    Args:
        options: Model, a condition per view, sampling and output.
        view: Two views or more, one by one: --view identity --view rotate_90.
        num_samples: Results, a column each.
    """
    model = options.load()
    editing.need_pixels(model, "An anagram")
    seeds, sampling = options.seeds(num_samples), options.sampling(model, model.sampling)
    made_views = [editing.make_view(name, model.image_shape) for name in view]
    labels = None
    if model.num_classes:
        labels = options.several(model, len(view), f"An anagram of {len(view)} views").repeat(num_samples, 1)
    else:
        options.conditions(model)  # which refuses any
    made = editing.anagram(model, made_views, labels, seeds=seeds, sampling=sampling).cpu()
    names = options.names(model, None if labels is None else labels[0]) or [""] * len(view)
    rows = [[Cell(x) for x in change.apply(made)] for change in made_views]
    figure = labelled_grid(rows, seed_names(seeds), [f"{v}\n{name}" for v, name in zip(view, names, strict=True)])
    facts = {"views": view, "labels": names, "seeds": list(seeds)}
    images = {f"result_{name}": change.apply(made) for name, change in zip(view, made_views, strict=True)}
    options.write("anagram", model, sampling, figure, images, facts)


def hybrid(
    options: Options, blur_sigma: float | None = None, kernel_size: int | None = None, num_samples: int = 6
) -> None:
    """Draws images that show one condition from afar and another from near, at several sizes.

    Args:
        options: Model, two conditions (the first from afar, the second from near), sampling and output.
        blur_sigma: Standard deviation of the low-pass in pixels; by default a 32nd of the image's height.
        kernel_size: Side of its kernel in pixels, odd; by default it reaches out to 4 standard deviations.
        num_samples: Results, a column each.
    """
    model = options.load()
    editing.need_pixels(model, "A hybrid")
    seeds, sampling = options.seeds(num_samples), options.sampling(model, model.sampling)
    pair = options.several(model, 2, "A hybrid")
    made = editing.hybrid(
        model,
        pair.repeat(num_samples, 1),
        blur_sigma=blur_sigma,
        kernel_size=kernel_size,
        seeds=seeds,
        sampling=sampling,
    ).cpu()
    far, near = options.names(model, pair)
    sizes = [sizes_image(x[None], model.image_shape[1]) for x in made]
    figure = headed(sizes, f"{near} from near, {far} from afar", seed_names(seeds))
    facts = {"far": far, "near": near, "blur_sigma": blur_sigma, "kernel_size": kernel_size, "seeds": list(seeds)}
    options.write("hybrid", model, sampling, figure, {"result": made}, facts)


def interpolate(options: Options, to_seed: int | None = None, num_frames: int = 25, scale: int | None = None) -> None:
    """Walks from one sample to another along the great circle between their noise: a strip and a GIF.

    Args:
        options: Model, condition, sampling and output.
        to_seed: Seed of the last image; by default the one after --seed.
        num_frames: Images on the way, both ends included.
        scale: Whole factor by which the GIF enlarges pixels; by default small images grow to about 256 pixels a side.
    """
    check_count(2, num_frames=num_frames)
    check_number(least=1, most=64, whole=True, scale=scale)
    model = options.load()
    sampling = options.sampling(model, model.sampling)
    last = options.seed + 1 if to_seed is None else to_seed
    shares, labels = torch.linspace(0, 1, num_frames), options.condition(model, num_frames)
    made = editing.interpolate(model, options.seed, last, shares, labels=labels, sampling=sampling).cpu()
    shown = sorted(set(evenly(0, num_frames - 1, 9)))
    figure = labelled_grid([[Cell(made[i]) for i in shown]], [f"{float(shares[i]):.2f}" for i in shown], [""])
    facts = {"seeds": [options.seed, last], "num_frames": num_frames, "labels": options.names(model, labels)[:1]}
    animations = {"interpolation.gif": animation([*made, *made.flip(0)[1:]], scale)}
    options.write("interpolate", model, sampling, figure, {"frame": made}, facts, animations)


def invert(options: ImageOptions) -> None:
    """Takes an image up the probability-flow ODE to its noise and back, and says how near it comes (PSNR).

    Takes 100 steps, with heun where the model's own sampler draws noise, unless told otherwise.

    Args:
        options: Model, image, condition, sampling and output.
    """
    model = options.load()
    own = model.sampling
    check_follows_ode(own, "no image can be taken back to its noise")
    quiet = replace(own, sampler_options={}) if not SAMPLERS[own.sampler].stochastic else own.replace(sampler="heun")
    sampling = options.sampling(model, quiet.replace(num_steps=100))
    image, labels = options.read(model), options.condition(model, 1)
    x = editing.invert(model, image, labels=labels, sampling=sampling)
    sigma = float(sampling.sigmas(model.denoiser.scaling)[0])
    back = editing.denoise(model, x, sigma, labels=labels, sampling=sampling).cpu()
    noise = editing.visible(model, x, sigma).cpu()
    value = decibels(back, image)[0]
    cells = [Cell(image[0]), Cell(noise[0], f"sigma {sigma:.3g}"), Cell(back[0], in_decibels(value))]
    figure = labelled_grid([cells], ["image", "its noise", "back"], [""])
    facts = {
        "psnr": value,
        "sigma": sigma,
        "noise_mean": float((x / sigma).mean()),
        "noise_std": float((x / sigma).std()),
        "labels": options.names(model, labels),
    }
    table = [["PSNR in dB", "sigma", "noise's mean", "noise's std"]]
    table += [[f"{value:.2f}", f"{sigma:.4g}", f"{facts['noise_mean']:.4f}", f"{facts['noise_std']:.4f}"]]
    options.write(
        "invert", model, sampling, figure, {"input": image, "noise": noise, "result": back}, facts, table=table
    )


def guidance(
    options: Options,
    cfg_scales: list[float] = [1.0, 2.5, 5.0, 7.0],  # noqa: B006
    num_samples: int = 1,
) -> None:
    """Draws the same seeds for several conditions under several strengths of guidance.

    Args:
        options: Model, the conditions (all classes by default, ten at most), sampling and output.
        cfg_scales: Strengths of guidance, a column each.
        num_samples: Samples of each condition, a row each; every condition gets the same seeds.
    """
    model = options.load()
    if options.cfg_scale is not None:
        raise ValueError("The sweep of guidance takes --cfg_scales, a list as JSON such as '[1, 5]', not --cfg_scale.")
    if model.num_classes == 0:
        raise ValueError("The model is unconditional, so that there is nothing to guide by; give a conditional one.")
    sampling = options.sampling(model, model.sampling)
    for scale in cfg_scales:
        check_guidance(model, sampling.replace(cfg_scale=scale), labelled=True, cfg_scale=scale)
    kinds = torch.tensor(options.conditions(model) or list(range(min(10, model.num_classes))))
    labels, seeds = kinds.repeat_interleave(num_samples), [*options.seeds(num_samples)] * len(kinds)
    made = editing.guidance_sweep(model, labels, cfg_scales, seeds=seeds, sampling=sampling).cpu()
    names = options.names(model, labels)
    rows = names if num_samples == 1 else [f"{n}\nseed {seed}" for n, seed in zip(names, seeds, strict=True)]
    figure = labelled_grid([[Cell(x) for x in row] for row in made], [f"cfg_scale {s:g}" for s in cfg_scales], rows)
    facts = {"cfg_scales": cfg_scales, "labels": names, "seeds": seeds}
    images = {f"cfg_{scale:g}": made[:, column] for column, scale in enumerate(cfg_scales)}
    options.write("guidance", model, sampling, figure, images, facts)


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


def sizes_image(images: Tensor, side: int) -> Image.Image:
    """Each image large, and below it ever smaller, as if from further away.

    Args:
        images: Images (B, C, H, W) in [-1, 1].
        side: Their height.

    Returns:
        A column per image; each size is half of the one above.
    """
    large = max(side, 192)
    row = grid_image(images, columns=len(images), scale=1)
    column = side + 1  # a pixel of border
    sheets = [row.crop((i * column + 1, 1, (i + 1) * column, side + 1)) for i in range(len(images))]
    sizes = [large // 2**k for k in range(4) if large // 2**k >= 8]
    gap = 8
    canvas = Image.new("RGB", (len(images) * (large + gap) + gap, sum(sizes) + gap * (len(sizes) + 1)), "white")
    for index, sheet in enumerate(sheets):
        top = gap
        for size in sizes:
            # Enlarged as blocks or smoothly would show the blocks, so that the near image could not be seen.
            resized = sheet.resize((size, size), Image.Resampling.BICUBIC)
            canvas.paste(resized, (gap + index * (large + gap) + (large - size) // 2, top))
            top += size + gap
    return canvas


def headed(images: Sequence[Image.Image], title: str, headings: Sequence[str]) -> Image.Image:
    """Puts images of one size side by side, a heading above each and a title above all.

    Args:
        images: The images.
        title: What they show.
        headings: One for each.

    Returns:
        The figure.
    """
    top, font = 44, ImageFont.load_default(13)
    width = max(sum(image.width for image in images), round(font.getlength(title)) + 16)
    canvas = Image.new("RGB", (width, images[0].height + top), "white")
    pen, left = ImageDraw.Draw(canvas), 0
    pen.text((8, 4), title, "black", font)
    for image, heading in zip(images, headings, strict=True):
        pen.text((left + 8, 24), heading, "black", font)
        canvas.paste(image, (left, top))
        left += image.width
    return canvas


TASKS: dict[str, Callable[..., None]] = {
    "forward": forward,
    "denoise": denoise,
    "img2img": img2img,
    "inpaint": inpaint,
    "anagram": anagram,
    "hybrid": hybrid,
    "interpolate": interpolate,
    "invert": invert,
    "guidance": guidance,
    "colorize": colorize,
    "super_resolve": super_resolve,
    "deblur": deblur,
}
