"""Images, animations and texts for loggers, and loggers by name.

TensorBoard, W&B and CSV get the same; the TensorBoard logger survives a full disk.
"""

import csv
import threading
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.loggers import TensorBoardLogger as LightningTensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import hparams


class TensorBoardLogger(LightningTensorBoardLogger):
    """Lightning's TensorBoard logger, which does not stop training when its file cannot be written.

    After a failure it warns once and starts a new event file, in a new folder if needed; unwritten events are lost.
    """

    _warned = False

    def attempt(self, write: Callable[[], object]) -> None:
        """Writes, and warns where that fails."""
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
    def log_result(self, settings: dict[str, Any], figures: Iterable[str], step: int) -> None:
        """Shows the run under HPARAMS: a row of its settings, and the last values of its figures.

        Args:
            settings: Plain values by name.
            figures: Tags of scalars that were logged.
            step: Training step at the end.
        """
        plain = {name: one if isinstance(one, bool | int | float | str) else str(one) for name, one in settings.items()}

        def write() -> None:
            writer: Any = self.experiment
            summaries: Any = hparams  # untyped in torch
            for summary in summaries(plain, dict.fromkeys(figures)):
                writer._get_file_writer().add_summary(summary, step)

        self.attempt(write)

    @rank_zero_only
    def save(self) -> None:
        """Writes what is pending; see Lightning."""
        self.attempt(super().save)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Closes the file; see Lightning."""
        self.attempt(lambda: super(TensorBoardLogger, self).finalize(status))


def quiet_writer_threads() -> None:
    """Suppresses the traceback of TensorBoard's writer thread; the logger reports the failure."""
    before = threading.excepthook

    def hook(args: Any) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread":
            before(args)

    threading.excepthook = hook


def show_image(logger: Logger, tag: str, path: Path, size: tuple[int, int], step: int) -> None:
    """Shows an image or an animation of a run in a logger.

    A custom logger takes part if it has a method `show_image(tag, path, size, step)`; others show none.

    Args:
        logger: The logger.
        tag: The image's name, such as `samples`.
        path: Its PNG or GIF file.
        size: Width and height in pixels.
        step: Training step that it belongs to.
    """
    own = getattr(logger, "show_image", None)
    if own is not None:
        own(tag, path, size, step)
    elif isinstance(logger, LightningTensorBoardLogger):
        image = Summary.Image(encoded_image_string=path.read_bytes(), width=size[0], height=size[1], colorspace=3)
        writer: Any = logger.experiment
        writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
    elif isinstance(logger, WandbLogger):
        show: Any = logger.log_video if path.suffix == ".gif" else logger.log_image
        kind = {"format": ["gif"]} if path.suffix == ".gif" else {}
        show(tag, [str(path)], step, **kind)
    elif isinstance(logger, CSVLogger):
        _add_row(Path(logger.log_dir) / "images.csv", {"step": str(step), "tag": tag, "path": str(path)})


def note(logger: Logger, tag: str, text: str, step: int) -> None:
    """Logs a text.

    A custom logger takes part if it has a method `note(tag, text, step)`; others keep none.

    Args:
        logger: The logger.
        tag: The text's name, such as `hardware`.
        text: The text.
        step: Training step that it belongs to.
    """
    own = getattr(logger, "note", None)
    if own is not None:
        own(tag, text, step)
    elif isinstance(logger, LightningTensorBoardLogger):
        logger.experiment.add_text(tag, text, step)
    elif isinstance(logger, WandbLogger):
        logger.experiment.summary[tag] = text
    elif isinstance(logger, CSVLogger):
        _add_row(Path(logger.log_dir) / "notes.csv", {"step": str(step), "tag": tag, "text": text})


def _add_row(path: Path, row: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


LOGGERS = {
    "tensorboard": [TensorBoardLogger.__module__ + ".TensorBoardLogger"],
    "csv": ["lightning.pytorch.loggers.CSVLogger"],
    "wandb": ["lightning.pytorch.loggers.WandbLogger", "--trainer.logger.init_args.project=diffusion-lit"],
}


def with_logger_named(args: list[str]) -> list[str]:
    """Replaces a logger's short name by its class: `--trainer.logger wandb`, `csv` or `tensorboard`.

    Raises:
        ValueError: If the package of that logger is missing, or no logger has this name.
    """
    found = []
    for arg, before in zip(args, ["", *args], strict=False):
        option, _, name = arg.partition("=")
        if before == "--trainer.logger":
            option, name = "", arg
        if option not in ("", "--trainer.logger"):
            found.append(arg)
        elif name in LOGGERS:
            if name == "wandb" and find_spec("wandb") is None:
                raise ValueError("The logger wandb needs its package: pip install 'diffusion-lit[wandb]'.")
            kind, *more = LOGGERS[name]
            found += [f"{option}={kind}" if option else kind, *more]
        elif name.isalpha() and name.islower() and name not in ("true", "false", "null"):
            raise ValueError(
                f"There is no logger {name}; choose one of {', '.join(LOGGERS)}, or a class by its whole name, such as "
                "lightning.pytorch.loggers.MLFlowLogger."
            )
        else:
            found.append(arg)
    return found
