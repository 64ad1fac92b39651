"""Trainings of the speedrun by `diffusion-lit fit`."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from diffusion_lit.evaluation.generation import class_frequencies, counted_forwards, draw_labels
from diffusion_lit.modules.load import load_module
from diffusion_lit.storage.checkpoints import read_training_state
from experiments.benchmarks.entries import Entry
from experiments.benchmarks.tracks import Track
from experiments.benchmarks.trainings import (
    BEFORE,
    CHUNK,
    GUIDED,
    LAST,
    UNGUIDED,
    Clock,
    Training,
    facts_of,
    fingerprint,
    planned_steps,
)

PACE_STEPS = 24
TRAINED = ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers")  # the state that training changes


def train_by_fit(place: Path, training: Training) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`diffusion-lit fit`: some steps for the pace where it is needed, then the run in what is left of the time."""
    from diffusion_lit.commands.main import main

    entry, track = training.entry, training.track
    config = own_part(entry)
    batch = int(entry.options.get("data.init_args.batch_size") or config["data"]["init_args"]["batch_size"])
    data = {"class_path": track.data, "init_args": {**track.arguments(training.root), "batch_size": batch}}
    written = place / "config.yaml"
    written.write_text(yaml.safe_dump({**config, "data": data}, sort_keys=False))
    trusted = [] if entry.code is None else write_module(place, entry)

    def fit(steps: int, *words: str) -> Path:
        given = [f"--{name}={v if isinstance(v, str) else json.dumps(v)}" for name, v in entry.options.items()]
        before = set(place.glob("run/version_*"))
        main(
            [
                *["fit", f"--config={written}", *given, "--name=run", f"--seed_everything={training.seed}"],
                *[f"--trainer.logger.init_args.save_dir={place}", f"--trainer.max_steps={steps}", *trusted, *words],
                *["--trainer.limit_val_batches=0", f"--trainer.callbacks={Clock.__module__}.Clock"],
                *[f"--checkpoint.every_n_train_steps={track.replayed}", "--checkpoint.every_n_minutes=null"],
                f"--trainer.accelerator={'gpu' if track.device == 'cuda' else 'cpu'}",
                *["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"],
            ]
        )
        return max(set(place.glob("run/version_*")) - before) / "checkpoints"

    Clock.every, Clock.stop = track.replayed, training.stop
    planned, spent = training.planned, 0.0
    if planned is None:
        Clock.seconds = budget = 60 * (training.minutes or 0)
        Clock.seconds = budget / 4
        fit(PACE_STEPS)
        times = Clock.latest.times
        spent = times[-1] - times[0]
        planned = planned_steps(times[min(2, len(times) - 2) :], budget - spent, track.replayed)  # the first warm up
        Clock.seconds = budget - spent
    else:
        Clock.seconds = float("inf")
    folder = fit(planned, *([] if training.resume is None else [f"--ckpt_path={training.resume}"]))
    clock, last = Clock.latest, folder / "last.ckpt"
    for name in (LAST, BEFORE):
        if (folder / f"{name}.ckpt").exists():
            (folder / f"{name}.ckpt").replace(training.state(place, name))
    state = read_training_state(training.state(place, LAST))
    _check_data(state, track, last)
    before = training.state(place, BEFORE)
    facts = facts_of(clock, clock.planned, spent, state["global_step"], batch)
    facts["hashes"]["end"] = fingerprint({key: state.get(key) for key in TRAINED})
    facts["before"] = read_training_state(before)["global_step"] if before.exists() else None
    if not training.draws:
        return {}, facts
    drawn, facts["evaluations"] = draw_samples(training.state(place, LAST), training)
    return drawn, facts


def _check_data(state: dict[str, Any], track: Track, path: Path) -> None:
    """Checks that a training used the track's images.

    Raises:
        ValueError: If so.
    """
    recorded = state.get("diffusion_lit", {}).get("data", {}).get("train", {}).get("sha256")
    if track.images is not None and recorded != track.images:
        raise ValueError(f"{path} was trained on images with the hash {str(recorded)[:16]}, which are not the track's.")


def own_part(entry: Entry) -> dict[str, Any]:
    """An entry's config without callbacks and loggers, which the track decides and which are not even imported."""
    config = dict(entry.config or {})
    trainer = config.get("trainer") or {}
    config["trainer"] = {key: value for key, value in trainer.items() if key not in ("callbacks", "logger")}
    return config


def write_module(place: Path, entry: Entry) -> list[str]:
    """Writes an entry's Python file where it can be imported, and trusts it."""
    (place / f"{entry.module}.py").write_text(entry.code or "")
    sys.path.insert(0, str(place))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")])
    return [f"--trust={entry.module}"]


def draw_samples(path: Path, training: Training) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Draws the samples of a model that `diffusion-lit fit` trained.

    Returns:
        Samples (N, C, H, W) by kind, as configured and, where there is guidance, without it in as many evaluations;
        and the evaluations of the network per image of each.

    Raises:
        ValueError: If there are more evaluations than the track allows.
    """
    track = training.track
    if training.entry.code is not None:
        os.environ["DIFFUSION_LIT_TRUST"] = training.entry.module
    module: Any = load_module(path).to(track.device)
    frequencies = class_frequencies(track.make_data(training.root, 1), module.num_classes)
    settings = {GUIDED: module.sampling}
    if training.unguided and module.num_classes and module.sampling.cfg_scale not in (0, 1):
        settings[UNGUIDED] = module.sampling.replace(cfg_scale=1.0, num_steps=2 * module.sampling.num_steps)
    drawn, used, first = {}, {}, 10**6 * training.seed
    for title, sampling in settings.items():
        parts = []
        with counted_forwards(module) as forwards:
            for start in range(0, track.num_samples, CHUNK):
                seeds = [first + row for row in range(start, min(start + CHUNK, track.num_samples))]
                parts.append(module.generate(seeds, draw_labels(seeds, frequencies), sampling).cpu())
                if forwards[0] > track.evaluations * len(seeds) and start == 0:
                    raise ValueError(
                        f"{training.entry.name} evaluates its network {forwards[0] / len(seeds):g} times per image "
                        f"{title}, and the track allows {track.evaluations}; set model.init_args.sampling.num_steps."
                    )
        drawn[title], used[title] = torch.cat(parts), round(forwards[0] / track.num_samples)
    return drawn, used
