"""`diffusion-lit completion bash`: a script that completes commands, options and configurations in a shell."""

import argparse
import contextlib
from importlib import import_module
from typing import Any

from diffusion_lit.commands.configs import config_names
from diffusion_lit.runtime.internals import subcommand_parsers

CONFIG = {"bash": "_diffusion_lit_configs", "zsh": "_diffusion_lit_configs"}
PREAMBLE = {
    "bash": '_diffusion_lit_configs() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}',
    "zsh": "_diffusion_lit_configs() {{ compadd {names}; _files; }}",
}


def bash() -> None:
    """Prints the script for bash; put it to use by: eval "$(diffusion-lit completion bash)" in ~/.bashrc."""
    print(script("bash"))


def zsh() -> None:
    """Prints that for zsh; put it to use by: eval "$(diffusion-lit completion zsh)" after compinit in ~/.zshrc."""
    print(script("zsh"))


SHELLS = {"bash": bash, "zsh": zsh}


def script(shell: str) -> str:
    """The script that completes both names of the command.

    Args:
        shell: bash or zsh.

    Returns:
        It.

    Raises:
        ValueError: If the package shtab is missing.
    """
    try:
        import shtab
    except ImportError as error:
        raise ValueError("Completion needs the package shtab: pip install 'diffusion-lit[completion]'.") from error
    preamble = PREAMBLE[shell].format(names=" ".join(config_names()))
    parser, scripts = whole_parser(), []
    for parser.prog in ("diffusion-lit", "lightning"):
        scripts.append(shtab.complete(parser, shell, preamble=preamble))
    return "\n".join(scripts)


def whole_parser() -> argparse.ArgumentParser:
    """All commands as one parser, for its option names only: it is never used to parse."""
    from diffusion_lit.commands.main import COMMANDS, TRAINING, function_parser

    whole = argparse.ArgumentParser("diffusion-lit")
    whole.add_argument("--version", action="store_true", help="prints the version")
    commands = whole.add_subparsers()
    training = training_parsers()
    for name, summary in TRAINING.items():
        _copy_options(training[name], commands.add_parser(name, help=summary))
    for name, command in COMMANDS.items():
        target = getattr(import_module(command.module), command.function)
        own = commands.add_parser(name, help=command.summary)
        if isinstance(target, dict):
            tasks = own.add_subparsers()
            for task, function in target.items():
                _copy_options(function_parser(function, [name, task]), tasks.add_parser(task, help=task))
        else:
            _copy_options(function_parser(target, [name]), own)
    return whole


def training_parsers() -> dict[str, Any]:
    """The parsers of `fit`, `validate`, `test` and `predict` by name, without running anything."""
    from diffusion_lit.commands.fit import CLI, run

    parsers: dict[str, Any] = {}

    class Built(BaseException):
        """The parsers are there."""

    class Parsers(CLI):
        """A command that ends when its parsers are made."""

        def parse_arguments(self, parser: Any, args: Any) -> None:
            parsers.update(subcommand_parsers(parser))
            raise Built

    with contextlib.suppress(Built):
        run([], Parsers)
    return parsers


def _copy_options(source: Any, target: argparse.ArgumentParser) -> None:
    """Gives a parser the option names of another."""
    for action in source._actions:
        options = [option for option in action.option_strings if option not in ("-h", "--help")]
        if not options:
            continue
        copied: Any = target.add_argument(*options, metavar="VALUE")
        if "--config" in options:
            copied.complete = CONFIG
        elif action.choices and not isinstance(action.choices, dict):
            copied.choices = list(action.choices)
        else:
            copied.complete = {"bash": "_shtab_compgen_files", "zsh": "_files"}
