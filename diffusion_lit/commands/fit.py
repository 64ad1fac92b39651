"""`diffusion-lit fit`, `validate`, `test` and `predict`: LightningCLI with this project's defaults.

What it adds: `configs/base.yaml` is read before every config; the run's NAME is that of the config file, and all
that the run writes lies under `runs/NAME/version_N/`, whatever its logger; the network's channels, size and classes
come from the data; `--ckpt_path last` continues the newest version of this NAME; of `max_steps` and `max_epochs` the
one that was said last counts; abbreviations are refused; and what a user got wrong is told in a sentence.
"""

import glob
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins import Precision

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
from diffusion_lit.callbacks.monitors import MonitorCheck, check_monitors
from diffusion_lit.callbacks.resume import TRAINER, Resume
from diffusion_lit.commands.beginning import begin, source_of
from diffusion_lit.commands.configs import configs_folder, keys_given, with_configs_found
from diffusion_lit.commands.nulls import refuse_null_arguments, refuse_nulls
from diffusion_lit.commands.parser import Parser, class_at, start_anew
from diffusion_lit.commands.place import Place, SaveRecipe, is_rank_zero, length_said_last
from diffusion_lit.commands.resuming import Resumed, differing_lines, line, say
from diffusion_lit.commands.trainer_settings import check_numbers, refuse_precision, refuse_sharding
from diffusion_lit.modules.base import BaseModule
from diffusion_lit.modules.guides import expect_guide
from diffusion_lit.runtime import watchdog
from diffusion_lit.runtime.hardware import bf16_pays, channels_last_pays, device_type, use_threads
from diffusion_lit.runtime.installation import PROGRAM
from diffusion_lit.runtime.internals import class_change
from diffusion_lit.runtime.precision import TrainInBf16, use_tf32
from diffusion_lit.runtime.run_folder import RunFolder, lock_run
from diffusion_lit.runtime.sentences import debugging, plain, quiet_lightning, say_warnings_plainly
from diffusion_lit.runtime.stopping import RunStopped, end, told
from diffusion_lit.storage.checkpoint_io import SafeCheckpointIO
from diffusion_lit.storage.checkpoints import check_training_state, read_training_state
from diffusion_lit.storage.exports import is_export
from diffusion_lit.storage.runs import find_checkpoint, run_of
from diffusion_lit.storage.trust import trust

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
set_parsing_settings(instantiate_subclass_spec_in_any=False)


class CLI(LightningCLI):
    """LightningCLI with base config, run names, links from data to network, and resumption by name."""

    resumed: Resumed | None = None

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The subcommand that runs, by its name: to make the parsers of all four takes four times as long."""
        every = LightningCLI.subcommands()
        return {name: every[name] for name in sys.argv[1:2] if name in every} or every

    def add_arguments_to_parser(self, parser: Parser) -> None:
        """Adds the options of a run, the callbacks that every run has, and the links from the data to the network."""
        parser.add_run_options()
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
        net_input = getattr(class_at(model.class_path), "net_input", lambda shape, **_: shape)
        return tuple(int(side) for side in net_input(image_shape, **dict(model.get("init_args", {}))))

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, and lets the length of the run that was said last count."""
        with class_change(start_anew):
            super().parse_arguments(parser, args)
        config = self.config[self.config["subcommand"]]
        length_said_last(config.trainer, keys_given(config.get("config") or [], sys.argv))

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
                raise ValueError(
                    f"`{PROGRAM} {subcommand}` is for a trained model: add --ckpt_path last (of {self.place.run}), "
                    "best, runs/NAME or a file."
                )
            return
        path = find_checkpoint(given, self.place.run)
        config.ckpt_path = str(path)
        if str(path) != str(given):
            print(f"{'Continuing from' if subcommand == 'fit' else 'Using'} {path}")
        if subcommand == "fit" and is_export(path):
            raise ValueError(f"{path} is an exported model without the training's state; continue a checkpoint file.")
        checkpoint = read_training_state(path, keep=True)
        if subcommand == "fit":
            check_training_state(checkpoint, path)
        folder = run_of(path)
        if folder is not None and (subcommand != "fit" or str(path) != str(given)):
            self.place.continues(folder)
            if subcommand == "fit" and is_rank_zero():
                lock_run(folder).release()  # to report it now; the trainer takes it again for the whole run
        self.resumed = Resumed.of(checkpoint, path)
        self._take_seed(config, self.resumed.seed)

    def _take_seed(self, config: Namespace, recorded: int | None) -> None:
        """Goes on with the checkpoint's seed, unless one was typed or stands in a configuration that was given."""
        now = config.get("seed_everything")
        if self.config["subcommand"] != "fit" or recorded is None or now == recorded:
            return
        typed = any("seed_everything" in names for names in keys_given(config.get("config") or [], sys.argv))
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
                raise ValueError(f"{part} is {told}; give a mapping of its options.")
            refuse_null_arguments(callback.__init__, vars(config[part]), part)
        refuse_sharding(config.trainer.get("strategy"))  # before it is made, which may need a library
        if not config.trainer.get("fast_dev_run"):
            self.place.settle(config, str(self.subcommand))

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Adds the callbacks that have no options, and how checkpoints are written."""
        check_numbers(config)
        refuse_sharding(config.get("strategy"))
        always: list[Callback] = [
            Resume(self._settings()),
            KeepGuide(),
            Throughput(),
            RunSummary(),
            Cost(),
            MonitorCheck(),
        ]
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
            raise ValueError(said) from error
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
            suits = "bf16-mixed" if bf16_pays(device) else "32-true"
            precision = suits if self.resumed is None else self.resumed.precision
            if precision == "bf16-mixed":
                config["plugins"].append(TrainInBf16(device))
            else:
                config["precision"] = precision
        if config.get("benchmark") is None and device == "cuda" and not config.get("deterministic"):
            config["benchmark"] = True

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs, and finds words for what goes wrong on the way."""
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            started = self.trainer.global_step > (0 if self.resumed is None else self.resumed.step)
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
        if self.subcommand == "fit" and self.resumed is None:
            expect_guide(self.model, self.datamodule)
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
        if self.subcommand == "fit" and self.resumed is not None and self.resumed.settings["model"]:
            now = {**self._settings(), "model": dict(self.model.hparams), "data": dict(self.datamodule.hparams)}
            shapes = {name: value.shape for name, value in self.model.state_dict().items()}
            say(*differing_lines(self.resumed, now, str(self.trainer.precision), shapes == self.resumed.shapes))

    def _refuse_what_the_data_decides(self) -> None:
        """Refuses a size, channels or classes of the network that were typed and are not the data's."""
        net = self.config[self.subcommand].model.init_args.get("net")
        if net is None or not hasattr(self.model, "net"):
            return
        parameters = inspect.signature(type(self.model.net).__init__).parameters
        for name in ("in_channels", "image_size", "num_classes"):
            typed, used = net.init_args.get(name), getattr(self.model.net, name, None)
            if typed is not None and name in parameters and typed not in (parameters[name].default, used):
                raise ValueError(
                    f"The network's {name} is given as {typed!r}, but the data has {used!r}; it comes from the data, "
                    "so leave it out."
                )


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
    quiet_lightning()
    say_warnings_plainly()
    quiet_writer_threads()
    use_tf32(False)
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
        end(error, silent=isinstance(error, RunStopped) and not is_rank_zero())
    finally:
        watchdog.rest()
        Place.leave_empty()
