"""`diffusion-lit fit`, `validate`, `test` and `predict`: LightningCLI with this project's defaults.

What it adds: `configs/base.yaml` is read before every config; the run's NAME is that of the config file, and all
that the run writes lies under `runs/NAME/version_N/`, whatever its logger; the network's channels, size and classes
come from the data; `--ckpt_path last` continues the newest version of this NAME; of `max_steps` and `max_epochs` the
one that was said last counts; abbreviations are refused; and what a user got wrong is told in a sentence.
"""

import glob
import inspect
import logging
import re
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities import rank_zero_only

import datamodules  # noqa: F401 (the classes that checkpoints and configs name)
import diffusion_lit.modules
import diffusion_lit.pretrained  # noqa: F401 (reads the autoencoders of other libraries)
from diffusion_lit.callbacks import (
    EMA,
    TF32,
    Cost,
    KeepPredictions,
    LastCheckpoint,
    LayerTable,
    LossByNoiseLevel,
    NonFiniteGuard,
    ProgressBar,
    RunSummary,
    SampleGrid,
    Throughput,
    Trajectory,
    Watchdog,
)
from diffusion_lit.callbacks.guide import KeepGuide
from diffusion_lit.callbacks.loggers import quiet_writer_threads, with_logger_named
from diffusion_lit.callbacks.loop import RunLoop
from diffusion_lit.callbacks.monitors import check_monitors
from diffusion_lit.callbacks.resume import TRAINER, Resume
from diffusion_lit.checks import check_count, check_number
from diffusion_lit.commands.beginning import begin, source_of
from diffusion_lit.commands.configs import configs_folder, with_configs_found
from diffusion_lit.commands.nulls import refuse_null_arguments, refuse_nulls
from diffusion_lit.commands.place import Place, SaveRecipe, is_rank_zero, length_said_last
from diffusion_lit.commands.resuming import differing_lines, line, names_seed, refuse_precision, say
from diffusion_lit.modules.base import BaseModule
from diffusion_lit.runtime import watchdog
from diffusion_lit.runtime.hardware import bf16_pays, channels_last_pays, device_type, use_threads
from diffusion_lit.runtime.installation import PROGRAM
from diffusion_lit.runtime.internals import class_change
from diffusion_lit.runtime.precision import TrainInBf16, use_tf32
from diffusion_lit.runtime.run_folder import RunFolder, lock_run
from diffusion_lit.runtime.sentences import debugging, plain, say_warnings_plainly, too_deep
from diffusion_lit.runtime.stopping import RunStopped, end, told
from diffusion_lit.storage.checkpoint_io import SafeCheckpointIO
from diffusion_lit.storage.checkpoints import check_training_state, read_training_state
from diffusion_lit.storage.exports import is_export
from diffusion_lit.storage.runs import find_checkpoint, run_of
from diffusion_lit.storage.trust import TRUST_HELP, trust

MAIN = Path(__file__).resolve().parents[1] / "__main__.py"
CALLBACKS: dict[str, type[Callback]] = {
    "ema": EMA,
    "guard": NonFiniteGuard,
    "checkpoint": LastCheckpoint,
    "sample_grid": SampleGrid,
    "trajectory": Trajectory,
    "loss_by_noise_level": LossByNoiseLevel,
    "tf32": TF32,
    "watchdog": Watchdog,
}


COUNTS_FROM_1 = ("accumulate_grad_batches", "check_val_every_n_epoch", "num_nodes")
COUNTS_FROM_0 = ("log_every_n_steps", "reload_dataloaders_every_n_epochs")
COUNTS_FROM_MINUS_1 = ("max_steps", "max_epochs", "min_steps", "min_epochs", "num_sanity_val_steps")
SHARES_OR_COUNTS = (
    *(f"limit_{split}_batches" for split in ("train", "val", "test", "predict")),
    "val_check_interval",
    "overfit_batches",
)


class UserError(ValueError):
    """Something that a user can put right, told in one sentence."""


