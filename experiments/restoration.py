"""Which restoration of an image is nearest to it, and which looks like one? By PSNR and Fréchet distance.

Test images are measured (shrunk, or blurred, with noise or without) and restored by each method with the same seeds:

    python -m experiments.restoration --ckpt_path runs/edm_fashion_mnist --given runs/superres_fashion_mnist
    python -m experiments.restoration --ckpt_path runs/edm_fashion_mnist --task deblur --noise 0.1 --num_steps 48

Samplers that draw no noise are replaced by ddpm, whose fresh noise lets later steps mend what earlier ones got wrong.

The Fréchet distance is that of the restored images to the originals of the whole test split. The mean of several
restorations of one image is nearer to it than each, since PSNR rewards blur; each is measured by itself here.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffusion_lit.checks import check_count, check_number
from diffusion_lit.diffusion import editing
from diffusion_lit.diffusion.images import psnr, to_uint8
from diffusion_lit.diffusion.posterior import POSTERIORS
from diffusion_lit.diffusion.rng import SeededNoise
from diffusion_lit.evaluation import ClassifierFeatures, FeatureExtractor
from diffusion_lit.evaluation.metrics import Statistics, frechet_distance
from diffusion_lit.evaluation.reference import reference_of
from diffusion_lit.modules.load import load_module, prepared_data
from diffusion_lit.report.images import titled_grid
from diffusion_lit.runtime.hardware import hardware
from diffusion_lit.runtime.versions import versions
from diffusion_lit.storage.hashing import file_record
from diffusion_lit.storage.runs import find_checkpoint
from experiments.harness.command import command
from experiments.harness.evaluator import first_images
from experiments.harness.show import keep_json

SHOWN = 10

Way = tuple[Any, Callable[..., Tensor]]
"""A model, and a function of (y, sampling, seeds) to images."""


def restoration(
    ckpt_path: str,
    given: str | None = None,
    task: Literal["super_resolve", "deblur"] = "super_resolve",
    factor: int = 4,
    blur_sigma: float = 1.5,
    noise: float = 0.0,
    cutoffs: list[float] | None = None,
    methods: list[str] | None = None,
    method_options: dict[str, dict[str, Any]] | None = None,
    resamplings: list[int] | None = None,
    num_steps: int | None = None,
    num_images: int = 500,
    batch_size: int = 100,
    root: str | None = None,
    extractor: FeatureExtractor | None = None,
    out: str = "runs/studies/restoration",
) -> dict[str, Any]:
    """Restores test images by each method and measures them.

    Args:
        ckpt_path: Run or checkpoint of a model that is given no image.
        given: The same of one that is given the measurement.
        task: What is restored.
        factor: Of super-resolution.
        blur_sigma: Of the blur, in pixels.
        noise: Standard deviation of the measurement's noise, images being in [-1, 1].
        cutoffs: Of the projection of a blur; by default 0.001, the noise, and twice and five times as much.
        methods: Of dps, pigdm and mmps, where there is noise; all by default.
        method_options: Their options by name, as JSON: '{"mmps": {"iterations": 3}}'.
        resamplings: Of the projection (RePaint's r); 1 and 5 by default, without noise, and 1 with it.
        num_steps: Sampling steps; those of each model by default.
        num_images: Test images, from the first on.
        batch_size: Images restored at a time.
        root: Where the data lies now.
        extractor: What images are compared by; a classifier of the data set by default.
        out: Folder for figures.json and restoration.png.

    Returns:
        The figures that it prints.
    """
    check_count(2, num_images=num_images)
    check_count(batch_size=batch_size)
    check_number(least=0, noise=noise)
    named = {"zero-shot": ckpt_path, "given": given}
    files = {name: find_checkpoint(path) for name, path in named.items() if path is not None}
    models = {name: load_module(path) for name, path in files.items()}
    data = prepared_data(files["zero-shot"], root=root)
    measure = extractor or ClassifierFeatures()
    measure.load(data)
    reference = reference_of(data, "test", measure, batch_size)
    images = first_images(data, "test", num_images)
    num_images = len(images)
    measurement = (
        editing.small_of(factor) if task == "super_resolve" else editing.blurred(blur_sigma, *images.shape[2:])
    )
    y = measurement.apply(images)
    y = y + noise * SeededNoise(range(1_000_000, 1_000_000 + num_images))(y)
    ways = ways_of(models, task, blur_sigma, noise, cutoffs, methods, method_options or {}, resamplings)
    simple = interpolate(y, images.shape[2:], mode="bicubic") if task == "super_resolve" else y
    made = {"measured": simple}
    rows = [row_of("measured", simple, images, measure, reference.statistics, 0.0)]
    for name, (model, restore) in ways.items():
        started = time.perf_counter()
        sampling = None if num_steps is None else model.sampling.replace(num_steps=num_steps)
        parts = []
        for start in range(0, num_images, batch_size):
            part = slice(start, start + batch_size)
            parts.append(restore(y[part], sampling, range(start, start + len(y[part]))))
        made[name] = torch.cat(parts)
        seconds = (time.perf_counter() - started) / num_images
        rows.append(row_of(name, made[name], images, measure, reference.statistics, seconds))
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    folder = Path(out)
    figures = {
        "task": task,
        **({"factor": factor} if task == "super_resolve" else {"blur_sigma": blur_sigma}),
        "noise": noise,
        "num_images": num_images,
        "checkpoints": {name: file_record(path) for name, path in files.items()},
        "extractor": measure.identity(),
        "versions": versions(),
        "hardware": hardware(torch.device("cpu"), 1),
        "metric": measure.metric,
        "rows": rows,
    }
    keep_json(folder / "figures.json", figures)
    sheet = {**made, "image": images}
    titled_grid([list(x[:SHOWN]) for x in sheet.values()], list(sheet)).save(folder / "restoration.png")
    return figures


def ways_of(
    models: dict[str, Any],
    task: str,
    blur_sigma: float,
    noise: float,
    cutoffs: list[float] | None,
    methods: list[str] | None,
    method_options: dict[str, dict[str, Any]],
    resamplings: list[int] | None,
) -> dict[str, Way]:
    """The ways to restore, by name: the model, and a function of (y, sampling, seeds)."""
    model = models["zero-shot"]

    def way(model: Any, cutoff: float = 1e-3, times: int = 1, posterior: Any = None) -> Way:
        def restore(y: Tensor, sampling: Any, seeds: Any) -> Tensor:
            sampling = editing.revising(sampling or model.sampling)
            options: Any = {"seeds": seeds, "sampling": sampling, "resamplings": times, "posterior": posterior}
            if task == "super_resolve":
                return editing.super_resolve(model, y, **options)
            return editing.deblur(model, y, blur_sigma, cutoff, **options)

        return model, restore

    ways: dict[str, Way] = {}
    for times in resamplings or ([1] if noise else [1, 5]):
        default = [1e-3, noise, 2 * noise, 5 * noise] if noise else [1e-3]
        for cutoff in (cutoffs or default) if task == "deblur" else [0.0]:
            told = f", cutoff {cutoff:g}" if cutoff else ""
            ways[f"projection, {times} times{told}"] = way(model, cutoff, times)
    for name in (methods or list(POSTERIORS)) if noise else []:
        options = method_options.get(name, {})
        if name == "pigdm":
            options = {"sigma_data": float(getattr(model.denoiser.scaling, "sigma_data", 1.0)), **options}
        ways[name] = way(model, posterior=partial(POSTERIORS[name], sigma_y=noise, **options))
    if "given" in models:
        ways["given the image"] = way(models["given"])
    return ways


def row_of(
    name: str, made: Tensor, images: Tensor, measure: FeatureExtractor, reference: Statistics, seconds: float
) -> dict[str, Any]:
    """The figures of one way."""
    pixels = to_uint8(made)
    decibels = psnr(pixels, to_uint8(images)).clamp(max=99)
    distance = frechet_distance(Statistics.of(measure.extract(pixels, 250).features), reference)
    error = float(decibels.std() / len(decibels) ** 0.5)
    return {
        "method": name,
        "psnr": round(float(decibels.mean()), 2),
        "psnr_error": round(error, 2),
        measure.metric: round(distance, 3),
        "seconds_per_image": round(seconds, 3),
    }


if __name__ == "__main__":
    command(restoration)
