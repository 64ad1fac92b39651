"""The tasks of `diffusion-lit edit` that need no image: anagrams, hybrids, interpolation and the sweep of guidance."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from diffusion_lit.checks import check_count, check_number
from diffusion_lit.commands.edit_options import seed_names
from diffusion_lit.commands.edit_run import Edit, Edited
from diffusion_lit.diffusion import editing
from diffusion_lit.diffusion.grids import evenly
from diffusion_lit.diffusion.images import to_uint8
from diffusion_lit.modules.labels import check_guidance
from diffusion_lit.report.images import Cell, animation, labelled_grid


def anagram(
    edit: Edit,
    view: list[str] = ["identity", "rotate_180"],  # noqa: B006
    num_samples: int = 6,
) -> Edited:
    """Draws images that show something else under each view: turned round, mirrored, cut up, in the negative.

    Views: identity, flip_horizontal, flip_vertical, rotate_90, rotate_180, rotate_270, jigsaw, permute, negative.

    Args:
        edit: Model, a condition per view, sampling and output.
        view: Two views or more, one by one: --view identity --view rotate_90.
        num_samples: Results, a column each.
    """
    model = edit.model
    editing.need_pixels(model, "An anagram")
    seeds, sampling = edit.seeds(num_samples), edit.sampling
    views = [editing.make_view(name, model.image_shape) for name in view]
    labels = None
    if model.num_classes:
        labels = edit.several(len(view), f"An anagram of {len(view)} views")
    else:
        edit.conditions()  # which refuses any
    rows = None if labels is None else labels.repeat(num_samples, 1)
    made = editing.anagram(model, views, rows, seeds=seeds, sampling=sampling).cpu()
    seen = [change.apply(made) for change in views]
    names = edit.names(labels) or [""] * len(view)
    headings = [f"{one}\n{name}" for one, name in zip(view, names, strict=True)]
    figure = labelled_grid([[Cell(x) for x in images] for images in seen], seed_names(seeds), headings)
    facts = {"views": view, "labels": names, "seeds": list(seeds)}
    return Edited(figure, {f"result_{name}": images for name, images in zip(view, seen, strict=True)}, facts)


def hybrid(edit: Edit, blur_sigma: float | None = None, kernel_size: int | None = None, num_samples: int = 6) -> Edited:
    """Draws images that show one condition from afar and another from near, at several sizes.

    Args:
        edit: Model, two conditions (the first from afar, the second from near), sampling and output.
        blur_sigma: Standard deviation of the low-pass in pixels; by default a 32nd of the image's height.
        kernel_size: Side of its kernel in pixels, odd; by default it reaches out to 4 standard deviations.
        num_samples: Results, a column each.
    """
    model = edit.model
    editing.need_pixels(model, "A hybrid")
    seeds, sampling, pair = edit.seeds(num_samples), edit.sampling, edit.several(2, "A hybrid")
    made = editing.hybrid(
        model,
        pair.repeat(num_samples, 1),
        blur_sigma=blur_sigma,
        kernel_size=kernel_size,
        seeds=seeds,
        sampling=sampling,
    ).cpu()
    far, near = edit.names(pair)
    figure = _sizes(made, f"{near} from near, {far} from afar", seed_names(seeds))
    facts = {"far": far, "near": near, "blur_sigma": blur_sigma, "kernel_size": kernel_size, "seeds": list(seeds)}
    return Edited(figure, {"result": made}, facts)


def interpolate(edit: Edit, to_seed: int | None = None, num_frames: int = 25, scale: int | None = None) -> Edited:
    """Walks from one sample to another along the great circle between their noise: a strip and a GIF.

    Args:
        edit: Model, condition, sampling and output.
        to_seed: Seed of the last image; by default the one after --seed.
        num_frames: Images on the way, both ends included.
        scale: Whole factor by which the GIF enlarges pixels; by default small images grow to about 256 pixels a side.
    """
    check_count(2, num_frames=num_frames)
    check_number(least=1, most=64, whole=True, scale=scale)
    draw, first = edit.draw(num_frames), edit.options.seed
    last, shares, labels = first + 1 if to_seed is None else to_seed, torch.linspace(0, 1, num_frames), draw["labels"]
    made = editing.interpolate(edit.model, first, last, shares, labels=labels, sampling=edit.sampling).cpu()
    shown = sorted(set(evenly(0, num_frames - 1, 9)))
    figure = labelled_grid([[Cell(made[i]) for i in shown]], [f"{float(shares[i]):.2f}" for i in shown], [""])
    facts = {"seeds": [first, last], "num_frames": num_frames, "labels": edit.names(labels)[:1]}
    animations = {"interpolation.gif": animation([*made, *made.flip(0)[1:]], scale)}
    return Edited(figure, {"frame": made}, facts, animations)


def guidance(
    edit: Edit,
    cfg_scales: list[float] = [1.0, 2.5, 5.0, 7.0],  # noqa: B006
    num_samples: int = 1,
) -> Edited:
    """Draws the same seeds for several conditions under several strengths of guidance.

    Args:
        edit: Model, the conditions (all classes by default, ten at most), sampling and output.
        cfg_scales: Strengths of guidance, a column each.
        num_samples: Samples of each condition, a row each; every condition gets the same seeds.
    """
    model = edit.model
    if edit.options.cfg_scale is not None:
        raise ValueError("The sweep of guidance takes --cfg_scales, a list as JSON such as '[1, 5]', not --cfg_scale.")
    if model.num_classes == 0:
        raise ValueError("The model is unconditional, so that there is nothing to guide by; give a conditional one.")
    sampling = edit.sampling
    for scale in cfg_scales:
        check_guidance(model, sampling.replace(cfg_scale=scale), labelled=True, cfg_scale=scale)
    kinds = torch.tensor(edit.conditions() or list(range(min(10, model.num_classes))))
    labels, seeds = kinds.repeat_interleave(num_samples), [*edit.seeds(num_samples)] * len(kinds)
    made = editing.guidance_sweep(model, labels, cfg_scales, seeds=seeds, sampling=sampling).cpu()
    names = edit.names(labels)
    rows = names if num_samples == 1 else [f"{n}\nseed {seed}" for n, seed in zip(names, seeds, strict=True)]
    figure = labelled_grid([[Cell(x) for x in row] for row in made], [f"cfg_scale {s:g}" for s in cfg_scales], rows)
    images = {f"cfg_{scale:g}": made[:, column] for column, scale in enumerate(cfg_scales)}
    return Edited(figure, images, {"cfg_scales": cfg_scales, "labels": names, "seeds": seeds})


def _sizes(images: Tensor, title: str, headings: Sequence[str]) -> Image.Image:
    """Each image large, and below it ever smaller, as if from further away.

    Args:
        images: Images (B, C, H, W) in [-1, 1].
        title: What they show, above all.
        headings: What stands above each.

    Returns:
        A column per image; each size is half of the one above.
    """
    large, gap, top, font = max(images.shape[-2], 192), 8, 44, ImageFont.load_default(13)
    sizes = [large // 2**k for k in range(4) if large // 2**k >= 8]
    width = max(len(images) * (large + 2 * gap), round(font.getlength(title)) + 16)
    canvas = Image.new("RGB", (width, top + sum(sizes) + gap * (len(sizes) + 1)), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((gap, 4), title, "black", font)
    for index, (image, heading) in enumerate(zip(images, headings, strict=True)):
        left, height = gap + index * (large + 2 * gap), top + gap
        pen.text((left, 24), heading, "black", font)
        for size in sizes:
            # Enlarged as blocks or smoothly would show the blocks, so that the near image could not be seen.
            resized = to_pil_image(to_uint8(image)).resize((size, size), Image.Resampling.BICUBIC)
            canvas.paste(resized, (left + (large - size) // 2, height))
            height += size + gap
    return canvas
