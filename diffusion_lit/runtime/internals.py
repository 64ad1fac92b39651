"""What is used of Lightning and jsonargparse beside their public interfaces: here, and nowhere else.

Checked with the versions below, to which pyproject.toml holds them; tests/runtime/test_internals.py fails when a name
moves. To allow a newer version: install it, run that test and tests/commands, and raise the bound in both places.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop as EvaluationLoop
from lightning.pytorch.loops.fit_loop import _FitLoop as FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop as TrainingEpochLoop

__all__ = ["EvaluationLoop", "FitLoop", "TrainingEpochLoop"]

CHECKED = {"lightning": ">=2.6.4,<2.7", "jsonargparse": ">=4.53,<4.54"}

PROTECTED = {  # what subclasses of this project read or override, by the class that has it
    "lightning.pytorch.callbacks.ModelCheckpoint": (
        *("_last_checkpoint_saved", "_last_global_step_saved", "_monitor_candidates", "_save_checkpoint"),
        *("_save_none_monitor_checkpoint", "_should_skip_saving_checkpoint"),
    ),
    "lightning.pytorch.callbacks.WeightAveraging": ("_average_model", "_swap_models"),
    "lightning.pytorch.cli.LightningCLI": ("_instantiate_trainer", "_parse_ckpt_path", "_run_subcommand"),
    "diffusion_lit.runtime.internals.TrainingEpochLoop": (
        *("_batches_that_stepped", "_should_accumulate", "_should_check_val_epoch", "_should_check_val_fx"),
    ),
    "diffusion_lit.runtime.internals.EvaluationLoop": ("_combined_loader", "_max_batches"),
}


def trainer_of(module: LightningModule) -> Trainer | None:
    """The trainer that a module is attached to, if any."""
    try:
        return module.trainer
    except RuntimeError:
        return None


def data_of(trainer: Trainer | None) -> LightningDataModule | None:
    """The data module that a trainer runs on, if any: an attribute that Lightning declares nowhere."""
    return getattr(trainer, "datamodule", None)


def parts_of(schedule: Any) -> list[Any]:
    """A learning-rate schedule and, where it is made of several (SequentialLR, ChainedScheduler), those."""
    return [schedule, *getattr(schedule, "_schedulers", [])]


def bare(optimizer: Any) -> Any:
    """PyTorch's optimizer without Lightning's wrapper."""
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def average_of(callback: WeightAveraging) -> Any:
    """The averaged model of a callback, None before training."""
    return callback._average_model


def is_built_by_command() -> bool:
    """Whether the module being made is made from a configuration or a checkpoint, whose values it records."""
    return _given_hyperparameters.get() is not None


def logs_now(trainer: Trainer) -> bool:
    """Whether figures of this step reach the loggers."""
    return trainer._logger_connector.should_update_logs


def accumulates(trainer: Trainer) -> bool:
    """Whether this batch's gradients wait for those of the next."""
    return trainer.fit_loop._should_accumulate()


def validates_next(trainer: Trainer) -> bool:
    """Whether validation follows on this training batch."""
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def ends_epoch(trainer: Trainer) -> bool:
    """Whether this training batch is the last of its epoch."""
    return bool(trainer.fit_loop.epoch_loop._num_ready_batches_reached())


def stops_early(trainer: Trainer) -> bool:
    """Whether training was told to stop and has done the least steps and epochs asked for."""
    return trainer.should_stop and trainer.fit_loop._can_stop_early


@contextmanager
def as_in_validation(trainer: Trainer) -> Iterator[None]:
    """Within, a validation may run between two steps of training."""
    first = trainer._logger_connector._first_loop_iter
    trainer.validating = True
    yield
    trainer.training = True
    trainer._logger_connector._first_loop_iter = first


def cluster_of(trainer: Trainer) -> Any:
    """Lightning's description of the cluster that the run is on."""
    return trainer._accelerator_connector.cluster_environment


def requeue_of(trainer: Trainer) -> Callable[[int, Any], None]:
    """Lightning's handler of SLURM's signal, which saves and requeues the job."""
    return trainer._signal_connector._slurm_sigusr_handler_fn


def take_sigterm(trainer: Trainer) -> bool:
    """Whether Lightning has received SIGTERM, which it forgets."""
    received, trainer._signal_connector.received_sigterm = trainer.received_sigterm, False
    return received


def subcommand_parsers(parser: Any) -> dict[str, Any]:
    """The parsers of LightningCLI's subcommands by name."""
    return dict(parser._subcommands_action._name_parser_map)


@contextmanager
def import_check(check: Callable[[str], Any]) -> Iterator[None]:
    """Within, jsonargparse asks a function before it imports what a text names, and opens no path or URL.

    Elsewhere it reads a text that is a path or a URL as a configuration, through fsspec, which imports a module by the
    protocol's name.
    """
    from jsonargparse import _paths, _typehints, _util

    def no_path(self: Any, path: Any, **kwargs: Any) -> None:
        raise TypeError(f"{path!r} is not opened: a file's arguments are values, not paths of files")  # as for no path

    with ExitStack() as stack:
        for place in (_util, _typehints):
            stack.enter_context(_replaced(place, "check_import_path", check))
        stack.enter_context(_replaced(_paths.Path, "__init__", no_path))
        yield


@contextmanager
def class_change(make: Callable[[Any], Any]) -> Iterator[None]:
    """Within, what jsonargparse does when a value's class is changed is `make` of what it did before.

    Args:
        make: Makes a function (parser, previous value, value) from jsonargparse's.
    """
    from jsonargparse import _typehints

    name = "discard_init_args_on_class_path_change"
    with _replaced(_typehints, name, make(getattr(_typehints, name))):
        yield


@contextmanager
def _replaced(place: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(place, name)  # an AttributeError here means that the version was not checked
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)
