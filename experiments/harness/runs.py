"""Many runs of `diffusion-lit fit`: several at once, each in its own process, finished ones reused.

A `Run` is a config and what differs from it. Its key is the hash of both, and its folder, `NAME-KEY/`, holds
Lightning's `version_N/`, what the command printed (`log.txt`) and a record of how it went (`run.json`). `fit` leaves
out what is done under the same key, continues what was interrupted with `--ckpt_path last`, and tells of a run that
failed without losing the others. A finished run's parameters go beside its curves, where TensorBoard's HParams tab
finds both.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from diffusion_lit.checks import check_count
from diffusion_lit.commands.configs import configs_folder, find_config
from diffusion_lit.report.events import read_history
from diffusion_lit.storage.hashing import key_of
from diffusion_lit.storage.runs import find_last
from experiments.harness.children import Children, ended_with_this
from experiments.harness.configs import read_config
from experiments.harness.show import keep_json

COMMAND = [sys.executable, "-c", "from diffusion_lit.commands.main import main; main()"]


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        name: What tells it from the others; part of its folder's name.
        config: A YAML of `diffusion-lit fit`; see `find_config`.
        options: What differs from it, by the names of the command line: `{"trainer.max_steps": 400}`.
    """

    name: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def path(self) -> Path:
        """The config's file."""
        return find_config(self.config)

    @cached_property
    def key(self) -> str:
        """Eight hexadecimal digits of all that the run is configured by: files that a config names included."""
        configs = [read_config(path) for path in (configs_folder() / "base.yaml", self.path)]
        return key_of({"configs": configs, "options": self.options})[:8]

    def folder(self, out: Path) -> Path:
        """Where the run lies under a study's folder of runs."""
        plain = re.sub(r"[^\w.=,+-]+", "_", self.name)
        return out / f"{plain}-{self.key}"

    def command(self, out: Path) -> list[str]:
        """The arguments of `diffusion-lit`, which resume an unfinished run."""
        folder = self.folder(out)
        place = [f"--trainer.logger.init_args.save_dir={out}", f"--name={folder.name}"]
        begun = any(folder.glob("version_*/checkpoints/last.ckpt"))
        options = {name: value for name, value in self.options.items() if not (begun and name == "init_from")}
        given = [f"--{name}={_spelled(value)}" for name, value in options.items()]
        return ["fit", f"--config={self.path}", *given, *place, *(["--ckpt_path=last"] if begun else [])]


