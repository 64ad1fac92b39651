"""Where a command of LightningCLI writes, and what its configuration says of its name, its length and its loggers.

A run goes to `runs/NAME/version_N`, whatever its logger; `validate`, `test` and `predict` to a folder of their own
name in the run that the checkpoint comes from. A saved config.yaml is a recipe: no version and no checkpoint in it.
"""

import contextlib
import re
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from diffusion_lit.callbacks import loggers as ours
from diffusion_lit.runtime.run_folder import decide_run_folder
from diffusion_lit.storage.runs import RUNS, check_name, claim_version

UNNAMED = (None, "", "lightning_logs")
BEGUN = ("config.yaml", "hparams.yaml", "events.out.tfevents.*")  # what is written before the first step
OURS = f"{ours.TensorBoardLogger.__module__}.{ours.TensorBoardLogger.__name__}"


class Place:
    """Where a run writes.

    Args:
        root: The folder of all runs.
        name: The run's name; its versions lie in root/name.
        version: The version that was asked for, or None for the next.

    Attributes:
        folder: What this command writes to; None until it is settled.
    """

    _made: ClassVar[list[Path]] = []

    def __init__(self, root: Path, name: str, version: int | str | None) -> None:
        self.root, self.name, self.version = root, name, version
        self.folder: Path | None = None

    @classmethod
    def of(cls, config: Namespace) -> "Place":
        """Names a run: by `--name`, by its logger, or after its last config file."""
        said = [logger.init_args for logger in _loggers(config.trainer) if _makes_folders(logger)]
        name = config.get("name")
        if name is None:
            named = [init.name for init in said if init.get("name") not in UNNAMED]
            files = [str(file) for file in config.get("config") or []]
            name = str(named[0]) if named else Path(files[-1]).stem if files else "run"
        root = next((Path(init.save_dir) for init in said if init.get("save_dir")), RUNS)
        version = next((init.version for init in said if init.get("version") is not None), None)
        return cls(root, check_name(name), version)

    @property
    def run(self) -> Path:
        """The folder of all versions of the run."""
        return self.root / self.name

    def continues(self, folder: Path) -> None:
        """Takes the folder of a run that goes on.

        Args:
            folder: Its `version_N`.
        """
        run = folder.parent
        below = run.is_relative_to(self.root)
        self.root, self.name = (self.root, str(run.relative_to(self.root))) if below else (run.parent, run.name)
        self.folder = folder

    def settle(self, config: Namespace, command: str) -> None:
        """Makes the folder on rank 0, and has the loggers of a configuration write there.

        Args:
            config: The command's configuration.
            command: `fit`, `validate`, `test` or `predict`.

        Raises:
            ValueError: If a fresh run is to write over another's checkpoint.
        """
        if command != "fit":
            self.folder = (self.folder or self.run) / command
        elif self.folder is None:
            self.folder = self._fresh()
        config.name = self.name
        if command == "predict":  # which logs nothing
            config.trainer.logger = False
        for logger in _loggers(config.trainer):
            init, known = logger.init_args, signature(resolve_name(logger.class_path)).parameters
            if _makes_folders(logger):
                fit = command == "fit"
                init.save_dir, init.name = (str(self.root), self.name) if fit else (str(self.folder.parent), "")
                init.version = self.folder.name
                keep_csv(self.folder / "metrics.csv")
                continue
            for key in ("name", "run_name"):
                if key in known and init.get(key) in UNNAMED:
                    init[key] = self.name
            if "save_dir" in known and init.get("save_dir") in (None, ".", "./mlruns", str(self.root)):
                init.save_dir = str(self.folder)
            if "id" in known and init.get("id") is None and command == "fit":
                init.id = wandb_id(self.folder)

    def _fresh(self) -> Path:
        """The folder of a run that starts: the version that was asked for, or the next."""
        if self.version is None:
            if not is_rank_zero():  # rank 0 tells it
                return self.run / "version_0"
            folder = claim_version(self.run)
            self._made.append(folder)
            return folder
        folder = self.run / (self.version if isinstance(self.version, str) else f"version_{self.version}")
        if any(folder.glob("checkpoints/*.ckpt")):
            raise ValueError(
                f"version is {self.version!r}, but {folder} holds the checkpoint of another run, which a fresh one "
                f"would overwrite: leave the logger's version out (null), or go on with it by --ckpt_path {folder}."
            )
        return folder

    @classmethod
    def leave_empty(cls) -> None:
        """Removes the folders of runs that ended before their first step, with nothing but their configuration."""
        while cls._made:
            folder = cls._made.pop()
            with contextlib.suppress(OSError):  # most are not empty
                begun = [path for pattern in BEGUN for path in folder.glob(pattern)]
                if set(begun) == set(folder.iterdir()):
                    for path in begun:
                        path.unlink()
                folder.rmdir()
                folder.parent.rmdir()


