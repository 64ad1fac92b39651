"""The command, installed as `lightning` and as `diffusion-lit`.

`fit`, `validate`, `test` and `predict` are LightningCLI's: a YAML says which module, data and trainer. The other
commands need a checkpoint alone and are functions, whose arguments and docstrings are their command line and help.
Heavy imports wait until a command needs them, so that help is instant.
"""

import inspect
import io
import locale
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, NoReturn, TextIO

from diffusion_lit import __version__
from diffusion_lit.runtime import watchdog
from diffusion_lit.runtime.hardware import keep_freed_memory
from diffusion_lit.runtime.installation import PROGRAM, foreign_lightning, refuse_hidden_datamodules
from diffusion_lit.runtime.sentences import plain, say_warnings_plainly, too_deep
from diffusion_lit.storage.trust import TRUST_HELP, trusted, trusting


class Command(NamedTuple):
    """A command beside LightningCLI's own: where its function lives, and its line in the help.

    In place of a function there may be a table of them by name, and then the command's first word is a name.
    """

    module: str
    function: str
    summary: str


COMMANDS = {
    "sample": Command("diffusion_lit.commands.sample", "sample", "draw images from a checkpoint"),
    "evaluate": Command(
        "diffusion_lit.commands.evaluate", "evaluate", "measure a checkpoint: FID and more, with a receipt"
    ),
    "report": Command(
        "diffusion_lit.commands.report", "report", "put a run on one HTML page: curves, samples, evaluations"
    ),
    "edit": Command("diffusion_lit.commands.edit", "TASKS", "edit images: `diffusion-lit edit --help` lists the tasks"),
    "export": Command("diffusion_lit.commands.export", "export", "write a checkpoint's model as safetensors and JSON"),
    "configs": Command("diffusion_lit.commands.configs", "configs", "list the experiments, or copy one to edit"),
    "doctor": Command("diffusion_lit.commands.doctor", "doctor", "what this machine has, and what would be chosen"),
    "completion": Command("diffusion_lit.commands.completion", "SHELLS", "complete commands and options in a shell"),
}

OLD_NAMES = {"picture": "image", "negative_picture": "negative_image", "label": "labels", "accelerator": "device"}

TRAINING = {
    "fit": "train a model: diffusion-lit fit --config edm_digits",
    "validate": "measure a checkpoint's loss on the validation split",
    "test": "measure a checkpoint's loss on the test split",
    "predict": "draw and keep a sample for each test image",
}