@dataclass(frozen=True)
class Trained:
    """A run that is done.

    Args:
        run: What was trained.
        folder: Lightning's folder of it, `.../version_N`.
        seconds: Time it took, interruptions left out.
    """

    run: Run
    folder: Path
    seconds: float

    @property
    def ckpt_path(self) -> Path:
        """Its last checkpoint."""
        return self.folder / "checkpoints" / "last.ckpt"

    @cached_property
    def curves(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Everything that was logged: steps and values, each of shape (N,), by name, such as `train/loss`."""
        return read_history(self.folder).scalars

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of everything that was logged."""
        return {name: float(values[-1]) for name, (_, values) in self.curves.items()}


@dataclass(frozen=True)
class Failed:
    """A run that failed.

    Args:
        run: What was to be trained.
        reason: The last message of the command.
        log: Where all that it said lies.
    """

    run: Run
    reason: str
    log: Path


def grid(options: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Every combination of values.

    Returns:
        One value of each, the last option changing fastest; one empty dictionary for no options.
    """
    return (dict(zip(options, values, strict=True)) for values in product(*options.values()))


def label_of(options: dict[str, Any]) -> str:
    """A short name of some options.

    Returns:
        Such as `lr=0.001,max_steps=400`; a class by its name alone.
    """
    return ",".join(f"{name.rpartition('.')[2]}={short(value)}" for name, value in options.items()) or "run"


def short(value: Any) -> str:
    """A value in few letters: of a class its name, of a float four digits."""
    if isinstance(value, dict):
        return short(value.get("class_path", json.dumps(value)))
    if isinstance(value, str):
        return value.rpartition(".")[2]
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value).replace(" ", "")


def fit(
    runs: list[Run],
    out: Path,
    jobs: int = 1,
    gpus: list[int] | None = None,
    tell: Callable[[str], object] = print,
) -> list[Trained | Failed]:
    """Trains the runs that are not finished yet.

    Args:
        runs: The runs, of different names.
        out: Folder of the runs.
        jobs: Runs at a time, on the same device; the CPU's cores are shared out among them.
        gpus: Numbers of the GPUs to spread them over, `jobs` on each; none leaves the device to the config.
        tell: Called with a line at the beginning and the end of each run.

    Returns:
        What became of each, in their order.

    Raises:
        ValueError: If two runs have the same name, a config is missing, or `jobs` is below 1.
    """
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"Two runs are called {next(name for name in names if names.count(name) > 1)}; rename one.")
    check_count(jobs=jobs, hint=", the number of runs at a time")
    found: dict[str, Trained | Failed] = {run.name: done for run in runs if (done := _done(run, out)) is not None}
    waiting = [run for run in runs if run.name not in found]
    if found:
        tell(f"{len(found)} of {len(runs)} runs are done already.")
    places: SimpleQueue[dict[str, str]] = SimpleQueue()
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // jobs))
    for _ in range(jobs):
        for visible in [{"CUDA_VISIBLE_DEVICES": str(gpu)} for gpu in gpus or []] or [{}]:
            places.put({**os.environ, "OMP_NUM_THREADS": threads, **visible})
    pool = ThreadPoolExecutor(places.qsize())
    children = Children()
    with ended_with_this(children.stop):
        try:
            futures = [pool.submit(_train, run, out, places, children, tell) for run in waiting]
            for future in as_completed(futures):
                made = future.result()
                found[made.run.name] = made
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return [found[name] for name in names]


def _train(
    run: Run, out: Path, places: "SimpleQueue[dict[str, str]]", children: "Children", tell: Callable[[str], object]
) -> Trained | Failed:
    """One run from its beginning, or from its last checkpoint, to its end."""
    environment, folder = places.get(), run.folder(out)
    log, record = folder / "log.txt", folder / "run.json"
    folder.mkdir(parents=True, exist_ok=True)
    before = json.loads(record.read_text())["seconds"] if record.exists() else 0.0
    command = run.command(out)
    tell(f"{run.name}: {'goes on' if '--ckpt_path=last' in command else 'begins'}; it talks to {log}")
    started = time.perf_counter()
    try:
        with log.open("a") as said:
            said.write(f"$ diffusion-lit {shlex.join(command)}\n")
            said.flush()
            status = children.run([*COMMAND, *command], stdout=said, stderr=subprocess.STDOUT, env=environment)
    finally:
        places.put(environment)
    seconds = before + time.perf_counter() - started
    summary = {"options": run.options, "config": str(run.config), "key": run.key, "seconds": seconds, "status": status}
    keep_json(record, summary)
    if status:
        reason = _last_words(log) or f"exit status {status}"
        tell(f"{run.name}: {'stopped' if children.stopped else 'FAILED'}, {reason}")
        return Failed(run, reason, log)
    done = _done(run, out)
    if done is None:
        return Failed(run, "it ended without a checkpoint", log)
    tell(f"{run.name}: done in {seconds:.0f} s")
    return done


def _done(run: Run, out: Path) -> Trained | None:
    """The result of a finished run, or None."""
    folder = run.folder(out)
    try:
        record = json.loads((folder / "run.json").read_text())
        checkpoint = find_last(folder)
    except (OSError, ValueError):
        return None
    return Trained(run, checkpoint.parent.parent, record["seconds"]) if record["status"] == 0 else None


def _last_words(log: Path) -> str:
    """The last message of a command: its own sentence if there is one, else the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    started = max(index for index, line in enumerate(lines) if line.startswith("$ diffusion-lit"))
    said = lines[started + 1 :]
    told = [line.removeprefix("diffusion-lit: ") for line in said if line.startswith("diffusion-lit: ")]
    return (told or said or [""])[-1]


def _spelled(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)