class SaveRecipe(SaveConfigCallback):
    """Saves config.yaml in the run's folder, as a recipe: without the version, id and checkpoint of this run."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes it, on rank 0, of a run that trains."""
        folder = decide_run_folder(trainer)
        if stage != "fit" or self.already_saved or not trainer.is_global_zero:
            return
        self.already_saved = True
        text = self.parser.dump(self.config, skip_none=False)
        recipe = yaml.safe_load(text)
        recipe.pop("ckpt_path", None)
        loggers = recipe["trainer"].get("logger")
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if isinstance(logger, dict):
                init = logger.get("init_args", {})
                for once in ("version", "id"):
                    init.pop(once, None)
                if init.get("save_dir") == str(folder):
                    del init["save_dir"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.config_filename).write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))


def is_rank_zero() -> bool:
    """Whether this process is rank 0, as far as it can be known before the trainer is built."""
    return not getattr(rank_zero_only, "rank", 0)


def keep_csv(path: Path) -> None:
    """Renames a table of figures, which Lightning's CSVLogger would delete when its run goes on.

    Args:
        path: Its metrics.csv; what was logged before is found in metrics_before_1.csv, metrics_before_2.csv, ...
    """
    if path.is_file() and is_rank_zero():
        count = len(list(path.parent.glob("metrics_before_*.csv"))) + 1
        path.rename(path.with_name(f"metrics_before_{count}.csv"))


def wandb_id(folder: Path) -> str | None:
    """Finds the W&B run that a run's folder holds, so that a resumed run goes on there.

    Args:
        folder: The run's folder, in which W&B names a folder after date and id at each start.

    Returns:
        The id of the newest one; None where there is none.
    """
    found = [re.fullmatch(r"(?:offline-)?run-(\d+_\d+)-(.+)", path.name) for path in folder.glob("wandb/*run-*")]
    return max(((match[1], match[2]) for match in found if match), default=("", None))[1]


def length_said_last(trainer: Namespace, given: list[set[str]]) -> None:
    """Of `max_steps` and `max_epochs`, the one that was given last counts, and the other is reset.

    Both count if one file, or the command line, gives both.

    Args:
        trainer: The trainer's configuration, changed in place.
        given: From `keys_given`.
    """
    for names in reversed(given):
        if names & {"trainer.max_steps", "trainer.max_epochs"}:
            if "trainer.max_steps" not in names and (trainer.max_epochs or -1) > 0:
                trainer.max_steps = -1
            if "trainer.max_epochs" not in names and (trainer.max_steps or -1) > 0:
                trainer.max_epochs = -1
            return


def _loggers(trainer: Namespace) -> list[Any]:
    """A trainer's loggers as they stand in its configuration; this project's own where it leaves the choice."""
    given = trainer.get("logger")
    if given is True or given is None:
        trainer.logger = Namespace(
            class_path=OURS, init_args=Namespace(save_dir=str(RUNS), name=None, version=None, default_hp_metric=False)
        )
        given = trainer.logger
    loggers = given if isinstance(given, list) else [given]
    return [logger for logger in loggers if isinstance(logger, Namespace)]


def _makes_folders(logger: Namespace) -> bool:
    """Whether a logger writes to SAVE_DIR/NAME/VERSION, as Lightning's for TensorBoard and CSV do."""
    return issubclass(resolve_name(logger.class_path), TensorBoardLogger | CSVLogger)
