"""A function's arguments as a command line, for studies that take configs."""

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentParser

from diffusion_lit.runtime.stopping import end


def command(function: Callable[..., Any], args: Sequence[str] | None = None) -> None:
    """Runs a function from the command line; an error is reported in one sentence.

    Args:
        function: Its arguments are the options, its docstring is their help. A list named `config` may be given one by
            one: `--config A --config B`.
        args: The command line; the process's own by default.

    Raises:
        SystemExit: With status 2 where an option is wrong or the function refused.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = f"python -m {spec.name if function.__module__ == '__main__' and spec else function.__module__}"
    parser = ArgumentParser(prog=name, allow_abbrev=False, description=(function.__doc__ or "").split("Args:")[0])
    parser.add_function_arguments(function, fail_untyped=True)
    words = [re.sub("^--config(?==|$)", "--config+", word) for word in (sys.argv[1:] if args is None else args)]
    options = parser.parse_args(words)
    try:
        function(**parser.instantiate(options).as_dict())
    except Exception as error:
        end(error, name)
