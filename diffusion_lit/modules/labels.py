"""Parsing of class labels, and checks of guidance."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from diffusion_lit.diffusion.samplers import SAMPLERS
from diffusion_lit.modules.given import GivenImages, as_given
from diffusion_lit.modules.protocols import Model, Settings
from diffusion_lit.words import counted


def parse_labels(labels: str | None, count: int, num_classes: int, names: Sequence[str] = ()) -> Tensor | None:
    """Classes from a command line, one for each sample.

    Args:
        labels: `all`, a list of numbers or names such as `3,3,7`, or None.
        count: Number of samples.
        num_classes: Number of the model's classes, 0 for an unconditional model.
        names: Their names.

    Returns:
        Class indices of shape (count,), or None. `all` gives every class the same number of samples, one class after
        the other, the first ones one more where it does not divide; a list is repeated.

    Raises:
        ValueError: If the text is no list of classes of the model, or names more of them than there are samples.
    """
    if labels is None:
        return None
    if num_classes == 0:
        raise ValueError(f"--labels {labels} was given, but the model is unconditional; leave --labels out.")
    if labels == "all":
        each, more = divmod(count, num_classes)
        return torch.arange(num_classes).repeat_interleave(each + (torch.arange(num_classes) < more).long())
    classes = class_indices(labels, num_classes, names)
    if count < len(classes):
        raise ValueError(
            f"--labels names {len(classes)} classes for {counted(count, 'sample')}; give --num_samples {len(classes)}, "
            "or fewer classes."
        )
    return torch.tensor([classes[index % len(classes)] for index in range(count)])


def class_names_of(*known: object) -> list[str]:
    """The names of the classes from the first that knows any: of data and modules, which may be a user's own."""
    return next((list(names) for one in known if (names := getattr(one, "class_names", None))), [])


def check_null_class(module: GivenImages) -> None:
    """Refuses to train for guidance by a null class that no step would train.

    Args:
        module: The model, about to be trained.

    Raises:
        ValueError: If it draws its samples with guidance and leaves no label out.
    """
    scale, condition = module.sampling.cfg_scale, module.condition
    if condition is not None and condition.dropout == 0 and scale != 1:
        raise ValueError(
            f"The condition's dropout is 0, so that the null condition, which cfg_scale {scale:g} of "
            "model.init_args.sampling needs, would stay untrained; set its dropout to 0.1, or cfg_scale to 1."
        )
    if condition is None and module.num_classes and module.label_dropout == 0 and scale != 1:
        raise ValueError(
            f"label_dropout is 0, so that the null class, which cfg_scale {scale:g} of model.init_args.sampling needs, "
            "would stay untrained and its samples noise; set label_dropout to 0.1, or cfg_scale to 1."
        )


def class_indices(labels: str, num_classes: int, names: Sequence[str] = ()) -> list[int]:
    """Classes by number or name.

    Args:
        labels: One, or several separated by commas; a name may hold commas where it stands alone.
        num_classes: Number of the model's classes.
        names: Their names.

    Returns:
        Class indices in order.

    Raises:
        ValueError: If there is no such class.
    """
    known = [str(name) for name in names]
    found = []
    for word in [labels] if labels in known else [word.strip() for word in labels.split(",")]:
        if word in known:
            found.append(known.index(word))
        elif word.isdecimal() and int(word) < num_classes:
            found.append(int(word))
        else:
            some = f", or one of {', '.join(known[:20])}{', ...' if len(known) > 20 else ''}" if known else ""
            raise ValueError(
                f"There is no class {word!r} for --labels {labels}; give a number from 0 to {num_classes - 1}{some}."
            )
    return found


def check_guidance(
    module: Model,
    sampling: Settings,
    labelled: bool,
    cfg_scale: Any = None,
    guidance_interval: Any = None,
    guidance_rescale: float | None = None,
    guide_scale: Any = None,
) -> None:
    """Refuses guidance that does nothing and samples through a class that was never trained; warns of mixed maps.

    Args:
        module: The model.
        sampling: The settings that it is to draw by.
        labelled: Whether samples have classes or prompts.
        cfg_scale: As it was given, None where it was not.
        guidance_interval: The same.
        guidance_rescale: The same.
        guide_scale: The same.

    Raises:
        ValueError: If an option does nothing, or a class that the samples go through was left out of training.
    """
    if guide_scale is not None and sampling.guide_ckpt is None:
        raise ValueError(
            f"--guide_scale {guide_scale} does nothing without a model that guides; give --guide_ckpt CKPT, or leave "
            "it out."
        )
    given = {
        "cfg_scale": cfg_scale,
        "guidance_interval": None if sampling.autoguided else guidance_interval,
        "guidance_rescale": guidance_rescale or None,
    }
    typed = [f"--{name} {value}" for name, value in given.items() if value is not None]
    reads_text = module.prompts is not None
    scale, dropout, with_image = sampling.cfg_scale, module.label_dropout, as_given(module)
    condition = None if with_image is None else with_image.condition
    if condition is not None:  # by which it is guided, whatever the class
        if condition.dropout == 0 and scale != 1:
            raise ValueError(
                f"The model was trained with a condition of dropout 0, so that the null condition, which cfg_scale "
                f"{scale:g} needs, is untrained and gives noise; use --cfg_scale 1, or train with dropout 0.1."
            )
    elif typed and module.num_classes == 0 and not reads_text:
        raise ValueError(f"The model is unconditional, so that {typed[0]} does nothing; leave it out.")
    elif typed and not labelled and (scale not in (0, 1) or cfg_scale is None):
        how = "--prompt TEXT" if reads_text else "a class, such as all of them by --labels all"
        raise ValueError(f"{typed[0]} does nothing without something to guide to; give {how}, or leave it out.")
    idle = [option for option in typed if not option.startswith("--cfg_scale")]
    if idle and scale in (0, 1):
        raise ValueError(
            f"{idle[0]} does nothing at cfg_scale {scale:g}, where there is no guidance; give --cfg_scale."
        )
    if not module.num_classes or dropout is None:
        return
    if dropout == 0 and not labelled:
        raise ValueError(
            "The model was trained with label_dropout 0, so that its null class, through which it draws without "
            "classes, is untrained and gives noise; give classes, such as --labels all."
        )
    if dropout == 0 and scale != 1 and condition is None:
        raise ValueError(
            f"The model was trained with label_dropout 0, so that its null class, which cfg_scale {scale:g} needs, is "
            "untrained and gives noise; use --cfg_scale 1, or train with --model.init_args.label_dropout 0.1."
        )
    if dropout == 1 and labelled and scale != 0:
        raise ValueError(
            "The model was trained with label_dropout 1, so that its classes are untrained; draw without classes, or "
            "train with --model.init_args.label_dropout 0.1."
        )
    if labelled and scale not in (0, 1) and sampling.sampler in SAMPLERS and SAMPLERS[sampling.sampler].order == 0:
        rank_zero_warn(
            f"cfg_scale {scale:g} mixes two images at the ends of two paths under the sampler {sampling.sampler}, and "
            "not two slopes of one: only 0 and 1 are maps that were trained. Guidance is trained into such a model, by "
            "a guided teacher or TrainingGuidance."
        )
