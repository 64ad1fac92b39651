"""One seed of an entry: its training in a process of its own, on the threads of the track, and its figures."""

import json
import multiprocessing
import os
import statistics
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_lit.diffusion.images import to_uint8
from diffusion_lit.report.images import grid_image
from diffusion_lit.runtime.hardware import hardware
from diffusion_lit.runtime.lock import Busy, Lock
from diffusion_lit.runtime.stopping import end
from diffusion_lit.storage.atomic import atomic
from diffusion_lit.storage.cache import cache_folder
from experiments.benchmarks.fit_training import train_by_fit
from experiments.benchmarks.peer_training import train_peer
from experiments.benchmarks.tracks import Judge, Track
from experiments.benchmarks.trainings import Training
from experiments.harness.children import ended_with_this


class TrainingFailed(ValueError):
    """A training whose process ended with an error, which it told."""


def train(place: Path, training: Training) -> dict[str, Any]:
    """Trains in a process of its own.

    Args:
        place: Folder for the states, the samples and the record.
        training: What to do.

    Returns:
        What became of it: `steps`, `images`, `planned`, `seconds`, `hashes` of the weights after step `replayed` and of
        the whole state at the end, `before` (the step of the state before), `evaluations` by kind of samples.

    Raises:
        TrainingFailed: If the process failed.
        ValueError: If another timed training is at work on this machine.
    """
    place.mkdir(parents=True, exist_ok=True)
    record = place / "record.json"
    record.unlink(missing_ok=True)
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(place, training))

    def stop() -> None:
        process.terminate()
        process.join()

    with nullcontext() if training.minutes is None else alone(), ended_with_this(stop):
        process.start()
        process.join()
    if process.exitcode or not record.exists():
        raise TrainingFailed(f"{training.entry.name} ended with status {process.exitcode}; its message stands above.")
    found: dict[str, Any] = json.loads(record.read_text())
    _tell_of_misfit(training, found)
    return found


def _tell_of_misfit(training: Training, found: dict[str, Any]) -> None:
    """Says so where a schedule turned out much shorter than the time, or was cut short by it."""
    budget = 60 * (training.minutes or 0)
    state = found["seconds"] / found["steps"] * training.track.replayed  # its length is a multiple of so many steps
    if budget and (found["seconds"] + state < 0.9 * budget or found["steps"] < 0.95 * found["planned"]):
        print(
            f"Seed {training.seed} of {training.entry.name} took {found['seconds']:.0f} of its {budget:.0f} s for "
            f"{found['steps']} of {found['planned']} planned steps: the pace changed after its schedule was planned. "
            "Remove its folder and run the command again on a machine that does nothing else.",
            file=sys.stderr,
        )


def alone() -> Lock:
    """A lock for timed training, which one process of this machine holds.

    Raises:
        ValueError: If another has it.
    """
    try:
        return Lock(cache_folder() / "timed_training.lock")
    except Busy as error:
        raise ValueError(
            f"A timed training is at work here ({error}), and two at once would take each other's time; start when it "
            "is done."
        ) from error


def _work(place: Path, training: Training) -> None:
    training.track.check_machine()
    os.environ["TQDM_DISABLE"] = "1"
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
    try:
        _train(place, training)
    except Exception as error:
        end(error, "speedrun")


def _train(place: Path, training: Training) -> None:
    work = train_peer if training.entry.config is None else train_by_fit
    drawn, facts = work(place, training)
    if drawn:
        pixels: dict[str, Any] = {
            title: to_uint8(samples).permute(0, 2, 3, 1).numpy() for title, samples in drawn.items()
        }
        np.savez_compressed(place / "samples.npz", **pixels)
        for title, samples in drawn.items():
            grid_image(samples[:40], 10).save(place / f"{title}.png")
    with atomic(place / "record.json") as file:
        file.write(json.dumps(facts, indent=2).encode())


def seed_of(place: Path, training: Training, judge: Judge) -> dict[str, Any]:
    """One training with its figures; a finished one with the same conditions is reused."""
    return {**train_once(place, training), "figures": figures_of(place, judge)}


def train_once(place: Path, training: Training) -> dict[str, Any]:
    """The result of a training; a finished one with the same conditions is reused."""
    terms = {"track": training.track.key, "entry": training.entry.key, "seed": training.seed}
    terms |= {"minutes": training.minutes, "machine": machine_of(training.track)}
    kept = place / "terms.json"
    if not (kept.exists() and (place / "record.json").exists() and json.loads(kept.read_text()) == terms):
        kept.unlink(missing_ok=True)
        train(place, training)
        kept.write_text(json.dumps(terms))
    facts: dict[str, Any] = json.loads((place / "record.json").read_text())
    return facts


def samples_in(place: Path) -> dict[str, Tensor]:
    """The samples in the folder of a training, uint8 (N, C, H, W) by their kind."""
    with np.load(place / "samples.npz") as kept:
        return {kind: torch.from_numpy(kept[kind]).permute(0, 3, 1, 2) for kind in kept.files}


def figures_of(place: Path, judge: Judge) -> dict[str, float]:
    """The figures of the samples in a folder, by their kind."""
    return {kind: judge.distance(images) for kind, images in samples_in(place).items()}


def summary_of(runs: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean and standard deviation over the seeds, by kind of samples.

    Args:
        runs: Each with its `figures`.
    """
    found = {}
    for kind in runs[0]["figures"]:
        values = [one["figures"][kind] for one in runs]
        found[kind] = {
            "mean": statistics.mean(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else None,
        }
    return found


def machine_of(track: Track) -> dict[str, Any]:
    """What must be the same for results to be the same bit for bit."""
    threads = track.check_machine()
    here = hardware(torch.device(track.device), 1)
    capability = torch.backends.cpu.get_cpu_capability()
    return {**here, "threads": threads, "instructions": capability, "torch": str(torch.__version__)}
