"""Refuses null where a class or a command takes none: jsonargparse lets it pass, and code would fail on it later."""

import inspect
import types
from collections.abc import Callable, Iterator
from pkgutil import resolve_name
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jsonargparse import Namespace

from diffusion_lit.runtime.sentences import type_in_words
from diffusion_lit.words import article

LINKED = ("in_channels", "image_size", "num_classes")  # of networks, which the data decides


def refuse_nulls(config: Any, key: str = "") -> None:
    """Looks through a configuration for arguments that are null and must not be.

    Args:
        config: Namespaces, dictionaries and lists of plain values.
        key: Where it stands.

    Raises:
        ValueError: If there is one; it is named with what it takes.
    """
    if isinstance(config, list):
        for one in config:
            refuse_nulls(one, key)
    config = vars(config) if isinstance(config, Namespace) else config
    if not isinstance(config, dict):
        return
    path, given = config.get("class_path"), config.get("init_args")
    arguments = vars(given) if isinstance(given, Namespace) else given
    if isinstance(path, str) and "." in path and isinstance(arguments, dict):
        for function, own in _constructors(resolve_name(path), arguments):
            refuse_null_arguments(function, own, key)
    for name, part in config.items():
        refuse_nulls(part, key if name == "init_args" else f"{key}.{name}".strip("."))


def _constructors(kind: Any, arguments: dict[str, Any]) -> Iterator[tuple[Callable[..., Any], dict[str, Any]]]:
    """The constructor of a class, and those of its bases that it passes further arguments on to, with their own."""
    for base in kind.__mro__ if isinstance(kind, type) else ():
        constructor = vars(base).get("__init__")
        if constructor is None:
            continue
        known = inspect.signature(constructor).parameters
        yield constructor, {name: value for name, value in arguments.items() if name in known}
        arguments = {name: value for name, value in arguments.items() if name not in known}
        if all(one.kind is not one.VAR_KEYWORD for one in known.values()):
            return


def refuse_null_arguments(function: Callable[..., Any], arguments: dict[str, Any], key: str = "") -> None:
    """Refuses null for an argument of a function that is annotated with other types, and whose default is not null.

    Args:
        function: The function.
        arguments: Values by name, of which it may take some.
        key: Where they stand in a configuration.

    Raises:
        ValueError: If there is such a null.
    """
    nulls = [name for name, value in arguments.items() if value is None and name not in LINKED]
    if not nulls:
        return
    parameters, hints = inspect.signature(function).parameters, _hints(function)
    for name in nulls:
        kind = hints.get(name, Any)
        if name in parameters and parameters[name].default is not None and not _takes_null(kind):
            raise ValueError(f"{f'{key}.{name}'.strip('.')} is null; give {_words(kind)}.")


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(function)
    except (NameError, TypeError, AttributeError):  # of names that are there for type checkers alone
        return {}


def _takes_null(kind: Any) -> bool:
    if get_origin(kind) in (Union, types.UnionType):
        return any(_takes_null(one) for one in get_args(kind))
    return kind in (Any, None, type(None), object) or not (isinstance(kind, type) or get_origin(kind))


def _words(kind: Any) -> str:
    """A type in a user's words."""
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_words(one) for one in get_args(kind))
    words = type_in_words(str(kind if get_origin(kind) in (None, Literal) else get_origin(kind)))
    return words if " " in words else f"{article('class' if words == 'Callable' else words)} by class_path"
