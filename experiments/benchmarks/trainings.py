"""A training of the speedrun, or a part of one: its description, its clock and its record.

Its order of data and its draws are functions of (seed, step), so that the same steps give the same weights, bit for
bit, on like hardware. `fit_training` and `peer_training` do it, `seeds` in a process of its own.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from torch import Tensor

from diffusion_lit.modules import Consistency, DiffusionModule, LatentConsistency, WarmupStableDecay
from diffusion_lit.storage.hashing import key_of, weights_hash
from experiments.benchmarks.entries import Entry
from experiments.benchmarks.tracks import Track

GUIDED, UNGUIDED = "as configured", "without guidance"
LAST, BEFORE = "last", "previous"  # states of a training: the last, and the one `replayed` steps earlier
CHUNK = 100  # images that are drawn at a time


@dataclass(frozen=True)
class Training:
    """A training of an entry, or a part of one.

    Args:
        entry: What is trained.
        track: On what terms.
        seed: Its seed.
        root: Folder of the data.
        minutes: Ends it after that time; None for the end that `planned` and `stop` set.
        planned: Length of its schedule in steps; None to find out from the pace of the first steps, in the time.
        stop: Ends it after that step.
        resume: State to go on from, of a training of the same entry.
        draws: Whether samples are drawn at its end.
        unguided: Whether samples without guidance are drawn too.
    """

    entry: Entry
    track: Track
    seed: int
    root: str | None = None
    minutes: float | None = None
    planned: int | None = None
    stop: int | None = None
    resume: Path | None = None
    draws: bool = True
    unguided: bool = True

    def state(self, place: Path, which: str) -> Path:
        """File of a state that the training leaves in its folder."""
        return place / f"{which}.{'pt' if self.entry.config is None else 'ckpt'}"


class Clock(Callback):
    """Notes when training began and when each step ended, and ends it by the time or at a step.

    Until the learning rate of a schedule decays (WSD), it is the same for each length of the run. So the length is
    planned anew at each state, by the pace of late, for as long as nothing of what was done depended on it.

    Attributes:
        seconds: The time.
        stop: The step, or None.
        every: Steps between two states. In time it ends at a state after which the next would not be in time.
        latest: The one of the latest run.
        planned: Length of the run in steps, once it is over.
    """

    seconds = float("inf")
    stop: int | None = None
    every = 100
    latest: "Clock"

    def __init__(self) -> None:
        self.times: list[float] = []
        self.planned = 0
        self.first: str | None = None  # hash of the weights after the step `every`
        Clock.latest = self

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Notes when the first step began."""
        self.times = self.times or [time.perf_counter()]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Notes the time, and ends the training where it is over."""
        step = trainer.global_step
        if step == self.every and self.first is None:
            self.first = weights_hash(pl_module.state_dict())
        if self.ends(step):
            trainer.should_stop = True
        elif step % self.every == 0:
            self._plan(trainer, pl_module)

    def _plan(self, trainer: Any, module: Any) -> None:
        """Fits the length of a run to the time that is left."""
        left = self.times[0] + self.seconds - self.times[-1]
        schedules = [one.scheduler for one in trainer.lr_scheduler_configs]
        by_progress = not isinstance(module, DiffusionModule) or isinstance(module, Consistency | LatentConsistency)
        if left == float("inf") or by_progress or not all(isinstance(one, WarmupStableDecay) for one in schedules):
            return
        stable, step = 1 - max((one.decay_fraction for one in schedules), default=0), trainer.global_step
        if step < stable * trainer.max_steps:
            earliest = math.ceil((step + 1) / stable / self.every) * self.every
            total = max(step + planned_steps(self.times[len(self.times) // 2 :], left, self.every), earliest)
            trainer.fit_loop.epoch_loop.max_steps = total
            for one in schedules:
                one.total_steps = total

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Notes how long the run was to be at last."""
        self.planned = trainer.max_steps

    def ends(self, step: int) -> bool:
        """Notes the time of a step; True if it is the last."""
        self.times.append(time.perf_counter())
        passed = self.times[-1] - self.times[0]
        at_state = step % self.every == 0 and len(self.times) > self.every
        next_state = passed + self.times[-1] - self.times[-1 - self.every] if at_state else passed
        return step == self.stop or next_state > self.seconds


def facts_of(clock: Clock, planned: int, spent: float, step: int, batch: int) -> dict[str, Any]:
    """The record of a training."""
    seconds = clock.times[-1] - clock.times[0] + spent
    made = {"steps": step, "images": step * batch, "batch_size": batch, "planned": planned, "seconds": seconds}
    return {**made, "hashes": {"first": clock.first}}


def planned_steps(times: list[float], seconds: float, every: int) -> int:
    """The number of steps that fit into a time.

    Args:
        times: When steps before began and when each ended, in seconds; they set the pace.
        seconds: The time.
        every: The number is a multiple of it, where one fits.
    """
    pace = (times[-1] - times[0]) / (len(times) - 1)
    steps = max(1, int(0.98 * seconds / pace))
    return steps // every * every or steps


def fingerprint(state: Any) -> str:
    """A hash of nested tensors and plain values."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, str] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, dict):
            for key, part in value.items():
                walk(part, f"{name}.{key}")
        elif isinstance(value, list | tuple):
            for index, part in enumerate(value):
                walk(part, f"{name}.{index}")
        else:
            plain[name] = repr(value)

    walk(state, "")
    return key_of({"tensors": weights_hash(tensors), "plain": plain})
