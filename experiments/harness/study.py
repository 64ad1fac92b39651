"""The base of the studies: trainings, samples and their measures, and the results that are kept.

A study is a function that takes a `Study` and asks it for trained models (`fit`: each is a run of `diffusion-lit fit`,
see `runs`), for samples of them (`draw`) and for their quality (`evaluator`), and hands it figures, tables and one
finding. Under `runs/studies/NAME/` it leaves them as PNG, CSV and Markdown, together on a page (`index.html`), and as a
record (`study.json`). Interrupted and started again it goes on: trainings and samples that are there are not made
again.

    def rates(study: Study, values: list[float] = [1e-3, 1e-4]) -> None:
        '''Which learning rate is best?'''
        trained = study.fit({f"{value:g}": {"model.init_args.optimizer.init_args.lr": value} for value in values})
        evaluator = study.evaluator(trained)
        rows = [{"lr": name, **evaluator.measure(study.draw(run, evaluator))} for name, run in trained.items()]
        study.table("rates", rows)
        study.finding(f"The best learning rate is {min(rows, key=lambda row: row[evaluator.metric])['lr']}.")

    if __name__ == "__main__":
        main(rates, "configs/ddpm_digits.yaml", {"trainer.max_steps": 400})

Run as it is, it is small and works on embedded data. `--config configs/ddpm_fashion_mnist.yaml` takes another
experiment in its place, and options of `diffusion-lit fit`, such as `--data.init_args.root FOLDER`, hold for all of its
trainings.
"""

import inspect
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from diffusion_lit.commands.configs import configs_folder, find_config
from diffusion_lit.diffusion.generate import Sampling
from diffusion_lit.diffusion.images import from_uint8
from diffusion_lit.evaluation.generation import GenerationJob, Samples, class_frequencies, draw_labels, draw_samples
from diffusion_lit.modules.load import load_data, load_module
from diffusion_lit.report import Page
from diffusion_lit.report.facts import inside
from diffusion_lit.report.images import titled_grid
from diffusion_lit.runtime.hardware import hardware, pick_device
from diffusion_lit.runtime.stopping import RunStopped, end
from diffusion_lit.runtime.versions import commit
from diffusion_lit.storage.hashing import file_hash, key_of
from diffusion_lit.storage.tensors import read_tensors, write_tensors
from experiments.harness.configs import merge, read_config
from experiments.harness.evaluator import Evaluator, choose_extractor
from experiments.harness.runs import Failed, Run, Trained, fit
from experiments.harness.show import image_rows, keep_figure, keep_json, keep_table, markdown

__all__ = ["QUIET", "Evaluator", "Setup", "Study", "StudyFailed", "image_rows", "main", "markdown", "split"]

ROOT = Path("runs/studies")
QUIET = {"trainer.callbacks": [], "sample_grid.every": 0, "trajectory.every": 0}  # the study draws and measures itself


class StudyFailed(RunStopped):
    """A study cannot continue; the message is one sentence."""


@dataclass
class Setup:
    """The options of every study.

    Args:
        config: The experiment that is varied, a YAML of `diffusion-lit fit`; the study's own small one when omitted.
        out: Folder for the results; runs/studies/NAME by default, with the name of other data or another config behind.
        num_samples: Samples that each figure is measured on.
        extractor: What images are compared by: classifier, inception, pixels, ...; auto is a classifier of the data
            set where it has classes, else as in `diffusion-lit evaluate`, else thumbnails.
        extractor_weights: Local file of the extractor's weights.
        jobs: Trainings at a time, on the same device.
        gpus: Numbers of the GPUs to spread trainings over, such as [0, 1]; by default the device is the config's.
        device: Where samples are drawn: auto, cpu, cuda, ...
        batch_size: Samples drawn at a time.
        seed: Seed of the first sample.
    """

    config: str | None = None
    out: str | None = None
    num_samples: int = 1000
    extractor: str = "auto"
    extractor_weights: str | None = None
    jobs: int = 1
    gpus: list[int] | None = None
    device: str = "auto"
    batch_size: int = 250
    seed: int = 0