def help_text() -> str:
    """The text of `diffusion-lit --help`."""
    lines = [
        f"usage: {PROGRAM} COMMAND ...",
        "",
        "Train, sample and measure image diffusion models.",
        "",
        "commands:",
    ]
    lines += [f"  {name:<10} {summary}" for name, summary in TRAINING.items()]
    lines += [f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    lines += [
        "",
        f"`{PROGRAM} COMMAND --help` lists a command's options. For fit, validate, test and predict:",
        "  --config NAME                      the experiment: of `diffusion-lit configs`, or a YAML of yours",
        "  --trainer.max_steps 1000           any value can be overridden",
        "  --print_config                     shows the whole configuration and stops",
        "  --ckpt_path last                   continues the newest run of this name; best, runs/NAME and",
        "                                     runs/NAME/version_N are understood too, by every command",
        "  --init_from runs/NAME              starts from the weights of another run, as far as they fit",
        "  --trust MODULE                     lets a file name classes of this module; for every command",
        "  fit --model.help CLASS             lists the options of a class, e.g. diffusion_lit.modules.EDM",
        "",
        foreign_lightning() or "`lightning` is a second name of this command.",
    ]
    return "\n".join(lines)


def main(args: list[str] | None = None) -> None:
    """Runs a command.

    Args:
        args: The command line without the program's name; the process's own by default.
    """
    if args is None:
        _speak_utf8()
    args, trust = _take_texts(sys.argv[1:] if args is None else args, {"trust"})
    try:
        with trusting(module for word in trust.get("trust", []) for module in word.split(",")):
            _run(args)
            sys.stdout.flush()  # a pipe that is closed is heard of here, not after the end
    except KeyboardInterrupt:
        _stop("Interrupted.", status=130)
    except Exception as error:
        from diffusion_lit.runtime.stopping import end

        end(too_deep(args) or error if isinstance(error, RecursionError) else error)


def _speak_utf8() -> None:
    """Restarts the process in UTF-8 if the locale is another one: files are read and written in UTF-8 everywhere."""
    if locale.getpreferredencoding(False).lower() not in ("utf-8", "utf8") and os.name == "posix":
        os.environ["PYTHONUTF8"] = "1"  # of further ranks too
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # PYTHONIOENCODING may still say otherwise
            stream.reconfigure(errors="backslashreplace")


def _run(args: list[str]) -> None:
    own = trusted() or (args[:1] and args[0] in TRAINING) or any(arg.startswith("--data") for arg in args)
    if own and "" not in sys.path:  # so that a user's classes can be imported from the working directory
        sys.path.append("")
    keep_freed_memory()
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        watchdog.watch(rank=int(os.environ["LOCAL_RANK"]))  # a rank that was started by another ends with it
    if not args or args[0] in ("-h", "--help", "help"):
        print(help_text())
        return
    if args[0] == "--version":
        print(f"diffusion-lit {__version__}")
        return
    refuse_hidden_datamodules()
    if args[0] in COMMANDS:
        _run_command(COMMANDS[args[0]], args)
    elif args[0] in TRAINING:
        from diffusion_lit.commands.configs import with_configs_found

        args = with_configs_found(args)  # before the imports, which take seconds
        from diffusion_lit.commands.fit import run

        run(args)
    else:
        _stop(f"There is no command {args[0]!r}; choose one of {', '.join([*TRAINING, *COMMANDS])}.")


def _run_command(command: Command, args: list[str]) -> None:
    """Runs a command's function, or of a table the one that the next word names."""
    from importlib import import_module

    module = import_module(command.module)
    target: Any = getattr(module, command.function)
    notes = getattr(module, "help_notes", str)()
    if not isinstance(target, dict):
        _run_function(target, args[:1], args[1:], notes)
    elif args[1:] and args[1] in target:
        _run_function(target[args[1]], args[:2], args[2:], notes)
    elif args[1:] and args[1] not in ("-h", "--help", "help"):
        _stop(f"There is no task {args[1]!r} of `{PROGRAM} {args[0]}`; choose one of {', '.join(target)}.")
    else:
        lines = [f"usage: {PROGRAM} {args[0]} TASK ...", "", "tasks:"]
        lines += [f"  {name:<15} {_summary(function).splitlines()[0]}" for name, function in target.items()]
        print("\n".join([*lines, "", f"`{PROGRAM} {args[0]} TASK --help` lists a task's options."]))


def function_parser(function: Callable[..., Any], names: list[str], notes: str = "") -> Any:
    """The parser of a command that is a function.

    Args:
        function: It; an argument that is a dataclass is given by its fields.
        names: The command's words.
        notes: What stands below the options in its help.

    Returns:
        The parser.
    """
    from argparse import RawDescriptionHelpFormatter

    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

    set_parsing_settings(instantiate_subclass_spec_in_any=False)

    class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):  # type: ignore[misc]
        """Keeps the lines of description and notes as they are."""

    class Parser(ArgumentParser):  # type: ignore[misc]
        """Errors without the page of usage."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            _stop(f"{plain(message, 330)}\nThe options are listed by: {self.prog} --help")

    parser = Parser(
        prog=" ".join([PROGRAM, *names]),
        allow_abbrev=False,
        description=_summary(function),
        epilog=notes,
        formatter_class=Formatter,
    )
    spread = spread_arguments(function)
    parser.add_function_arguments(function, fail_untyped=True, skip=set(spread))
    for kind in spread.values():
        parser.add_class_arguments(kind, fail_untyped=True, instantiate=False)
    return parser


def spread_arguments(function: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of a function that are dataclasses, whose fields are options of their own."""
    parameters = inspect.signature(function).parameters
    return {name: one.annotation for name, one in parameters.items() if is_dataclass(one.annotation)}


