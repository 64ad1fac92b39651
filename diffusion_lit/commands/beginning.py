"""Initial weights of a run, `fit --init_from`: where they are read from, and what is reported of them."""

import sys
from pathlib import Path

from jsonargparse import Namespace
from lightning.pytorch import LightningModule

from diffusion_lit.commands.configs import keys_given
from diffusion_lit.modules.base import BaseModule
from diffusion_lit.modules.labels import class_names_of
from diffusion_lit.modules.warm_start import Source, start_from
from diffusion_lit.storage.runs import find_checkpoint


def source_of(config: Namespace, command: str, run: Path) -> Source | None:
    """The initial weights of a run, read before anything else is built.

    A resumed run does not need them: its checkpoint counts, and the file may be gone.

    Args:
        config: The command's configuration; the path in it becomes that of the file.
        command: `fit`, `validate`, `test` or `predict`.
        run: The folder of all versions of this run, in which `last` and `best` are looked for.

    Returns:
        The weights, or None for a run that draws its own.

    Raises:
        ValueError: If there is no such file, it cannot be used, or the options contradict each other.
    """
    given, weights = config.get("init_from"), config.get("init_weights")
    if given is None:
        if weights != "average":
            raise ValueError(f"--init_weights {weights} is of the checkpoint that --init_from names; give that too.")
        return None
    typed = "init_from" in keys_given([], sys.argv)[-1]  # on the command line, and not in a configuration
    if command != "fit":
        if typed:
            raise ValueError(f"--init_from {given} starts a training, and `diffusion-lit {command}` does not train.")
        return None
    if config.get("ckpt_path") is not None:
        if typed:
            raise ValueError(
                f"--init_from {given} starts a new run from weights, and --ckpt_path {config.ckpt_path} goes on with "
                "one from all of its state; give one of them."
            )
        return None
    path = find_checkpoint(given, run)
    config.init_from = str(path)
    return Source.read(path, weights)


def begin(module: LightningModule, data: object, source: Source) -> list[str]:
    """Gives a module its first weights, and records where they are from.

    Args:
        module: The module.
        data: Its data module, which knows the classes' names.
        source: The weights.

    Returns:
        What was taken, layer by layer, in lines.

    Raises:
        ValueError: If nothing fits.
    """
    start = start_from(module, source, [str(name) for name in class_names_of(data, module)])
    if isinstance(module, BaseModule):
        module.init_from = start.record()
    return start.lines()