def start_anew(discard: Any) -> Any:
    """Makes a part whose class is changed start from its own class's defaults.

    jsonargparse keeps what the new class takes too, defaults of the old one included: an Adam in the place of the
    default AdamW would keep AdamW's weight decay, and a paper's network the widths of the small one that a config
    before it names. A model, its data and a logger still keep it, so that `--data.class_path` alone runs a config on
    other data, and `--trainer.logger CSVLogger` writes to the same folder.

    Args:
        discard: jsonargparse's function, which drops what the new class does not take.

    Returns:
        One that drops all, of other parts than models, data and loggers.
    """

    def drop(parser_or_action: Any, previous: Any, value: Any) -> None:
        if previous and previous.get("init_args"):
            old, new = (_class_at(spec["class_path"]) for spec in (previous, value))
            if old is not new and not issubclass(new, LightningModule | LightningDataModule | Logger):
                previous["init_args"] = Namespace()
        discard(parser_or_action, previous, value)

    return drop


def _class_at(path: str) -> type:
    """The class of a full name; an unresolved short name gets a placeholder type equal to no other."""
    module, _, name = path.rpartition(".")
    found = getattr(import_module(module), name, None) if module else None
    return found if isinstance(found, type) else type(path, (), {})


set_parsing_settings(instantiate_subclass_spec_in_any=False)


class Parser(LightningArgumentParser):
    """LightningCLI's parser with errors of a sentence instead of a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Prints the message without the usage, which runs to pages, and stops with status 2.

        Args:
            message: What is wrong.
            ex: The exception behind it.

        Raises:
            SystemExit: Always.
        """
        if "maximum nesting depth" in message:
            message = str(too_deep(sys.argv[1:]) or message)
        if "arguments are required" in message:
            message += "; a config says them: --config NAME, of those that `diffusion-lit configs` lists, or a file"
        listed = "The options are listed by --help; --print_config shows the configuration."
        print(f"{PROGRAM}: {plain(message, 310)}\n{listed}", file=sys.stderr)
        raise SystemExit(2)


