"""Early ends of a run: their causes, messages and exit statuses."""

import contextlib
import os
import re
import sys
from typing import NoReturn

import torch
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from diffusion_lit.runtime.installation import PROGRAM
from diffusion_lit.runtime.sentences import OF_THE_USER, debugging, plain, sentence

LOST_RANK = (
    *("Connection closed by peer", "Connection reset by peer", "Socket Timeout", "Timed out waiting"),
    *("Connection was likely closed", "Broken pipe"),
)

TOLD = (
    r"^(?:[\w.]*\.)?(?:ValueError|RunStopped|OSError|\w+NotFoundError|PermissionError|Untrusted|"
    r"MisconfigurationException): (.*)\Z"
)
MEMORY = (torch.OutOfMemoryError, MemoryError)
RESUME = " What was saved last is whole; go on from it with --ckpt_path last."
BUG = "This is a fault of the program: please report it with all of the above."
CLOSED = "Standard output was closed, as by `| head`, so the command ended."


class RunStopped(Exception):
    """A run that cannot go on, told in a few sentences.

    Args:
        message: What happened, what is kept, and the next step.
        status: Exit status of the command.
    """

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def told(
    error: BaseException, started: bool = False, batch_size: int | None = None, fits: bool = False
) -> RunStopped | None:
    """The message for an error that ends a command; every command uses it.

    Args:
        error: What was raised.
        started: Whether training has made a step, so that an error without an explanation is a bug, whose traceback
            is wanted.
        batch_size: The run's global batch size, where it is known.
        fits: Whether the command trains, so that there is something to go on from.

    Returns:
        One sentence with the command's exit status, or None for a bug.
    """
    if isinstance(error, RunStopped):
        return error
    if BUG in getattr(error, "__notes__", ()):
        return None
    explained = explain(error, batch_size, fits)
    if explained is not None and not started and isinstance(error, MEMORY):
        explained.status = 2  # what was asked for is too large
    if explained is None and started and not isinstance(error, OF_THE_USER):
        error.add_note(BUG)
        return None
    return explained or RunStopped(sentence(error), 2)


def end(error: Exception, name: str = PROGRAM, silent: bool = False) -> NoReturn:
    """Ends a command with what its error says; with DIFFUSION_LIT_DEBUG=1, or for a bug, the error goes on.

    Args:
        error: It.
        name: The command's name, which stands before the sentence.
        silent: Whether another rank says it.

    Raises:
        SystemExit: With the error's status.
    """
    if debugging() or (stopped := told(error)) is None:
        raise error
    if isinstance(error, BrokenPipeError):  # the rest of the output has no reader
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    elif str(stopped) and not silent:
        print(f"{name}: {stopped}", file=sys.stderr)
    raise SystemExit(stopped.status) from error


def explain(error: BaseException, batch_size: int | None = None, fits: bool = True) -> RunStopped | None:
    """The message for a failure of a running command that is not a bug.

    Args:
        error: What was raised.
        batch_size: The run's global batch size, where it is known.
        fits: Whether the command trains.

    Returns:
        What to tell the user, or None where the error has no explanation here.
    """
    text, kept = str(error), RESUME if fits else ""
    if isinstance(error, BrokenPipeError):
        return RunStopped(CLOSED + kept, 141)
    if isinstance(error, MEMORY) or "can't allocate memory" in text:
        return _out_of_memory(text, batch_size, fits)
    if isinstance(error, ProcessExitedException):
        if error.exit_code in (130, 143):
            return RunStopped("", error.exit_code)
        how = f"Rank {error.error_index} died (exit status {error.exit_code}), so the run was ended on all ranks."
        return RunStopped(how + kept)
    if isinstance(error, ProcessRaisedException) and (found := re.findall(TOLD, text, re.DOTALL | re.MULTILINE)):
        return RunStopped(plain(found[-1]), 2)
    if any(phrase in text for phrase in LOST_RANK):
        reason = next(phrase for phrase in LOST_RANK if phrase in text).lower()
        how = f"Another rank of the run is gone ({reason}), so this one stops too; its own output says why it went."
        return RunStopped(how + kept)
    return None


def _out_of_memory(text: str, batch_size: int | None, fits: bool) -> RunStopped:
    """What helps where memory is short."""
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
    wanted = f" (it asked for {asked[1]} more)" if asked else ""
    if not fits:
        return RunStopped(f"Out of memory{wanted}: give a smaller --batch_size, where the command has it.")
    return RunStopped(
        f"Out of memory{wanted} with batch_size {batch_size or 'unknown'}. What helps: a smaller "
        "--data.init_args.batch_size with --trainer.accumulate_grad_batches; --trainer.precision bf16-mixed; a smaller "
        "network; --data.init_args.on_device false; while drawing, fewer --sample_grid.rows." + RESUME
    )