@dataclass
class Study:
    """A study in progress.

    Args:
        name: Its name, that of its folder.
        title: What it asks.
        setup: What it was told.
        config: The experiment that it varies.
        options: What holds for all of its trainings beside the config.
        about: A paragraph on what it does.
        command: The command line that it was started by.
    """

    name: str
    title: str
    setup: Setup
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    about: str = ""
    command: str = ""

    def __post_init__(self) -> None:
        """Makes the folder and starts the clock."""
        self.folder = Path(self.setup.out) if self.setup.out else ROOT / self.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device = pick_device(self.setup.device)
        self.shown: list[Callable[[Page], None]] = []  # what puts texts, figures and tables on the page, in their order
        self.figures: list[dict[str, str]] = []
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.findings: list[str] = []
        self.trained: dict[str, Trained] = {}
        self.failed: list[Failed] = []
        self._begin = time.perf_counter()
        self._waited = 0.0

    def fit(self, variants: Mapping[str, dict[str, Any]], config: str | None = None) -> dict[str, Trained]:
        """Trains models; finished trainings are reused.

        Args:
            variants: What differs, by the options of `diffusion-lit fit`, for each training's name.
            config: Another experiment than the study's.

        Returns:
            The trained ones by name, in order; those that failed are reported and left out.

        Raises:
            StudyFailed: If all of them failed.
        """
        runs = [Run(name, config or self.config, {**self.options, **options}) for name, options in variants.items()]
        started = time.perf_counter()
        results = fit(runs, self.folder / "runs", self.setup.jobs, self.setup.gpus, self.tell)
        self._waited += time.perf_counter() - started
        self.failed += [result for result in results if isinstance(result, Failed)]
        done = {result.run.name: result for result in results if isinstance(result, Trained)}
        self.trained |= done
        if not done:
            raise StudyFailed(f"No training of {self.name} came to its end: {self.failed[-1].reason}")
        return done

    def value(self, name: str) -> Any:
        """A setting that holds for all of the study's trainings.

        Args:
            name: As on the command line of `diffusion-lit fit`, such as `trainer.max_steps`.

        Returns:
            What the options say, else the config, else configs/base.yaml; None where none says anything.
        """
        own = merge(read_config(find_config(self.config)), self.options)
        found = inside(own, *name.split("."))
        return inside(read_config(configs_folder() / "base.yaml"), *name.split(".")) if found is None else found

    def evaluator(self, trained: "dict[str, Trained] | Path | str") -> Evaluator:
        """The evaluator of samples.

        Args:
            trained: Trainings on the same data, or a checkpoint of one.

        Returns:
            The extractor with its reference, from the cache or computed now.
        """
        path = next(iter(trained.values())).ckpt_path if isinstance(trained, dict) else trained
        return self.evaluator_on(load_data(path))

    def evaluator_on(self, data: Any) -> Evaluator:
        """The evaluator of samples against a data set.

        Args:
            data: An ImageDataModule.

        Returns:
            As `evaluator`.
        """
        data.prepare_data()
        data.setup()
        extractor = choose_extractor(data, self.setup.extractor, self.setup.extractor_weights, self.tell)
        return Evaluator(data, extractor.to(self.device), self.setup.num_samples)

    def draw(
        self,
        trained: "Trained | Path | str",
        evaluator: Evaluator,
        sampling: Sampling | None = None,
        labels: Tensor | None = None,
        count: int | None = None,
    ) -> Samples:
        """Draws samples; existing ones are reused.

        Args:
            trained: A training, or a checkpoint.
            evaluator: What they will be measured by.
            sampling: How they are drawn; as the model was trained to be when omitted.
            labels: Class of each sample, int64 (count,); by default drawn by the training set's frequencies.
            count: Number of samples; that of the setup when omitted.

        Returns:
            Their features and images, uint8 (count, C, H, W).
        """
        path = Path(trained.ckpt_path if isinstance(trained, Trained) else trained)
        module: Any = load_module(path).to(self.device)
        setting = sampling or module.sampling
        count, seed = count or self.setup.num_samples, self.setup.seed
        labels = self.labels(module, evaluator.data, count) if labels is None else labels
        record = {
            "checkpoint": file_hash(path),
            "sampling": setting.record(),
            "labels": None if labels is None else labels.tolist(),
            "extractor": evaluator.extractor.identity(),
        }
        job = GenerationJob(setting, count, seed, labels, record, self.folder / "samples", self.setup.batch_size, True)
        return draw_samples(job, module, evaluator.extractor)

    def labels(self, module: Any, data: Any, count: int | None = None) -> Tensor | None:
        """The class of each sample by a training set's frequencies.

        Args:
            module: What draws them.
            data: The data set, set up.
            count: Number of samples; that of the setup when omitted.

        Returns:
            int64 (count,), or None where the model knows no classes.
        """
        seeds = range(self.setup.seed, self.setup.seed + (count or self.setup.num_samples))
        return draw_labels(seeds, class_frequencies(data, module.num_classes))

    def keep(self, record: dict[str, Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Other results that take time: computed once and kept beside the samples.

        Args:
            record: Plain values that determine it, such as the hash of a checkpoint.
            make: Computes it.

        Returns:
            Tensors by name.
        """
        path = self.folder / "kept" / f"{key_of(record)[:16]}.safetensors"
        kept = read_tensors(path, record)
        if kept is None:
            kept = make()
            write_tensors(path, kept, record)
        return kept

    def tell(self, line: str) -> None:
        """Prints a line of progress."""
        print(f"{self.name}: {line}", flush=True)

    def text(self, paragraph: str) -> None:
        """Puts a paragraph on the page."""
        self.shown.append(lambda page: page.text(paragraph))

    def figure(self, name: str, figure: Figure | Image.Image, caption: str) -> Path:
        """Keeps a figure.

        Args:
            name: Its file's name without ending.
            figure: Drawn with matplotlib, or an image as it is.
            caption: A sentence on what it shows.

        Returns:
            The PNG file.
        """
        path = self.folder / f"{name}.png"
        if isinstance(figure, Figure):
            keep_figure(path, figure)
        else:
            figure.save(path)
        self.figures.append({"file": path.name, "caption": caption})
        self.shown.append(lambda page: page.image(path, caption))
        return path

    def images(
        self, name: str, images: Tensor | Image.Image, caption: str, columns: int = 10, names: Sequence[str] = ()
    ) -> Path:
        """Keeps images.

        Args:
            name: Their file's name without ending.
            images: uint8 or, in [-1, 1], float images (N, C, H, W) to lay out in rows, or an image as it is.
            caption: A sentence on what they show.
            columns: Images per row.
            names: What stands before each row; nothing by default.

        Returns:
            The PNG file.
        """
        if isinstance(images, Tensor):
            scaled = from_uint8(images) if images.dtype == torch.uint8 else images
            images = titled_grid(list(scaled.split(columns)), names)
        return self.figure(name, images, caption)

    def table(self, name: str, rows: list[dict[str, Any]], caption: str = "") -> None:
        """Keeps a table as CSV and Markdown, and prints it.

        Args:
            name: Its files' name without ending.
            rows: Values by column; all of the same columns.
            caption: A sentence on what it shows.
        """
        keep_table(self.folder / name, rows)
        self.tables[name] = rows
        cells = [list(row.values()) for row in rows]
        self.shown.append(lambda page: page.table(list(rows[0]), cells, caption))

    def finding(self, sentence: str) -> None:
        """States what was found, in one sentence with its numbers."""
        self.findings.append(sentence)
        self.tell(sentence)

    def write(self) -> Path:
        """Writes the page and the record.

        Returns:
            The page.
        """
        here = hardware(self.device, 1)
        seconds = {
            "training": round(sum(run.seconds for run in self.trained.values()), 1),
            "sampling and drawing": round(time.perf_counter() - self._begin - self._waited, 1),
        }
        cost = f"{seconds['training']:.0f} s of training, {seconds['sampling and drawing']:.0f} s for the rest"
        page = Page(self.title, self.name)
        for sentence in self.findings:
            page.text(sentence)
        page.text(self.about)
        page.command(self.command)
        page.text(f"{cost}; {here['device']}, {here['processor']}, {here['threads']} threads.")
        for show in self.shown:
            show(page)
        for failed in self.failed:
            page.text(f"The training {failed.run.name} failed: {failed.reason}")
        record = {
            "name": self.name,
            "title": self.title,
            "findings": self.findings,
            "command": self.command,
            "config": self.config,
            "options": self.options,
            "setup": asdict(self.setup),
            "seconds": seconds,
            "hardware": here,
            "commit": commit(),
            "figures": self.figures,
            "tables": self.tables,
            "runs": {name: str(run.folder) for name, run in self.trained.items()},
            "failed": {failed.run.name: failed.reason for failed in self.failed},
        }
        keep_json(self.folder / "study.json", record)
        page.write(self.folder / "index.html")
        self.tell(f"{cost}; see {self.folder}/index.html")
        return self.folder / "index.html"


def main(
    function: Callable[..., None],
    config: str,
    options: dict[str, Any] | None = None,
    args: list[str] | None = None,
    **defaults: Any,
) -> Study:
    """The command line of a study.

    Args:
        function: Called with the study and its own arguments, which become options; the first line of its docstring is
            the title, the rest up to its arguments what the page says about it.
        config: The small experiment that it varies by default.
        options: What holds for it beside the config; not for another config.
        args: The command line without the program's name; the process's own by default.
        defaults: Defaults of `Setup` that differ for this study.

    Returns:
        The study, written.

    Raises:
        SystemExit: With status 1 if a training failed, 2 if the user got something wrong.
    """
    name = function.__name__
    title, _, about = inspect.cleandoc(function.__doc__ or "").split("\nArgs:")[0].strip().partition("\n")
    words = sys.argv[1:] if args is None else args
    command = shlex.join(["python", "-m", f"experiments.{name}", *words])
    given, overrides = split(words)
    parser = ArgumentParser(
        prog=f"python -m experiments.{name}",
        description=f"{title} {' '.join(about.split())}",
        epilog="Options of `diffusion-lit fit`, such as --data.init_args.root FOLDER, hold for all trainings.",
    )
    parser.add_class_arguments(Setup, fail_untyped=True)
    parser.add_function_arguments(function, skip={"study"}, fail_untyped=True)
    parser.set_defaults(defaults)
    told = parser.parse_args(given).as_dict()
    setup = Setup(**{key: told.pop(key) for key in Setup.__dataclass_fields__})
    if setup.config is not None:
        name, options = f"{name}-{Path(setup.config).stem}", {}
    elif "data.class_path" in overrides:
        name += f"-{overrides['data.class_path'].rpartition('.')[2]}"
    try:
        shared = {**(options or {}), **overrides}
        study = Study(name, title, setup, setup.config or config, shared, " ".join(about.split()), command)
        function(study, **told)
        study.write()
    except KeyboardInterrupt as error:
        print(f"{name}: Interrupted; the same command goes on from here.", file=sys.stderr)
        raise SystemExit(130) from error
    except Exception as error:
        end(error, name)
    if study.failed:
        raise SystemExit(1)
    return study


def split(args: list[str]) -> tuple[list[str], dict[str, str]]:
    """Tells the options of `diffusion-lit fit`, whose names have a dot, from a study's own.

    Args:
        args: A command line.

    Returns:
        The study's own, and the others by name.

    Raises:
        SystemExit: If the last one has no value.
    """
    own, overrides = [], {}
    words = iter(args)
    for word in words:
        name, equals, value = word.partition("=")
        if not name.startswith("--") or not ("." in name or name == "--seed_everything"):
            own.append(word)
            continue
        found = value if equals else next(words, None)
        if found is None:
            print(f"{name} needs a value.", file=sys.stderr)
            raise SystemExit(2)
        overrides[name[2:]] = found
    return own, overrides