class CLI(LightningCLI):
    """LightningCLI with base config, run names, links from data to network, and resumption by name."""

    begun_at = 0  # the step of the checkpoint that is gone on from
    trained_in: str | None = None  # and its precision
    recorded: dict[str, Any] | None = None  # and its settings

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The subcommand that runs, by its name: to make the parsers of all four takes four times as long."""
        every = LightningCLI.subcommands()
        return {name: every[name] for name in sys.argv[1:2] if name in every} or every

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `--name`, the callbacks that every run has, and the links from the data to the network."""
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="Name of the run, whose results go to runs/NAME/version_N; the config's file name by default.",
        )
        parser.add_argument(
            "--compile",
            type=bool,
            default=False,
            help="Compiles the network, and nothing else; --model.compile says the same.",
        )
        parser.add_argument(
            "--channels_last",
            type=bool | None,
            default=None,
            help="Keeps feature maps in the layout NHWC; by default on CUDA and, in float32, on x86 CPUs.",
        )
        parser.add_argument(
            "--init_from",
            type=str | None,
            default=None,
            help="Starts from the weights of another run as far as they fit: a checkpoint, runs/NAME, an export's "
            "folder or a snapshot of averages. Optimizer, schedule and step begin anew.",
        )
        parser.add_argument(
            "--init_weights",
            type=str,
            default="average",
            help="Which of its weights: average (EMA) or raw.",
        )
        parser.add_argument("--trust", type=str | None, default=None, help=TRUST_HELP)  # `main` has taken it
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        for source, target, compute in (
            ("data.image_shape", "in_channels", lambda shape: self._net_input(shape)[0]),
            ("data.image_shape", "image_size", lambda shape: self._net_input(shape)[-1]),
            ("data.num_classes", "num_classes", int),
        ):
            target = f"model.init_args.net.init_args.{target}"
            parser.link_arguments(source, target, compute_fn=compute, apply_on="instantiate")

    def _net_input(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """Shape of what the network works on, which the class of the model knows: images, or their latents."""
        model = self.config[self.subcommand].model
        net_input = getattr(_class_at(model.class_path), "net_input", lambda shape, **_: shape)
        return tuple(int(side) for side in net_input(image_shape, **dict(model.get("init_args", {}))))

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, and lets the length of the run that was said last count."""
        with class_change(start_anew):
            super().parse_arguments(parser, args)
        config = self.config[self.config["subcommand"]]
        length_said_last(config.trainer, config.get("config") or [], sys.argv[1:])

    def _parse_ckpt_path(self) -> None:
        """Finds the checkpoint and reads its record; unlike Lightning's, it leaves the configuration alone."""
        subcommand = self.config["subcommand"]
        config = self.config[subcommand]
        trust((config.get("trust") or "").split(","))
        self.place = Place.of(config)
        self.source = source_of(config, subcommand, self.place.run)
        given = config.get("ckpt_path")
        if given is None:
            if subcommand != "fit" and not config.trainer.get("fast_dev_run"):
                raise UserError(
                    f"`{PROGRAM} {subcommand}` is for a trained model: add --ckpt_path last (of {self.place.run}), "
                    "best, runs/NAME or a file."
                )
            return
        path = find_checkpoint(given, self.place.run)
        config.ckpt_path = str(path)
        if str(path) != str(given):
            print(f"{'Continuing from' if subcommand == 'fit' else 'Using'} {path}")
        if subcommand == "fit" and is_export(path):
            raise UserError(f"{path} is an exported model without the training's state; continue a checkpoint file.")
        checkpoint = read_training_state(path, keep=True)
        if subcommand == "fit":
            check_training_state(checkpoint, path)
        folder = run_of(path)
        if folder is not None and (subcommand != "fit" or str(path) != str(given)):
            self.place.continues(folder)
            if subcommand == "fit" and is_rank_zero():
                lock_run(folder).release()  # so that it is told now; the trainer takes it again for the whole run
        settings = checkpoint.get("callbacks", {}).get("Resume", {}).get("settings")
        self.recorded = {
            **(settings if isinstance(settings, dict) else {}),
            "model": checkpoint.get("hyper_parameters", {}),
            "data": checkpoint.get("datamodule_hyper_parameters", {}),
        }
        self.weights = {name: value.shape for name, value in checkpoint["state_dict"].items()}
        self.begun_at = int(checkpoint.get("global_step", 0))
        self.trained_in = checkpoint.get("diffusion_lit", {}).get("precision", "32-true")
        self._take_seed(config, checkpoint.get("diffusion_lit", {}).get("seed"))

    def _take_seed(self, config: Namespace, recorded: int | None) -> None:
        """Goes on with the checkpoint's seed, unless one was typed or stands in a configuration that was given."""
        now = config.get("seed_everything")
        if self.config["subcommand"] != "fit" or recorded is None or now == recorded:
            return
        typed = names_seed(sys.argv, config.get("config") or [])
        if not typed:
            config.seed_everything = recorded
        say(line("seed_everything", recorded, now, "this run's" if typed else "the checkpoint's"))

    def before_instantiate_classes(self) -> None:
        """Makes the run's folder, and tells loggers of it."""
        config = self.config[self.subcommand]
        for part in ("model", "data", "trainer"):
            refuse_nulls(config.get(part), part)
        for part, callback in CALLBACKS.items():
            if not isinstance(config[part], Namespace):
                told = plain(str(config[part]).replace("None", "null"), 80)
                raise UserError(f"{part} is {told}; give a mapping of its options.")
            refuse_null_arguments(callback.__init__, vars(config[part]), part)
        refuse_sharding(config.trainer.get("strategy"))  # before it is made, which may need a library
        if not config.trainer.get("fast_dev_run"):
            self.place.settle(config, str(self.subcommand))

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Adds the callbacks that have no options, and how checkpoints are written."""
        _check_numbers_of_trainer(config)
        refuse_sharding(config.get("strategy"))
        always: list[Callback] = [Resume(self._settings()), KeepGuide(), Throughput(), RunSummary(), Cost()]
        if config.get("logger") is not False and not config.get("fast_dev_run"):
            always.append(LearningRateMonitor(logging_interval="step"))
        for key in ("callbacks", "plugins"):
            given = config.get(key) or []
            config[key] = given if isinstance(given, list) else [given]
        bars = [callback for callback in [*callbacks, *config["callbacks"]] if isinstance(callback, AnyProgressBar)]
        if config.get("enable_progress_bar") is not False and not bars:
            always.append(ProgressBar())  # where rich is installed, Lightning would take its "Epoch 1/-2"
        if config.get("enable_model_summary") is not False:
            always.append(LayerTable())
            config["enable_model_summary"] = False  # Lightning's, whose count of FLOPs is 0
        config["plugins"].append(SafeCheckpointIO())
        refuse_precision(config)
        if self.subcommand == "fit":
            self._suit_hardware(config)
        if self.subcommand == "predict":
            always.append(KeepPredictions())
        folder = [] if self.place.folder is None else [RunFolder(self.place.folder)]
        try:
            trainer = super()._instantiate_trainer(config, [*folder, *callbacks, *always])
        except (MisconfigurationException, ModuleNotFoundError, TypeError) as error:
            said = f"The trainer refuses its settings: {error}"
            if re.search("accelerator|backend|device|strategy", said):
                asked = ", ".join(f"{name} {config.get(name)!r}" for name in ("accelerator", "devices", "strategy"))
                said += f" It was given {asked}; see `{PROGRAM} doctor`."
            raise UserError(said) from error
        trainer.fit_loop = RunLoop(trainer)
        return trainer

    def _settings(self) -> dict[str, Any]:
        """The settings of average, guard and trainer that the training depends on, as plain values."""
        config = self.config[self.subcommand].as_dict()
        trainer = {name: config["trainer"].get(name) for name in TRAINER}
        return {"ema": config["ema"], "guard": config["guard"], "trainer": trainer}

    def _suit_hardware(self, config: dict[str, Any]) -> None:
        """Fills in what the user left to the hardware: threads, precision, and how cuDNN chooses its kernels.

        A run that is continued keeps the precision that it was started in. Lightning's other strategies bring plugins
        of their own for precision and stay in float32.
        """
        use_threads()
        device = device_type(str(config.get("accelerator") or "auto"))
        strategy = config.get("strategy") or "auto"
        usual = isinstance(strategy, str) and strategy.startswith(("auto", "ddp"))
        if config.get("precision") is None and usual and not any(isinstance(p, Precision) for p in config["plugins"]):
            trained_in = self.trained_in or ("bf16-mixed" if bf16_pays(device) else "32-true")
            if trained_in == "bf16-mixed":
                config["plugins"].append(TrainInBf16(device))
            else:
                config["precision"] = trained_in
        if config.get("benchmark") is None and device == "cuda" and not config.get("deterministic"):
            config["benchmark"] = True

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs, and finds words for what goes wrong on the way."""
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            started = self.trainer.global_step > self.begun_at
            stopped = told(error, started, getattr(self.datamodule, "batch_size", None), fits=subcommand == "fit")
            if stopped is None or debugging():
                raise
            raise stopped from error
        finally:
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, RunFolder):
                    callback.release()

    def after_instantiate_classes(self) -> None:
        """Suits the network to the hardware, and compares the configuration with the checkpoint."""
        self._refuse_what_the_data_decides()
        if self.source is not None:
            say(*begin(self.model, self.datamodule, self.source))
        if self.subcommand == "fit":
            check_monitors(self.trainer, self.model)
        chosen = self.config[self.subcommand].get("channels_last")
        if chosen is None:
            device = self.trainer.strategy.root_device.type
            ours = isinstance(self.model, BaseModule) and hasattr(self.model, "net")
            chosen = ours and channels_last_pays(device, self.trainer.precision)
        if chosen:
            self.model.net.to(memory_format=torch.channels_last)
        if self.config[self.subcommand].get("compile"):
            self.model.net.compile()  # in place, so that the names of the weights stay
        recorded = self.recorded or {}
        if self.subcommand == "fit" and recorded.get("model"):
            now = {**self._settings(), "model": dict(self.model.hparams), "data": dict(self.datamodule.hparams)}
            before = {**recorded, "precision": self.trained_in}
            now["precision"] = str(self.trainer.precision)
            same = self.weights == {name: value.shape for name, value in self.model.state_dict().items()}
            say(*differing_lines(str(self.config["fit"].ckpt_path), before, now, same))

    def _refuse_what_the_data_decides(self) -> None:
        """Refuses a size, channels or classes of the network that were typed and are not the data's."""
        net = self.config[self.subcommand].model.init_args.get("net")
        if net is None or not hasattr(self.model, "net"):
            return
        parameters = inspect.signature(type(self.model.net).__init__).parameters
        for name in ("in_channels", "image_size", "num_classes"):
            typed, used = net.init_args.get(name), getattr(self.model.net, name, None)
            if typed is not None and name in parameters and typed not in (parameters[name].default, used):
                raise UserError(
                    f"The network's {name} is given as {typed!r}, but the data has {used!r}; it comes from the data, "
                    "so leave it out."
                )


