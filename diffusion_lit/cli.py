"""The command, installed as `lightning` and as `diffusion-lit`.

`fit`, `validate`, `test` and `predict` are LightningCLI's: a YAML says which module, data and trainer. The other
commands need a checkpoint alone and are functions, whose arguments and docstrings are their command line and help.
Heavy imports wait until a command needs them, so that help is instant.
"""

import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from diffusion_lit.hardware import keep_freed_memory


class Command(NamedTuple):
    """A command beside LightningCLI's own: where its function lives, and its line in the help."""

    module: str
    function: str
    summary: str


COMMANDS = {
    "sample": Command("diffusion_lit.sample", "sample", "draw pictures from a checkpoint"),
    "evaluate": Command(
        "diffusion_lit.evaluation.command", "evaluate", "measure a checkpoint: FID and more, with a receipt"
    ),
    "report": Command("diffusion_lit.report.run", "report", "put a run on one HTML page: curves, samples, evaluations"),
    "export": Command("diffusion_lit.export", "export", "write a checkpoint's model as safetensors and JSON"),
}

TRAINING = {
    "fit": "train a model: lightning fit --config configs/edm_digits.yaml",
    "validate": "measure the loss on the validation split",
    "test": "measure the loss on the test split",
    "predict": "draw a sample for each test picture",
}


def help_text() -> str:
    """The text of `lightning --help`."""
    lines = ["usage: lightning COMMAND ...", "", "Train, sample and measure image diffusion models.", "", "commands:"]
    lines += [f"  {name:<10} {summary}" for name, summary in TRAINING.items()]
    lines += [f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    lines += [
        "",
        "`lightning COMMAND --help` lists a command's options. For fit, validate, test and predict:",
        "  --config configs/NAME.yaml         the experiment; configs/base.yaml is always read first",
        "  --trainer.max_steps 1000           any value can be overridden",
        "  --print_config                     shows the whole configuration and stops",
        "  --ckpt_path last                   continues the newest run of this name",
        "  fit --model.help CLASS             lists the options of a class, e.g. diffusion_lit.modules.EDM",
    ]
    return "\n".join(lines)


def main(args: list[str] | None = None) -> None:
    """Runs a command.

    Args:
        args: The command line without the program's name; the process's own by default.
    """
    args = sys.argv[1:] if args is None else args
    keep_freed_memory()
    if not args or args[0] in ("-h", "--help", "help"):
        print(help_text())
    elif args[0] in COMMANDS:
        _run_function(COMMANDS[args[0]], args)
    elif args[0] in TRAINING:
        from diffusion_lit.training import run

        run(args)
    else:
        _stop(f"There is no command {args[0]!r}; choose one of {', '.join([*TRAINING, *COMMANDS])}.")


def _run_function(command: Command, args: list[str]) -> None:
    """Parses a function's arguments from the command line and calls it; what it refuses is told in one sentence.

    A module may have a function `help_notes` whose text closes the help.
    """
    from argparse import RawDescriptionHelpFormatter
    from importlib import import_module

    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):  # type: ignore[misc]
        """Keeps the lines of description and notes as they are."""

    class Parser(ArgumentParser):  # type: ignore[misc]
        """Errors without the page of usage."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            _stop(f"{message}\nThe options are listed by: lightning {args[0]} --help")

    module = import_module(command.module)
    function: Callable[..., Any] = getattr(module, command.function)
    parser = Parser(
        prog=f"lightning {args[0]}",
        allow_abbrev=False,
        description=_summary(function),
        epilog=getattr(module, "help_notes", str)(),
        formatter_class=Formatter,
    )
    parser.add_function_arguments(function, fail_untyped=True)
    options = parser.parse_args(_spell_out_flags(args[1:], function))
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        function(**parser.instantiate_classes(options).as_dict())
    except (ValueError, OSError) as error:
        _stop(str(error))
    except KeyboardInterrupt:
        _stop("Interrupted.", status=130)


def _spell_out_flags(args: list[str], function: Callable[..., Any]) -> list[str]:
    """Lets a boolean option stand alone: `--trajectory` is `--trajectory=true`."""
    flags = {
        f"--{name}" for name, default in inspect.signature(function).parameters.items() if default.annotation is bool
    }
    following = [*args[1:], ""]
    return [
        f"{arg}=true" if arg in flags and after.lower() not in ("true", "false") else arg
        for arg, after in zip(args, following, strict=True)
    ]


def _summary(function: Callable[..., Any]) -> str:
    """A docstring up to its arguments."""
    return (function.__doc__ or "").split("Args:")[0].strip()


def _stop(message: str, status: int = 2) -> NoReturn:
    print(f"lightning: {message}", file=sys.stderr)
    raise SystemExit(status)
