"""`diffusion-lit fit` and a bare PyTorch loop over the same step, in turns, and where `fit` spends its time."""

import copy
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.profilers import Profiler

from experiments.benchmarks.stopwatch import Slice, Stopwatch

WARM_UP = 3


class Finished(Exception):
    """Ends `diffusion-lit fit` from within."""


class Recorder(Profiler):
    """Lightning's profiler, which sums the seconds of each action without those of nested actions."""

    def __init__(self) -> None:
        super().__init__()
        self._open: list[list[Any]] = []
        self.seconds: dict[str, float] = defaultdict(float)
        self.running = False

    def start(self, action_name: str) -> None:
        """Opens an action."""
        self._open.append([action_name, time.perf_counter(), 0.0])

    def stop(self, action_name: str) -> None:
        """Closes the innermost action, which Lightning's nesting makes this one."""
        name, since, inside = self._open.pop()
        spent = time.perf_counter() - since
        if self._open:
            self._open[-1][2] += spent
        if self.running:
            self.seconds[name] += spent - inside

    def summary(self) -> str:
        """Nothing: the study prints its own table."""
        return ""


class Rounds(Callback):
    """Lets `fit` and a bare loop take turns.

    `fit`'s turn runs from the start of its first step to the start of the step after its last.
    """

    study: "Turns"

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Ends a turn and begins the next."""
        self.study.step(trainer, pl_module)


class Turns:
    """Times of the turns.

    Args:
        rounds: Number of turns of each.
        steps: Steps in a turn.
        recorder: Records where `fit` spends its time.
    """

    def __init__(self, rounds: int, steps: int, recorder: Recorder) -> None:
        self.rounds, self.steps, self.recorder = rounds, steps, recorder
        self.fit: list[Slice] = []
        self.bare: list[Slice] = []
        self.device = "cpu"
        self._loop: Iterator[None] | None = None
        self._count = 0
        self._watch = Stopwatch("cpu")

    def step(self, trainer: Any, module: Any) -> None:
        """Called at the start of each step of `fit`.

        Raises:
            Finished: After the last turn.
        """
        if self._loop is None:
            self.device = module.device.type
            self._loop = bare_loop(trainer, module)
            for _ in range(WARM_UP):
                next(self._loop)
        self._count += 1
        if self._count <= WARM_UP or (self._count - WARM_UP - 1) % self.steps:
            return
        if self._count > WARM_UP + 1:
            self.fit.append(self._watch.read())
        self.recorder.running = False
        if len(self.fit) == self.rounds:
            raise Finished
        self._watch = Stopwatch(self.device)
        for _ in range(self.steps):
            next(self._loop)
        self.bare.append(self._watch.read())
        self.recorder.running = True
        self._watch = Stopwatch(self.device)


def bare_loop(trainer: Any, module: Any) -> Iterator[None]:
    """The same step without Lightning, on a copy of the network."""
    denoiser = copy.deepcopy(module.denoiser).train()
    weights = [parameter.detach() for parameter in denoiser.parameters()]
    average = [weight.clone() for weight in weights]
    built = getattr(trainer.optimizers[0], "_optimizer", trainer.optimizers[0])
    group = {name: value for name, value in built.param_groups[0].items() if name in ("lr", "betas", "eps", "fused")}
    optimizer = type(built)(denoiser.parameters(), **group)
    loader = copy.copy(trainer.train_dataloader)
    loader.trainer = None  # so that it counts its own batches
    precision = trainer.precision_plugin
    count = 0
    while True:
        for batch in loader:
            draws = module.draw(batch.get("label"), batch["image"].shape, "bare", count)
            with precision.train_step_context():
                loss = module.loss(denoiser, batch["image"], draws.sigma, draws.noise, draws.label).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            torch._foreach_lerp_(average, weights, 1e-3)
            count += 1
            yield
