"""TensorBoard: a logger that a full disk does not take down, and images, animated or not."""

import threading
from collections.abc import Callable
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger as LightningTensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter


class TensorBoardLogger(LightningTensorBoardLogger):
    """Lightning's TensorBoard logger, which does not take training down when its file cannot be written.

    After a failure it warns once and tries a new event file, the folder made again where it is gone; what was not yet
    on the disk is lost.
    """

    _warned = False

    def attempt(self, write: Callable[[], object]) -> None:
        """Writes, and warns where that fails.

        Args:
            write: Does it.
        """
        try:
            write()
        except (OSError, ValueError) as error:
            reason = error.__cause__ or error
            self._experiment = None
            if not self._warned:
                self._warned = True
                rank_zero_warn(f"TensorBoard's file in {self.log_dir} cannot be written: {reason}. Training goes on.")

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Logs metrics; see Lightning."""
        self.attempt(lambda: super(TensorBoardLogger, self).log_metrics(metrics, step))

    @rank_zero_only
    def log_hyperparams(self, params: Any, metrics: Any = None, step: int | None = None) -> None:
        """Logs hyperparameters; see Lightning."""
        self.attempt(lambda: super(TensorBoardLogger, self).log_hyperparams(params, metrics, step))

    @rank_zero_only
    def save(self) -> None:
        """Writes what is pending; see Lightning."""
        self.attempt(super().save)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Closes the file; see Lightning."""
        self.attempt(lambda: super(TensorBoardLogger, self).finalize(status))


def quiet_writer_threads() -> None:
    """Leaves out the traceback that TensorBoard's writer thread prints when it fails: the logger tells of it."""
    before = threading.excepthook

    def hook(args: Any) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread":
            before(args)

    threading.excepthook = hook


def log_image(writer: SummaryWriter, tag: str, encoded: bytes, size: tuple[int, int], step: int) -> None:
    """Shows an encoded picture, animated or not, in TensorBoard.

    Args:
        writer: TensorBoard's writer.
        tag: The picture's name.
        encoded: Bytes of a PNG or GIF file.
        size: Width and height in pixels.
        step: Training step that it belongs to.
    """
    image = Summary.Image(encoded_image_string=encoded, width=size[0], height=size[1], colorspace=3)
    events: Any = writer
    events._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
