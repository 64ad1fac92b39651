"""A run on one page, whether it is running, stopped or finished."""

import json
import re
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule

from diffusion_lit.diffusion.grids import evenly
from diffusion_lit.modules.base import BaseModule
from diffusion_lit.modules.load import load_module
from diffusion_lit.modules.protocols import is_model
from diffusion_lit.report.curves import LAST, draw, panels, scales, title
from diffusion_lit.report.events import History, read_history
from diffusion_lit.report.facts import (
    HARDWARE,
    begun_from,
    class_name,
    duration,
    inside,
    magnitude,
    moment,
    parameters,
    read_config,
    receipts,
    settings,
    step_of,
)
from diffusion_lit.report.page import Page
from diffusion_lit.report.receipt_page import blocks_sentence, likelihood_sentence
from diffusion_lit.report.receipt_tables import tables
from diffusion_lit.storage.checkpoints import read_checkpoint

GRIDS = 6  # grids shown over time, first and last among them
MORE_IS_BETTER = ("psnr", "ssim", "accuracy")
LESS_IS_BETTER = re.compile("loss|bits_per_dim|r?fi?d_.*")
IMAGES = {  # folders of images that callbacks write, and what they show
    "trajectory": "From noise to image: each pair of rows is x (scaled to unit variance) above the model's x0_hat.",
    "reconstructions": "Held-out images, each row above its reconstructions.",
    "interpolations": "Straight ways in latent space between pairs of held-out images, decoded.",
}


