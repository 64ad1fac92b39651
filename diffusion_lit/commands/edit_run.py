"""How a task of `diffusion-lit edit` runs: the model is loaded, the task makes its images, and they are written.

A task is a function of an `Edit`, or of a subclass that knows more (an image, a measurement), and of its own options;
it returns an `Edited`. Into its folder go figure.png (what a person looks at), the images themselves pixel for pixel,
and record.json: the model and its hash, the sampling, the options and the figures.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Any, TypedDict, get_type_hints

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from diffusion_lit.checks import check_count
from diffusion_lit.commands.edit_options import ImageOptions, Options
from diffusion_lit.diffusion.generate import Sampling
from diffusion_lit.diffusion.images import to_uint8
from diffusion_lit.diffusion.models import PixelModel
from diffusion_lit.modules.labels import check_guidance, class_indices
from diffusion_lit.report.images import png_bytes
from diffusion_lit.report.receipt_tables import plain_table
from diffusion_lit.runtime.hardware import pick_device
from diffusion_lit.runtime.versions import versions
from diffusion_lit.storage.hashing import file_record
from diffusion_lit.storage.own_files import RECORD, own_files
from diffusion_lit.storage.room import try_folder
from diffusion_lit.words import article, counted

OUT = "runs/edits"

Settings = Callable[[PixelModel], Sampling]
"""How a task samples a model unless told otherwise."""


def models_own(model: PixelModel) -> Sampling:
    """The settings that the model was trained to be sampled with."""
    return model.sampling


@dataclass(frozen=True)
class Edited:
    """What a task has made.

    Args:
        figure: What a person looks at.
        images: Images (B, C, H, W) in [-1, 1] by name, each written as NAME.png, or NAME_0.png, NAME_1.png...
        facts: Figures and whatever else the record shall hold.
        animations: GIF files by name.
        table: Figures to print, row by row.
    """

    figure: Image.Image
    images: dict[str, Tensor]
    facts: dict[str, Any]
    animations: dict[str, bytes] = field(default_factory=dict)
    table: Sequence[Sequence[str]] = ()


class Draw(TypedDict):
    """What every function of `editing` that draws images takes by keyword."""

    labels: Tensor | None
    seeds: Sequence[int]
    sampling: Sampling


class Edit:
    """One run of a task. Model and sampling are made when they are first asked for, so that options are checked before.

    Args:
        options: What was asked for.
        settings: How the task samples unless told otherwise; None where it asks no network.
    """

    options: Options

    def __init__(self, options: Options, settings: Settings | None) -> None:
        self.options, self.settings = options, settings

    @cached_property
    def model(self) -> PixelModel:
        """The model, in eval mode on its device.

        Raises:
            ValueError: If there is none, or it does not denoise, or words are given to a model of classes.
        """
        try_folder(Path(self.options.out or OUT))
        model = self.options.load_model()
        if not isinstance(model, PixelModel):
            raise ValueError(
                f"{self.options.ckpt_path} holds {article(model)}, which does not denoise; edit with a "
                "checkpoint of DDPM, EDM or LatentDiffusion."
            )
        return model.to(pick_device(self.options.device))

    @cached_property
    def sampling(self) -> Sampling:
        """The task's settings with what is given in place.

        Raises:
            ValueError: If guidance is asked for that does nothing.
        """
        options, settings = self.options, self.settings or models_own
        (sampling,) = options.settings(settings(self.model))
        labelled = bool(options.prompts) or options.labels is not None
        check_guidance(self.model, sampling, labelled, **options.guidance)
        return sampling

    def check(self) -> None:
        """Refuses settings that do not fit; called before an image is read."""
        if self.settings is not None:
            _ = self.sampling

    def seeds(self, count: int) -> range:
        """One seed per result.

        Args:
            count: Number of results.

        Returns:
            The seeds.

        Raises:
            ValueError: If there is to be no result.
        """
        check_count(num_samples=count)
        return range(self.options.seed, self.options.seed + count)

    def draw(self, count: int) -> Draw:
        """Arguments of a function of `editing` for a number of results: their one condition, their seeds, the settings.

        Raises:
            ValueError: As `conditions` and `seeds`, or if several conditions are given.
        """
        sampling, seeds, given = self.sampling, self.seeds(count), self.conditions()
        if len(given) > 1:
            raise ValueError(
                f"{counted(len(given), 'condition', 'was', 'were')} given, but this task takes one for all images; "
                "give one."
            )
        return {"labels": torch.tensor(given * count) if given else None, "seeds": seeds, "sampling": sampling}

    def conditions(self) -> list[int]:
        """The conditions given: classes by number, or prompts by place.

        Returns:
            Label indices in order; none where none is given.

        Raises:
            ValueError: If the model has no such class, or takes prompts.
        """
        options, model = self.options, self.model
        if options.prompts:
            return list(range(len(options.prompts)))
        if options.labels is None:
            return []
        if model.num_classes == 0:
            raise ValueError(
                f"--labels {options.labels} was given, but the model is unconditional; leave --labels out."
            )
        return class_indices(options.labels, model.num_classes, model.class_names)

    def several(self, needed: int, what: str) -> Tensor:
        """The conditions of a task that needs a certain number.

        Args:
            needed: How many.
            what: What they are for.

        Returns:
            Shape (needed,).

        Raises:
            ValueError: As `conditions`, or if another number is given.
        """
        given = self.conditions()
        if self.model.num_classes == 0 and self.model.prompts is None:
            raise ValueError(f"{what} needs {needed} conditions, but the model knows none; give one with classes.")
        if len(given) != needed:
            raise ValueError(
                f"{what} needs {counted(needed, 'condition')}, but {len(given)} "
                f"{'was' if len(given) == 1 else 'were'} given; write --labels with {counted(needed, 'class')} "
                "separated by commas, or --prompt as many times."
            )
        return torch.tensor(given)

    def names(self, labels: Tensor | None) -> list[str]:
        """What labels (B,) mean, in words: class names or prompts; nothing for None."""
        if labels is None:
            return []
        known = self.options.prompts or [str(name) for name in self.model.class_names]
        return [known[i] if i < len(known) else str(i) for i in labels.tolist()]

    def write(self, task: str, made: Edited) -> None:
        """Writes the results of a task in place of those of an earlier run, and prints where.

        Args:
            task: The task's name.
            made: It.

        Raises:
            OSError: If something cannot be written; the results of an earlier run are as they were.
        """
        options = self.options
        folder = Path(options.out or f"{OUT}/{task}")
        files: dict[str, Image.Image | bytes] = {"figure.png": made.figure, **made.animations}
        for name, images in made.images.items():
            for index, image in enumerate(images):
                files[f"{name}.png" if len(images) == 1 else f"{name}_{index}.png"] = to_pil_image(to_uint8(image))
        record = {
            "task": task,
            "model": self._identity(),
            **self._drawn(),
            "options": {name: value for name, value in asdict(options).items() if value not in (None, "")},
            **made.facts,
            "versions": versions(),
            "files": [*files, RECORD],
        }
        text = json.dumps(record, indent=2, allow_nan=False)
        with own_files(folder) as fresh:
            for name, content in files.items():
                (fresh / name).write_bytes(content if isinstance(content, bytes) else png_bytes(content))
            (fresh / RECORD).write_text(text)
        if options.json:
            print(text)
            return
        if made.table:
            print(plain_table(made.table))
        print(f"{task}: figure.png, record.json and the images are in {folder}/.")

    def _identity(self) -> dict[str, Any]:
        """What the model is, for the record."""
        options, model = self.options, self.model
        identity: dict[str, Any] = {"class": type(model).__name__, "image_shape": list(model.image_shape)}
        if options.ckpt_path is None:
            return {**identity, "pretrained": options.pretrained}
        return {**identity, **file_record(Path(options.ckpt_path))}

    def _drawn(self) -> dict[str, Any]:
        """How the images were drawn, for the record."""
        if self.settings is None:
            return {"sampling": None}
        drawn: dict[str, Any] = {"sampling": {**self.sampling.record(), "nfe": self.sampling.nfe}}
        guide = self.sampling.guide_of(self.model.denoiser)
        return {**drawn, "guide": guide.identity()} if guide else drawn


class ImageEdit(Edit):
    """One run of a task that starts from an image."""

    options: ImageOptions

    @cached_property
    def image(self) -> Tensor:
        """The image, fitted to the model, shape (1, C, H, W) in [-1, 1]; see `ImageOptions.read`."""
        self.check()
        return self.options.read(self.model)


def task(make: Callable[..., Edited], settings: Settings | None = models_own) -> Callable[..., None]:
    """A row of the table: the command of a task.

    Args:
        make: The task. Its first argument is an `Edit` or a kind of one; the others are its own options.
        settings: How it samples unless told otherwise; None where it asks no network.

    Returns:
        The command: a function of the options of that kind of `Edit` and of the task's own, with the task's help.
    """
    first, *own = signature(make).parameters.values()
    kind = first.annotation

    @wraps(make)
    def command(options: Options, **arguments: Any) -> None:
        edit = kind(options, settings)
        edit.write(make.__name__, make(edit, **arguments))

    options = Parameter("options", Parameter.POSITIONAL_OR_KEYWORD, annotation=get_type_hints(kind)["options"])
    command.__signature__ = Signature([options, *own])  # type: ignore[attr-defined]
    return command
