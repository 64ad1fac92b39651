"""How a run ends before its time: what stops it, what it says, and the exit status that it leaves."""

import re

import torch
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

LOST_RANK = (
    *("Connection closed by peer", "Connection reset by peer", "Socket Timeout", "Timed out waiting"),
    *("Connection was likely closed", "Broken pipe"),
)

TOLD = r"^(?:[\w.]*\.)?(?:ValueError|UserError|RunStopped|OSError|FileNotFoundError|PermissionError): (.*)\Z"


class RunStopped(Exception):
    """A run that cannot go on, told in a few sentences.

    Args:
        message: What happened, what is kept, and the next step.
        status: Exit status of the command.
    """

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def explain(error: BaseException, batch_size: int | None = None) -> RunStopped | None:
    """Words for what goes wrong while a run is going and is nobody's bug.

    Args:
        error: What was raised.
        batch_size: The run's global batch size, where it is known.

    Returns:
        What to tell the user, or None where the error has no explanation here.
    """
    text = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
        wanted = f" (it asked for {asked[1]} more)" if asked else ""
        return RunStopped(
            f"Out of memory{wanted} with batch_size {batch_size or 'unknown'}. What helps, one at a time: a smaller "
            "--data.init_args.batch_size with --trainer.accumulate_grad_batches to make up for it; --trainer.precision "
            "bf16-mixed; a smaller network (model_channels, num_blocks, attention_resolutions); "
            "--data.init_args.on_device false where the data lives on the GPU; if it happened while drawing, fewer "
            "--sample_grid.rows and columns. What was saved last is whole; go on from it with --ckpt_path last."
        )
    if isinstance(error, ProcessExitedException):
        if error.exit_code in (130, 143):
            return RunStopped("", error.exit_code)
        return RunStopped(
            f"Rank {error.error_index} died (exit status {error.exit_code}), so the run was ended on all ranks. What "
            "was saved last is whole; go on from it with --ckpt_path last."
        )
    if isinstance(error, ProcessRaisedException) and (told := re.findall(TOLD, text, re.DOTALL | re.MULTILINE)):
        return RunStopped(told[-1].strip(), 2)
    if any(phrase in text for phrase in LOST_RANK):
        reason = next(phrase for phrase in LOST_RANK if phrase in text).lower()
        return RunStopped(
            f"Another rank of the run is gone ({reason}), so this one stops too; its own output says why it went. What "
            "was saved last is whole; go on from it with --ckpt_path last."
        )
    return None