class RunPage:
    """Reads a run and lays it out.

    If a file is damaged or missing, its part of the page says so.

    Args:
        folder: The folder of one version of a run.

    Attributes:
        problems: Sentences on what could not be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config, self.problems = read_config(folder / "config.yaml")
        self.history: History = read_history(folder)
        for session in self.history.sessions:
            if not session.whole:
                self.problems.append(
                    f"{session.file} ends within a record or is damaged, or is being written to; the curves show what "
                    "comes before."
                )
        self.checkpoint: dict[str, Any] = {}
        self.module: LightningModule | None = None
        self._read_checkpoint()

    def _read_checkpoint(self) -> None:
        """The last checkpoint and its module, if they can be read."""
        path = self.folder / "checkpoints" / "last.ckpt"
        if not path.exists():
            self.problems.append("The run has no checkpoint checkpoints/last.ckpt yet.")
            return
        try:
            self.checkpoint = read_checkpoint(path)
            self.module = load_module(path)
        except ValueError as error:
            self.problems.append(str(error))

    @property
    def steps(self) -> int:
        """Training steps done, according to log and checkpoint."""
        return max(self.history.last_step, int(self.checkpoint.get("global_step", 0)))

    def build(self) -> Page:
        """Lays the page out."""
        name = "/".join(self.folder.resolve().parts[-2:])
        page = Page(f"Run {name}", self._subtitle())
        for problem in self.problems:
            page.text(problem)
        self._results(page)
        self._curves(page)
        self._images(page)
        self._evaluations(page)
        self._cost(page)
        self._configuration(page)
        return page

    def _subtitle(self) -> str:
        """What was trained on what, and how far it is."""
        model, data = (class_name(self.config.get(key)) for key in ("model", "data"))
        net = class_name(inside(self.config, "model", "init_args", "net"))
        what = f"{model or 'A model'}{f' with {net}' if net else ''}{f' on {data}' if data else ''}"
        return f"{what}; {self._progress()}."

    def _progress(self) -> str:
        trainer = self.config.get("trainer") or {}
        steps, epochs = trainer.get("max_steps"), trainer.get("max_epochs")
        if steps and steps > 0:
            done = f"step {self.steps:,} of {steps:,}"
        elif epochs and epochs > 0:
            done = f"step {self.steps:,}, epoch {int(self.history.last('epoch') or 0) + 1:,} of {epochs:,}"
        else:
            done = f"step {self.steps:,}"
        return done if self.history.end is None else f"{done}, last heard of {moment(self.history.end)}"

    def _results(self, page: Page) -> None:
        """The newest images beside the newest figures."""
        page.heading("Result")
        newest = [
            (found[-1], f"{words} at step {step_of(found[-1]):,}")
            for words, found in (
                ("Samples", self._files("samples", "png")),
                ("From noise to image", self._files("trajectory", "gif")),
            )
            if found
        ]
        if newest:
            page.images(newest)
        rows = self._figures()
        if rows:
            header = ["figure", "last", "at step", "best", "at step", "real against real"]
            page.table(header, rows)
        if not newest and not rows:
            page.text("The run has logged no figures and drawn no images yet.")

    def _figures(self) -> list[list[Any]]:
        """A row for each figure that validation or testing measured."""
        rows = []
        for panel in panels(self.history):
            for tag in panel.tags if panel.name not in (*LAST, "loss_by_sigma") else ():
                steps, values = self.history.scalars[tag]
                finite = np.flatnonzero(np.isfinite(values))
                if tag.startswith("train/") or not len(finite):
                    continue
                real = None if panel.floor is None else self.history.last(panel.floor)
                best: list[Any] = [None, None]
                if panel.name in MORE_IS_BETTER or LESS_IS_BETTER.fullmatch(panel.name):
                    choose = np.argmax if panel.name in MORE_IS_BETTER else np.argmin
                    place = finite[choose(values[finite])]
                    best = [values[place].item(), int(steps[place])]
                last = finite[-1]
                rows.append([tag, values[last].item(), int(steps[last]), *best, real])
        return rows

    def _curves(self, page: Page) -> None:
        page.heading("Curves")
        curves = [
            panel for panel in panels(self.history) if any(len(self.history.scalars[t][0]) > 1 for t in panel.tags)
        ]
        if not curves:
            page.text("Nothing was logged twice yet.")
        found = []
        for panel in curves:
            for scale in (kinds := scales(panel, self.history)):
                kind = f", {'linear' if scale == 'linear' else 'logarithmic'} scale" if len(kinds) > 1 else ""
                caption = f"{title(panel.name)} against the training step{kind}"
                found.append((draw(panel, self.history, scale), caption))
        page.images(found)

    def _images(self, page: Page) -> None:
        """Grids over time, and the newest of each other kind of image."""
        grids = self._files("samples", "png")
        if grids:
            page.heading("Samples over time")
            page.text("The same seeds and labels at each age of the model.")
            chosen = sorted(set(evenly(0, len(grids) - 1, GRIDS)))
            page.images([(grids[index], f"step {step_of(grids[index]):,}") for index in chosen], columns=3)
        for name, caption in IMAGES.items():
            found = self._files(name, "png")
            if found:
                page.heading(name.capitalize())
                page.image(found[-1], f"{caption} Step {step_of(found[-1]):,}.")

    def _files(self, name: str, ending: str) -> list[Path]:
        """The images of a kind, the oldest first."""
        return sorted((self.folder / name).glob(f"step_*.{ending}"), key=step_of)

    def _evaluations(self, page: Page) -> None:
        page.heading("Evaluation")
        found = receipts(self.folder)
        if not found:
            last, receipt = self.folder / "checkpoints" / "last.ckpt", self.folder / "evaluation.json"
            page.text("No report of diffusion-lit evaluate was found beside the run.")
            if is_model(self.module):
                page.text("To make one:")
                page.command(f"diffusion-lit evaluate --ckpt_path {quote(str(last))} --out {quote(str(receipt))}")
        for path, content in found:
            try:
                self._evaluation(page, path, content)
            except (KeyError, TypeError, ValueError, StopIteration):
                page.text(f"{path.name} is not a whole report of diffusion-lit evaluate.")

    def _evaluation(self, page: Page, path: Path, receipt: dict[str, Any]) -> None:
        """One receipt: its tables, its images and what it was made with."""
        shown, facts = tables(receipt), receipt["run"]
        checkpoint = receipt["checkpoint"]
        step = "" if checkpoint["step"] is None else f" of step {checkpoint['step']:,}"
        page.heading(path.name, level=3)
        page.text(
            f"{Path(checkpoint['file']).name}{step}, weights: {checkpoint['weights']}; "
            f"samples drawn in {duration(facts['sampling_seconds'])} by {facts['processor']}, {facts['ranks']} rank(s)."
        )
        if receipt["references"]:
            page.text(blocks_sentence(receipt))
        for table in shown:
            page.heading(table.title, level=3)
            if table.note:
                page.text(table.note)
            page.table(table.header, table.rows)
        likelihood = likelihood_sentence(receipt)
        if likelihood:
            page.text(likelihood)
        for warning in receipt["warnings"]:
            page.text(f"Warning: {warning}")
        images = sorted(path.parent.glob(f"{path.stem}*.png"))
        page.images([(image, self._explained(image, path)) for image in images])
        page.listing(json.dumps(receipt, indent=2), f"{path.name}, whole")

    def _explained(self, image: Path, receipt: Path) -> str:
        """What an image of `diffusion-lit evaluate` shows."""
        if image.stem == receipt.stem:
            return "Quality against cost."
        setting = image.stem.removeprefix(f"{receipt.stem}.").removeprefix("memorization_")
        return f"{setting}: sample, its nearest training image, its nearest held-out image; the worst first."

    def _cost(self, page: Page) -> None:
        page.heading("Cost")
        rows: list[list[Any]] = []
        if self.module is not None:
            rows += [["parameters", text] for text in parameters(self.module)]
        batch = inside(self.config, "data", "init_args", "batch_size")
        rows.append(["training steps", f"{self.steps:,}"])
        begun = begun_from(self.module.init_from if isinstance(self.module, BaseModule) else None)
        rows += [["first weights", begun]] if begun else []
        if isinstance(batch, int):
            accumulated = (self.config.get("trainer") or {}).get("accumulate_grad_batches") or 1
            rows.append(["images seen", f"about {magnitude(self.steps * batch * accumulated)} in batches of {batch:,}"])
        if self.history.sessions:
            times = sum(bool(session.scalars) for session in self.history.sessions)
            sessions = "in one go" if times < 2 else f"in {times} sessions"
            rows.append(["time", f"{duration(self.history.seconds)}, images and metrics included, {sessions}"])
        if "train/images_per_second" in self.history.scalars:
            speed = float(np.median(self.history.scalars["train/images_per_second"][1]))
            rows.append(["training speed", f"{speed:.4g} images/s (median), images and metrics not counted"])
        told = list(dict.fromkeys(s.texts[HARDWARE] for s in self.history.sessions if HARDWARE in s.texts))
        rows += [["hardware", text] for text in told or ["not recorded by this run"]]
        page.table(["what", "how much"], rows)

    def _configuration(self, page: Page) -> None:
        if not self.config:
            return
        page.heading("Configuration")
        path = self.folder / "config.yaml"
        given = quote(str(path))
        page.text("To train it anew, and to go on where it stopped:")
        page.command(f"diffusion-lit fit --config {given}")
        page.command(f"diffusion-lit fit --config {given} --ckpt_path last")
        page.table(["what", "value"], settings(self.config, self.module))
        page.listing(path.read_text(errors="replace"), "config.yaml, whole")