def refuse_sharding(strategy: Any) -> None:
    """Refuses strategies that cut the model up, which the average of the weights cannot follow.

    Args:
        strategy: As given to the trainer: a name, a class path with its arguments, an object, or None.

    Raises:
        UserError: If it is one of them.
    """
    path = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", None)
    if path is None:
        names = [kind.__name__ for kind in type(strategy).__mro__]
    else:
        module, _, name = path.rpartition(".")
        names = [kind.__name__ for kind in getattr(import_module(module), name).__mro__] if module else [name]
    name = names[0]
    if any(re.search("fsdp|deepspeed|model_?parallel", one, re.IGNORECASE) for one in names):
        raise UserError(
            f"The strategy {name} cuts the model up, and the average of the weights needs it whole. Use "
            "--trainer.strategy ddp: 80 GB hold weights, gradients, AdamW and average (20 bytes each) of 2 billion "
            "parameters, in bf16 and with --model.init_args.net.init_args.activation_checkpointing true."
        )


def _check_numbers_of_trainer(config: dict[str, Any]) -> None:
    """Refuses numbers that Lightning takes in silence: it would climb the loss, clip by NaN or never validate."""
    for least, names in ((1, COUNTS_FROM_1), (0, COUNTS_FROM_0), (-1, COUNTS_FROM_MINUS_1)):
        for name in names:
            given: dict[str, Any] = {f"trainer.{name}": config.get(name)}
            check_count(least, **given)
    clip: dict[str, Any] = {"trainer.gradient_clip_val": config.get("gradient_clip_val")}
    check_number(least=0, **clip)
    if config.get("enable_checkpointing") is False:
        raise UserError("trainer.enable_checkpointing is false, but a run keeps its last checkpoint: leave it out.")
    interval = config.get("val_check_interval")
    if isinstance(interval, float) and config.get("check_val_every_n_epoch") is None:
        raise UserError(
            f"trainer.val_check_interval is {interval}; it counts optimizer steps of the run, so give a whole number, "
            "or --trainer.check_val_every_n_epoch 1 beside a share of an epoch."
        )
    for name in SHARES_OR_COUNTS:
        if isinstance(config.get(name), int | float):  # or a length of time
            check_number(least=0, **{f"trainer.{name}": config[name]})


