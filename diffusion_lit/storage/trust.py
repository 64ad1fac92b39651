"""Which classes a file may name: only classes that are trusted before it is opened are run.

A checkpoint describes its model by class paths and arguments, and building an object runs its class. So each class path
is looked up here before anything is imported or built. Allowed are

    classes that are defined in this project's rooms of models and data sets (`ROOMS`),
    the optimizers and learning-rate schedules of torch,
    classes that are defined in a module that the user trusts: `--trust MODULE` of every command that reads a file, or
    the environment variable DIFFUSION_LIT_TRUST, both modules joined by commas.

The module that defines a class counts, not the path that leads to it: `a.b.os.system` is no class of `a.b`.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import yaml

VARIABLE = "DIFFUSION_LIT_TRUST"
ROOMS = (*(f"diffusion_lit.{room}" for room in ("diffusion", "nets", "modules", "pretrained")), "datamodules")
OPTIMIZERS = ("torch.optim", "lightning.pytorch.cli")  # of these, optimizers and schedules alone
INSTANTIATORS = ("lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module")
TRUST_HELP = (
    "Module of your own, or of someone you trust, whose classes a checkpoint may name; the option may come again. By "
    "default a file names none but this project's classes and torch's optimizers and schedules."
)


class Untrusted(ImportError, ValueError):
    """A file names an untrusted class. It has both bases, as jsonargparse takes either for an invalid value."""


def trusted() -> tuple[str, ...]:
    """The modules that the user trusts."""
    return tuple(module for word in os.environ.get(VARIABLE, "").split(",") if (module := word.strip()))


def trust(modules: Iterable[str]) -> None:
    """Trusts further modules, in this process and in those that it starts.

    Args:
        modules: Their names; a package's includes its modules. Empty ones are left out.

    Raises:
        Untrusted: If one is no name of a module.
    """
    named = [module.strip() for module in modules if module.strip()]
    for module in named:
        if not all(part.isidentifier() for part in module.split(".")):
            raise Untrusted(f"--trust {module} is no name of a module; give one such as shapes or my_package.nets.")
    if named:
        os.environ[VARIABLE] = ",".join(dict.fromkeys([*trusted(), *named]))


@contextmanager
def trusting(modules: Iterable[str]) -> Iterator[None]:
    """Trusts further modules within this context."""
    before = os.environ.get(VARIABLE)
    try:
        trust(modules)
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before


def find_class(path: Any) -> type:
    """A class that a file names.

    Args:
        path: Its path, `package.module.Class`.

    Raises:
        Untrusted: If it is not one that a file may name, or there is none; no foreign module is imported then.
    """
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    parts = path.split(".") if isinstance(path, str) else []
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise Untrusted(f"{path!r} is no path of a class, such as diffusion_lit.nets.UNet")
    module = ".".join(parts[:-1])
    exported = module == "diffusion_lit"  # its names are defined in the rooms, which is checked below
    if not exported and not _within(module, (*ROOMS, *OPTIMIZERS, *trusted())):
        raise Untrusted(_refusal(path, module))
    try:
        found = getattr(import_module(module), parts[-1], None)
    except ImportError as error:
        raise Untrusted(f"{path} is not to be had here: {error}") from error
    if not isinstance(found, type):
        raise Untrusted(f"{path} is no class, or there is none of that name")
    ours = _within(found.__module__, (*ROOMS, *trusted()))
    if not ours and not (_within(found.__module__, OPTIMIZERS) and issubclass(found, Optimizer | LRScheduler)):
        raise Untrusted(_refusal(path, found.__module__))
    if found in (Optimizer, LRScheduler):
        raise Untrusted(f"{path} is the base of torch's optimizers or schedules and none itself; AdamW is one")
    return found


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Within this context, a refusal names the file.

    Args:
        what: The file, as a sentence begins.
    """
    try:
        yield
    except Untrusted as error:
        raise ValueError(f"{what} names a class that it may not: {error}.") from error


def _within(module: str, roots: Iterable[str]) -> bool:
    return any(module == root or module.startswith(f"{root}.") for root in roots)


def _refusal(path: str, module: str) -> str:
    return (
        f"{path} is none of this project's models, networks and data sets, nor an optimizer or schedule of torch, and "
        f"was neither imported nor run; where it is yours, give --trust {module} (in Python, set {VARIABLE}={module})"
    )


def check(value: Any) -> None:
    """Checks every class that a record names, at any depth, also in strings of YAML and JSON.

    Args:
        value: Plain values, as a file holds them.

    Raises:
        Untrusted: If one is not a class that a file may name.
    """
    left, seen = [value], set()
    while left:
        held = left.pop()
        if isinstance(held, str):
            if "&" in held and "*" in held and _has_alias(held):
                raise Untrusted("a text that holds aliases of YAML, which may stand for any amount of data")
            left += [_parsed(held)] if "class_path" in held else []
        elif isinstance(held, Mapping | list | tuple | set | frozenset) and id(held) not in seen:
            seen.add(id(held))
            left += [*held.values(), *held.keys()] if isinstance(held, Mapping) else held
            for key, named in held.items() if isinstance(held, Mapping) else ():
                if str(key).strip("_ ") == "class_path":
                    find_class(named)
                elif str(key).strip("_ ") == "instantiator" and named not in INSTANTIATORS:
                    raise Untrusted(f"{named!r} is no way to build an object that a file may name")


def _has_alias(text: str) -> bool:
    """Whether a text is YAML in which one part stands for another."""
    try:
        return any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text))
    except (yaml.YAMLError, RecursionError):
        return False


def _parsed(text: str) -> Any:
    """What a text holds as YAML, where that is more than the text."""
    try:
        parsed = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        return None
    return None if isinstance(parsed, str) else parsed


@contextmanager
def guarded() -> Iterator[None]:
    """Within this context, jsonargparse imports only trusted classes.

    `check` sees the record; this sees what jsonargparse makes of it: paths of functions or classes, short names of
    classes, files named instead of values. It needs jsonargparse's own check of paths (4.53 and later).
    """
    from jsonargparse import set_parsing_settings

    from diffusion_lit.runtime.internals import import_check

    set_parsing_settings(instantiate_subclass_spec_in_any=False)
    with import_check(find_class):
        yield
