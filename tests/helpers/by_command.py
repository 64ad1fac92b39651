"""`python -m experiments.NAME` in this process."""

import runpy
import sys
from unittest import mock


def by_command(name, *words):
    """Runs an experiment as its command does, and gives the names that its module ends with."""
    module = f"experiments.{name}"
    sys.modules.pop(module, None)  # as in a new process
    with mock.patch.object(sys, "argv", [module, *map(str, words)]):
        return runpy.run_module(module, run_name="__main__")