def run(args: list[str], cli: type[CLI] = CLI) -> CLI:
    """Runs `fit`, `validate`, `test` or `predict`.

    Args:
        args: The command line, the subcommand first.
        cli: What parses and runs it.

    Returns:
        It, with the trainer, the model and the data.

    Raises:
        SystemExit: With status 2 when the user got something wrong, 130 or 143 when interrupted, 1 when the run could
            not go on.
    """
    _quiet()
    base, args = configs_folder() / "base.yaml", with_logger_named(with_configs_found(args))
    defaults = {"default_config_files": [glob.escape(str(base))], "allow_abbrev": False}
    args = [re.sub(r"^--model\.compile(?==|$)", "--compile", arg) for arg in args]
    sys.argv = [str(MAIN), *args]  # what LightningCLI reads, and the launcher that starts further ranks as this file
    try:
        return cli(
            LightningModule,
            LightningDataModule,
            parser_class=Parser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=SaveRecipe,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={name: dict(defaults) for name in cli.subcommands()}
            | {"allow_abbrev": False, "prog": PROGRAM},
            seed_everything_default=0,
        )
    except (KeyboardInterrupt, SystemExit) as error:  # Lightning turns an interrupt into an exit with status 1
        if not isinstance(error, KeyboardInterrupt) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        print(f"{PROGRAM}: Interrupted outside training.", file=sys.stderr)
        raise SystemExit(130) from error
    except RecursionError:
        raise  # `main` looks for what is nested too deeply
    except Exception as error:
        end(error, silent=isinstance(error, RunStopped) and bool(getattr(rank_zero_only, "rank", None)))
    finally:
        watchdog.rest()
        Place.leave_empty()


def _quiet() -> None:
    """Leaves out what Lightning says to advertise or to warn of what this project does on purpose."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()
    )
    for message in (
        ".*is an instance of `nn.Module` and is already saved.*",
        ".*`isinstance\\(treespec, LeafSpec\\)`.*",
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*Precision .* is not supported by the model summary.*",
        ".*Experiment logs directory .* exists and is not empty.*",
        ".*Total length of `list` across ranks is zero.*",
        ".*loading a checkpoint outside the 'fit' stage.*",
        ".*The dirpath has changed from.*",  # our record of the best goes along
    ):
        warnings.filterwarnings("ignore", message=message)
    say_warnings_plainly()
    quiet_writer_threads()
    use_tf32(False)
