"""The parser of `fit`, `validate`, `test` and `predict`: errors of one sentence, and defaults of a part's own class."""

import sys
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger

from diffusion_lit.runtime.installation import PROGRAM
from diffusion_lit.runtime.sentences import plain, too_deep
from diffusion_lit.storage.trust import TRUST_HELP


def start_anew(discard: Any) -> Any:
    """Makes a part whose class is changed start from its own class's defaults.

    jsonargparse keeps what the new class takes too, defaults of the old one included: an Adam in the place of the
    default AdamW would keep AdamW's weight decay, and a paper's network the widths of the small one that a config
    before it names. A model, its data and a logger still keep it, so that `--data.class_path` alone runs a config on
    other data, and `--trainer.logger CSVLogger` writes to the same folder.

    Args:
        discard: jsonargparse's function, which drops what the new class does not take.

    Returns:
        One that drops all, of other parts than models, data and loggers.
    """

    def drop(parser_or_action: Any, previous: Any, value: Any) -> None:
        if previous and previous.get("init_args"):
            old, new = (class_at(spec["class_path"]) for spec in (previous, value))
            if old is not new and not issubclass(new, LightningModule | LightningDataModule | Logger):
                previous["init_args"] = Namespace()
        discard(parser_or_action, previous, value)

    return drop


def class_at(path: str) -> type:
    """The class of a full name; an unresolved short name gets a placeholder type equal to no other."""
    try:
        found = resolve_name(path) if "." in path else None
    except (ImportError, AttributeError):
        found = None
    return found if isinstance(found, type) else type(path, (), {})


@dataclass
class RunOptions:
    """Options of the run.

    Args:
        name: Name of the run, whose results go to runs/NAME/version_N; the config's file name by default.
        compile: Compiles the network, and nothing else; --model.compile says the same.
        channels_last: Keeps feature maps in the layout NHWC; by default on CUDA and, in float32, on x86 CPUs.
        init_from: Starts from the weights of another run as far as they fit: a checkpoint, runs/NAME, an export's
            folder or a snapshot of averages. Optimizer, schedule and step begin anew.
        init_weights: Which of its weights: average (EMA) or raw.
    """

    name: str | None = None
    compile: bool = False
    channels_last: bool | None = None
    init_from: str | None = None
    init_weights: str = "average"


class Parser(LightningArgumentParser):
    """LightningCLI's parser with errors of a sentence instead of a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Prints the message without the usage, which runs to pages, and stops with status 2.

        Args:
            message: What is wrong.
            ex: The exception behind it.

        Raises:
            SystemExit: Always.
        """
        if "maximum nesting depth" in message:
            message = str(too_deep(sys.argv[1:]) or message)
        if "arguments are required" in message:
            message += "; a config says them: --config NAME, of those that `diffusion-lit configs` lists, or a file"
        listed = "The options are listed by --help; --print_config shows the configuration."
        print(f"{PROGRAM}: {plain(message, 310)}\n{listed}", file=sys.stderr)
        raise SystemExit(2)

    def add_run_options(self) -> None:
        """Adds the options that are of the run, and of no part of it."""
        self.add_class_arguments(RunOptions, instantiate=False)
        self.add_argument("--trust", type=str | None, default=None, help=TRUST_HELP)  # `main` has taken it
