"""Runs in a fork of this process that are killed at planned moments, and the bitwise comparison of two runs."""

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion_lit.report.events import read_history

CLOCK = ("images_per_second", "seconds", "hours", "load")  # figures that depend on the clock


@dataclass(frozen=True)
class Kill:
    """When a run is killed: at a `step`, `saving` or at a `validation` after so many, or a `moment` in 1/1000 of it."""

    kind: str
    at: int


def run(args: list[str], kill: Kill | None = None, seconds: float = 0.0) -> int:
    """Runs the command in a fork of this process, in a session of its own that can be killed as a whole.

    Args:
        args: The command line.
        kill: When to kill it; None for not at all.
        seconds: How long it takes unbroken.

    Returns:
        Its exit status, negative for the signal that ended it.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _be_the_run(args, kill)
    moment = kill is not None and kill.kind == "moment"
    deadline = time.monotonic() + kill.at / 1000 * seconds if moment and kill is not None else None
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            _end_session(child)  # ranks of a run whose first process is gone
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() > deadline:
            _end_session(child)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.01)


def _end_session(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def _be_the_run(args: list[str], kill: Kill | None) -> None:
    """The fork's work; never returns."""
    status = 70
    try:
        os.setsid()
        name = next(arg.split("=")[1] for arg in args if arg.startswith("--name="))
        log = os.open(f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if kill is not None and kill.kind != "moment":
            {"saving": kill_while_saving, "step": kill_after_step, "validation": kill_before_saving}[kill.kind](kill.at)
        from diffusion_lit.commands.main import main

        main(args)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def kill_while_saving(let_through: int) -> None:
    """Kills all processes of the run in the middle of a checkpoint's write."""
    from diffusion_lit.storage import checkpoint_io as module

    checkpoint_io: Any = module
    before: Callable[..., None] = checkpoint_io._save
    left = [let_through]

    def save(content: dict[str, Any], file: Any) -> None:
        if left[0] == 0:
            before(content, file)
            file.flush()
            os.ftruncate(file.fileno(), file.tell() // 2)
            os.killpg(os.getpgid(0), signal.SIGKILL)
        left[0] -= 1
        before(content, file)

    checkpoint_io._save = save


def kill_after_step(step: int) -> None:
    """Kills all processes of the run as soon as the checkpoint that is due after a step has its name.

    Args:
        step: Number of steps taken, or the first after it that this run takes.
    """
    from diffusion_lit.callbacks import LastCheckpoint

    patched: Any = LastCheckpoint
    before = patched.on_step_end
    started: dict[str, int] = {}

    def hook(self: Any, trainer: Any) -> None:
        before(self, trainer)
        accumulates = trainer.fit_loop._should_accumulate()
        if not accumulates and trainer.global_step >= max(step, started.setdefault("at", trainer.global_step)):
            if trainer.is_global_zero:
                os.killpg(os.getpgid(0), signal.SIGKILL)
            time.sleep(60)  # a further rank waits for its end

    patched.on_step_end = hook


def kill_before_saving(let_through: int) -> None:
    """Kills all processes of the run after a validation and its images, before the checkpoint is saved."""
    from diffusion_lit.callbacks import LastCheckpoint

    patched: Any = LastCheckpoint
    before = patched.on_validation_end
    left = [let_through]

    def hook(self: Any, trainer: Any, *args: Any) -> None:
        if left[0] == 0 and trainer.is_global_zero:
            os.killpg(os.getpgid(0), signal.SIGKILL)
        left[0] -= 1
        before(self, trainer, *args)

    patched.on_validation_end = hook


def checkpoint(name: str) -> Path:
    """The last checkpoint of a run."""
    return Path("runs") / name / "version_0" / "checkpoints" / "last.ckpt"


def compare(whole: str, killed: str) -> list[str]:
    """The bitwise differences between two runs."""
    one, two = (torch.load(checkpoint(name), weights_only=True) for name in (whole, killed))
    parts = {
        "raw weights": "current_model_state",
        "average weights": "state_dict",
        "optimizer": "optimizer_states",
        "schedule": "lr_schedulers",
        "global step": "global_step",
    }
    differs = [what for what, key in parts.items() if not equal(one[key], two[key])]
    folders = [Path("runs") / name / "version_0" for name in (whole, killed)]
    mine, theirs = map(figures, folders)
    for tag in sorted(mine.keys() | theirs.keys()):
        if mine.get(tag) != theirs.get(tag):
            steps = sorted(step for step in mine.get(tag, {}) if mine[tag][step] != theirs.get(tag, {}).get(step))
            differs.append(f"{tag} of steps {steps}")
    images = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*/*.*") if drawn(path)}
        for folder in folders
    ]
    differs += [
        str(name) for name in sorted(images[0].keys() | images[1].keys()) if images[0].get(name) != images[1].get(name)
    ]
    return differs


def drawn(path: Path) -> bool:
    """Whether a file of a run is an image or a snapshot of an average."""
    return path.suffix in (".png", ".gif", ".safetensors")


def equal(one: Any, two: Any) -> bool:
    """Whether two nested values are the same to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(equal, one, two))
    return bool(one == two)


def figures(folder: Path) -> dict[str, dict[int, float]]:
    """All logged figures by tag and step, without those of the clock; of a repeated step, the later."""
    return {
        tag: dict(zip(steps.tolist(), values.tolist(), strict=True))
        for tag, (steps, values) in read_history(folder).scalars.items()
        if not any(word in tag for word in CLOCK)
    }
