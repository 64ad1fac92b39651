"""The tasks of `diffusion-lit edit` that restore an image: inpaint, colorize, super_resolve and deblur.

A measurement of the image is made, with noise where it is asked for, and images are drawn that agree with it. How:

    a model that was trained to be given such an image is given it, without noise (configs superres_*, inpaint_*...);
    without noise every estimate is projected on what agrees with the measurement (DDNM, RePaint);
    with noise the estimates are those of the posterior (MMPS, PiGDM or DPS), which nothing is forced on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.nn.functional import interpolate as enlarge

from diffusion_lit.checks import check_number
from diffusion_lit.commands.edit_options import (
    SAMPLES,
    ImageOptions,
    decibels,
    image_size,
    in_decibels,
    read_pixels,
    seed_names,
)
from diffusion_lit.commands.edit_run import Edited, ImageEdit
from diffusion_lit.diffusion import editing
from diffusion_lit.diffusion.editing.measurements import Measurement
from diffusion_lit.diffusion.posterior import POSTERIORS
from diffusion_lit.diffusion.rng import keyed_generator
from diffusion_lit.report.images import Cell, labelled_grid

PROJECTION, GIVEN = "projection", "given"
METHODS = (PROJECTION, *POSTERIORS)


@dataclass(frozen=True)
class RestoreOptions(ImageOptions):
    """Model, image, condition, sampling and output, as `ImageOptions`, and how to restore.

    Args:
        method: projection (DDNM, RePaint), which the results agree with to the last bit that rounding leaves; or, for
            noisy measurements, mmps, pigdm or dps. By default projection, and mmps where there is noise.
        noise: Standard deviation of the noise that is added to what is known, in units of images in [-1, 1].
        method_options: Options of mmps, pigdm or dps, as JSON: '{"iterations": 10}'.
        resamplings: How often each window of steps is run (RePaint's r); by default 5 under a projection, 1 by the
            other methods and by a model that is given the image.
        jump: Steps in a window (RePaint's j).
        num_samples: Results.
    """

    method: str | None = None
    noise: float = 0.0
    method_options: dict[str, int | float | bool] | None = None
    resamplings: int | None = None
    jump: int = 1
    num_samples: int = 4

    @property
    def chosen(self) -> str:
        """The method, a name of `METHODS`: the one that is given, or the one that suits the noise.

        Raises:
            ValueError: If there is no such method, or options or noise do not suit it.
        """
        check_number(least=0, noise=self.noise, hint="; images are in [-1, 1]")
        method = self.method or ("mmps" if self.noise else PROJECTION)
        if method not in METHODS:
            raise ValueError(f"There is no method {method!r}; choose one of {', '.join(METHODS)}.")
        if method != PROJECTION and self.noise == 0:
            raise ValueError(
                f"--method {method} restores noisy measurements and --noise is 0; give --noise, such as 0.1, or leave "
                "--method out."
            )
        if method == PROJECTION and self.method_options:
            raise ValueError("--method_options are those of mmps, pigdm and dps; leave them out, or give --method.")
        return method


class Restoration(ImageEdit):
    """One restoration: of a measurement of the image, with its noise."""

    options: RestoreOptions
    measurement: Measurement
    y: Tensor
    is_given: bool

    def check(self) -> None:
        """See `Edit.check`; here the method must fit too."""
        super().check()
        _ = self.posterior

    @cached_property
    def posterior(self) -> editing.Posterior | None:
        """What wraps the denoiser for a noisy measurement; None for the projection.

        Raises:
            ValueError: As `RestoreOptions.chosen`, or if the method has no such options.
        """
        noise, method, given = self.options.noise, self.options.chosen, self.options.method_options
        if method == PROJECTION:
            return None
        options: dict[str, Any] = dict(given or {})
        if method == "pigdm":
            options.setdefault("sigma_data", float(getattr(self.model.denoiser.scaling, "sigma_data", 1.0)))
        kind = POSTERIORS[method]
        try:
            kind(self.model.denoiser, lambda x: x, torch.zeros(1), sigma_y=noise, **options)
        except TypeError as error:
            raise ValueError(f"--method_options {given} do not suit {method}: {error}.") from error
        return partial(kind, sigma_y=noise, **options)

    @cached_property
    def resamplings(self) -> int:
        """How often each window of steps is run."""
        return self.options.resamplings or (1 if self.is_given or self.posterior is not None else 5)

    def measure(self, measurement: Measurement, y: Tensor | None = None) -> None:
        """Measures the image, with noise that is the same for all results.

        Args:
            measurement: What is measured.
            y: The measurement, if it is not that of the image.
        """
        y = measurement.apply(self.image) if y is None else y
        noise = torch.randn(y.shape, generator=keyed_generator("measurement", self.options.seed))
        y = y + self.options.noise * noise
        self.y = measurement.apply(y) if measurement.known is not None else y
        self.measurement = measurement
        self.is_given = self.posterior is None and measurement.condition_for(self.model, self.y) is not None

    def restore(self, function: Callable[..., Tensor], **arguments: Any) -> Tensor:
        """Draws the results.

        Args:
            function: One of `editing`.
            arguments: Its further arguments.

        Returns:
            Images (B, C, H, W) on the CPU.
        """
        count = self.options.num_samples
        rows = self.y.expand(count, -1, -1, -1)
        how = {"resamplings": self.resamplings, "jump": self.options.jump, "posterior": self.posterior}
        made: Tensor = function(self.model, rows, **arguments, **self.draw(count), **how)
        return made.cpu()

    def result(
        self, given: dict[str, Tensor], made: Tensor, facts: dict[str, Any], without_psnr: tuple[str, ...] = ()
    ) -> Edited:
        """What was made: the image, what was known of it, the results with their PSNR.

        Args:
            given: What was known, and simple ways to restore it.
            made: The results.
            facts: What else the record shall hold.
            without_psnr: Which of `given` are no restorations.
        """
        image, results, draw = self.image, decibels(made, self.image), self.draw(len(made))
        compared = {name: x for name, x in given.items() if x.shape == image.shape and name not in without_psnr}
        values = {name: decibels(x, image)[0] for name, x in compared.items()}
        cells = [Cell(image[0])]
        cells += [Cell(x[0], in_decibels(values[name]) if name in values else "") for name, x in given.items()]
        cells += [Cell(x, in_decibels(value)) for x, value in zip(made, results, strict=True)]
        figure = labelled_grid([cells], ["image", *given, *seed_names(draw["seeds"])], [""])
        record = {
            "method": self.options.chosen,
            "model_is_given_the_image": self.is_given,
            "noise": self.options.noise,
            "resamplings": self.resamplings,
            "jump": self.options.jump,
            "labels": self.names(draw["labels"])[:1],
            **facts,
            "psnr": {**values, "results": results},
            "seeds": list(draw["seeds"]),
        }
        return Edited(figure, {"input": image, **given, "result": made}, record)


def inpaint(edit: Restoration, mask: str | None = None, box: tuple[int, int, int, int] | None = None) -> Edited:
    """Fills in a part of an image; the rest of the result is the image itself, bit for bit, where there is no noise.

    Draws with ddpm where the model's own sampler is deterministic, unless told otherwise.

    Args:
        edit: Model, image, condition, sampling, method and output.
        mask: Image file that is white (or transparent) where to fill in, of the size of the image or of the model.
        box: The part to fill in as JSON, '[left, top, right, bottom]', in pixels of the model's size; by default the
            middle half.
    """
    known = _known(edit, mask, box)
    edit.measure(editing.known_pixels(known))
    made = edit.restore(editing.inpaint, known=known.expand(edit.options.num_samples, -1, -1, -1))
    shade = (1.0 - 2.0 * known.float()).expand_as(edit.image)
    facts = {
        "known_share": float(known.float().mean()),
        "labels": edit.names(edit.draw(len(made))["labels"]),
        "known_pixels_are_the_images": bool((made == edit.image)[known.expand_as(made)].all()),
        "mask": mask,
        "box": box,
    }
    return edit.result({"mask": shade, "known": edit.y}, made, facts, without_psnr=("mask", "known"))


def colorize(edit: Restoration) -> Edited:
    """Gives an image other colours: its grey stays, to the last bit that rounding leaves, where there is no noise.

    Draws with ddpm where the model's own sampler is deterministic, unless told otherwise.

    Args:
        edit: Model, image, condition, sampling, method and output.
    """
    grey = editing.to_grey(edit.image) if edit.image.shape[1] == 3 else edit.image
    edit.measure(editing.grey_of(), grey)
    made = edit.restore(editing.colorize)
    error = float((editing.to_grey(made) - edit.y).abs().max())
    return edit.result({"grey": edit.y}, made, {"grey_error": error})


def super_resolve(edit: Restoration, factor: int = 4) -> Edited:
    """Gives a small image detail: its pixels stay the means over squares of the result, where there is no noise.

    The image is fitted to the model and shrunk; one that is smaller than the model's images is fitted to the small
    size instead. Draws with ddpm where the model's own sampler is deterministic, unless told otherwise.

    Args:
        edit: Model, image, condition, sampling, method and output.
        factor: Pixels of the result along the side of one of the small image.
    """
    side = edit.model.image_shape[1]
    if factor < 2 or side % factor:
        raise ValueError(f"factor is {factor}; it must be at least 2 and divide the model's {side} pixels.")
    small = avg_pool2d(edit.image, factor)
    if edit.options.image not in (None, *SAMPLES) and min(image_size(edit.options.image)) < side:
        small = edit.options.read(edit.model, side // factor)
    edit.measure(editing.small_of(factor), small)
    made = edit.restore(editing.super_resolve)
    given = {
        "small": edit.y,
        "nearest": enlarge(edit.y, scale_factor=factor),
        "bicubic": enlarge(edit.y, scale_factor=factor, mode="bicubic"),
    }
    error = float((avg_pool2d(made, factor) - edit.y).abs().max())
    return edit.result(given, made, {"factor": factor, "mean_error": error})


def deblur(edit: Restoration, blur_sigma: float = 1.5, cutoff: float | None = None) -> Edited:
    """Takes a Gaussian blur off an image: blurred, the result is the blurred image, where there is no noise.

    Draws with ddpm where the model's own sampler is deterministic, unless told otherwise.

    Args:
        edit: Model, image, condition, sampling, method and output.
        blur_sigma: Standard deviation of the blur in pixels.
        cutoff: The projection leaves frequencies alone of which the blur has left less than this share; by default as
            much as the noise, or 0.001.
    """
    _, height, width = edit.model.image_shape
    cutoff = max(1e-3, edit.options.noise) if cutoff is None else cutoff
    edit.measure(editing.blurred(blur_sigma, height, width, cutoff))
    made = edit.restore(editing.deblur, blur_sigma=blur_sigma, cutoff=cutoff)
    error = float((edit.measurement.apply(made) - edit.y).abs().max())
    return edit.result({"blurred": edit.y}, made, {"blur_sigma": blur_sigma, "cutoff": cutoff, "blurred_error": error})


def _known(edit: Restoration, mask: str | None, box: tuple[int, int, int, int] | None) -> Tensor:
    """Which pixels are known, bool (1, 1, H, W)."""
    _, height, width = edit.model.image_shape
    if mask is not None and box is not None:
        raise ValueError("Both --mask and --box were given; give one of them.")
    known = torch.ones(1, 1, height, width, dtype=torch.bool)
    if mask is None:
        left, top, right, bottom = box or (width // 4, height // 4, 3 * width // 4, 3 * height // 4)
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError(
                f"The box [{left}, {top}, {right}, {bottom}] does not lie in the {width}x{height} pixels of the "
                "model's images; give [left, top, right, bottom] with left < right and top < bottom."
            )
        known[..., top:bottom, left:right] = False
        return known
    marked = read_pixels(mask, height, 1, resize="area")[None]
    size = image_size(mask)
    of_image = image_size(edit.options.image) if edit.options.image not in (None, *SAMPLES) else None
    if size not in ((width, height), of_image):
        whose = "" if of_image is None else f"the image's {of_image[0]}x{of_image[1]} or "
        raise ValueError(
            f"The mask {mask} is {size[0]}x{size[1]} pixels; make it {whose}the model's {width}x{height}, so that it "
            "is clear what it covers."
        )
    return marked < 128
