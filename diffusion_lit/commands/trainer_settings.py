"""Settings of the trainer that are refused, since Lightning would take them in silence or the average not bear them."""

import re
from pkgutil import resolve_name
from typing import Any

from diffusion_lit.checks import check_count, check_number

COUNTS_FROM_1 = ("accumulate_grad_batches", "check_val_every_n_epoch", "num_nodes")
COUNTS_FROM_0 = ("log_every_n_steps", "reload_dataloaders_every_n_epochs")
COUNTS_FROM_MINUS_1 = ("max_steps", "max_epochs", "min_steps", "min_epochs", "num_sanity_val_steps")
PRECISIONS = ("None", "32-true", "32", "bf16-mixed", "bf16", "16-mixed", "16")
SHARES_OR_COUNTS = (
    *(f"limit_{split}_batches" for split in ("train", "val", "test", "predict")),
    "val_check_interval",
    "overfit_batches",
)


def refuse_sharding(strategy: Any) -> None:
    """Refuses strategies that cut the model up, which the average of the weights cannot follow.

    Args:
        strategy: As given to the trainer: a name, a class path with its arguments, an object, or None.

    Raises:
        ValueError: If it is one of them.
    """
    path = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", None)
    if path is None:
        names = [kind.__name__ for kind in type(strategy).__mro__]
    else:
        names = [kind.__name__ for kind in resolve_name(path).__mro__] if "." in path else [path]
    name = names[0]
    if any(re.search("fsdp|deepspeed|model_?parallel", one, re.IGNORECASE) for one in names):
        raise ValueError(
            f"The strategy {name} cuts the model up, and the average of the weights needs it whole. Use "
            "--trainer.strategy ddp: 80 GB hold weights, gradients, AdamW and average (20 bytes each) of 2 billion "
            "parameters, in bf16 and with --model.init_args.net.init_args.activation_checkpointing true."
        )


def check_numbers(config: dict[str, Any]) -> None:
    """Refuses numbers that Lightning takes in silence: it would climb the loss, clip by NaN or never validate."""
    for least, names in ((1, COUNTS_FROM_1), (0, COUNTS_FROM_0), (-1, COUNTS_FROM_MINUS_1)):
        for name in names:
            given: dict[str, Any] = {f"trainer.{name}": config.get(name)}
            check_count(least, **given)
    clip: dict[str, Any] = {"trainer.gradient_clip_val": config.get("gradient_clip_val")}
    check_number(least=0, **clip)
    if config.get("enable_checkpointing") is False:
        raise ValueError("trainer.enable_checkpointing is false, but a run keeps its last checkpoint: leave it out.")
    interval = config.get("val_check_interval")
    if isinstance(interval, float) and config.get("check_val_every_n_epoch") is None:
        raise ValueError(
            f"trainer.val_check_interval is {interval}; it counts optimizer steps of the run, so give a whole number, "
            "or --trainer.check_val_every_n_epoch 1 beside a share of an epoch."
        )
    for name in SHARES_OR_COUNTS:
        if isinstance(config.get(name), int | float):  # or a length of time
            check_number(least=0, **{f"trainer.{name}": config[name]})


def refuse_precision(config: dict[str, Any]) -> None:
    """Refuses a precision in which the weights themselves, and so their average, are not in float32.

    Args:
        config: The trainer's configuration, its plugins a list.

    Raises:
        ValueError: If it is one.
    """
    asked = [config.get("precision"), *(getattr(plugin, "precision", None) for plugin in config["plugins"])]
    for precision in asked:
        if str(precision) not in PRECISIONS:
            raise ValueError(
                f"trainer.precision is {precision!r}, but weights and their average are kept in float32 here, since "
                "small steps are lost in 16 bits and figures need no 64; choose bf16-mixed, 16-mixed or 32-true."
            )