def _run_function(function: Callable[..., Any], names: list[str], args: list[str], notes: str) -> None:
    """Parses a function's arguments from the command line and calls it; an error is reported in one sentence.

    An argument that is a dataclass is given by its fields, each an option of the command. One that is a list of texts
    is given one by one, `--prompt "a" --prompt "b"`, each as it stands.
    """
    from diffusion_lit.commands.nulls import refuse_null_arguments

    parser, spread = function_parser(function, names, notes), spread_arguments(function)
    types = {name: parameter.annotation for name, parameter in inspect.signature(function).parameters.items()}
    for kind in spread.values():
        types |= {option.name: option.type for option in fields(kind)}
    parser.add_argument("--trust", metavar="MODULE", help=TRUST_HELP)  # for the help: `main` has taken it
    args = [_renamed(arg, types) for arg in args]
    flags = {f"--{name}" for name, kind in types.items() if kind is bool}
    args, texts = _take_texts(args, {name for name, kind in types.items() if kind in (list[str], list[str] | None)})
    options = parser.parse_args(_spell_out_flags(args, flags))
    values = {**parser.instantiate_classes(options).as_dict(), **texts}
    values.pop("trust")
    for one in (function, *(kind.__init__ for kind in spread.values())):
        refuse_null_arguments(one, values)
    warnings.filterwarnings("ignore", category=FutureWarning)
    say_warnings_plainly()
    for name in ("ckpt_path", "guide_ckpt"):
        if values.get(name):
            values[name] = _find(values[name], sys.stderr if values.get("json") else sys.stdout)
    for name, kind in spread.items():
        values[name] = kind(**{option.name: values.pop(option.name) for option in fields(kind)})
    if "torch" in sys.modules:  # a command that computes nothing does without its 7 seconds
        from diffusion_lit.runtime.precision import use_tf32

        use_tf32(False)
    function(**values)


def _renamed(arg: str, known: Mapping[str, Any]) -> str:
    """An option under its present name, where it was given under an old one."""
    name, equals, value = arg.removeprefix("--").partition("=")
    new = OLD_NAMES.get(name)
    return f"--{new}{equals}{value}" if arg.startswith("--") and new in known and name not in known else arg


def _find(given: str, told_to: TextIO) -> str:
    """The checkpoint that `last`, `best` or a run's folder means, which is printed."""
    from diffusion_lit.storage.runs import find_checkpoint

    found = str(find_checkpoint(given))
    if found != given:
        print(f"Using {found}", file=told_to)
    return found


def _spell_out_flags(args: list[str], flags: set[str]) -> list[str]:
    """Lets a boolean option stand alone: `--trajectory` is `--trajectory=true`."""
    following = [*args[1:], ""]
    return [
        f"{arg}=true" if arg in flags and after.lower() not in ("true", "false") else arg
        for arg, after in zip(args, following, strict=False)
    ]


def _take_texts(args: list[str], names: set[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Takes the options that are lists of texts out of a command line: what is left of it, and the texts by name."""
    left: list[str] = []
    texts: dict[str, list[str]] = {}
    words = iter(args)
    for word in words:
        name, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in names:
            left.append(word)
            continue
        following = text if equals else next(words, None)
        if following is None:
            _stop(f"{word} stands without its text; write {word} TEXT.")
        texts.setdefault(name, []).append(following)
    return left, texts


def _summary(function: Callable[..., Any]) -> str:
    """A docstring up to its arguments."""
    return (function.__doc__ or "").split("Args:")[0].strip()


def _stop(message: str, status: int = 2) -> NoReturn:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    raise SystemExit(status)
