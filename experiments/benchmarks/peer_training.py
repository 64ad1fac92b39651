"""Trainings of the speedrun by another library's own step and sampler, on ready batches."""

import time
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_lit.diffusion.images import from_uint8
from diffusion_lit.diffusion.rng import keyed_generator, keyed_seed
from diffusion_lit.runtime.hardware import bf16_pays
from diffusion_lit.storage.atomic import atomic
from diffusion_lit.storage.hashing import weights_hash
from experiments.benchmarks.contenders import MULTIPLES, BenchmarkJob
from experiments.benchmarks.peers import Peer, peer
from experiments.benchmarks.trainings import BEFORE, CHUNK, GUIDED, LAST, Clock, Training, facts_of, fingerprint


def train_peer(place: Path, training: Training) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Another library's own step on ready batches, its draws keyed by the step."""
    track, batch = training.track, training.entry.batch_size
    data = track.make_data(training.root, batch)
    torch.manual_seed(keyed_seed("peer", training.seed))
    made = make_peer(place, training, data.image_shape)
    images = torch.as_tensor(np.array(data.reference_images("train")))
    clock, every, step = Clock(), track.replayed, 0
    seconds = float("inf") if training.minutes is None else 60 * training.minutes

    def turn(number: int, does: Callable[[Tensor], object]) -> None:
        torch.manual_seed(keyed_seed("peer", training.seed, number))
        does(from_uint8(batch_of(images, training.seed, number, batch).to(track.device)))

    if training.resume is not None:
        state = torch.load(training.resume, map_location=track.device, weights_only=True)
        step = state["step"]
        turn(step, lambda x: made.restore(state["state"], x))
    clock.seconds, clock.stop, clock.every = seconds, training.stop, every
    clock.times = [time.perf_counter()]
    ended = step == training.stop
    while not ended:
        step += 1
        turn(step, made.step)
        if step == every:
            clock.first = weights_hash(made.net.state_dict())
        if step % every == 0:
            _keep(training, place, step, made)
        ended = clock.ends(step)
    if step % every:
        _keep(training, place, step, made)
    before = training.state(place, BEFORE)
    facts = facts_of(clock, step, 0.0, step, batch)
    facts["hashes"]["end"] = fingerprint(made.state())
    facts["before"] = torch.load(before, weights_only=True)["step"] if before.exists() else None
    if not training.draws:
        return {}, facts
    facts["evaluations"] = {GUIDED: track.evaluations}
    return {GUIDED: draw_of(made, training)}, facts


def make_peer(place: Path, training: Training, shape: tuple[int, int, int]) -> Peer:
    """Another library's network with its step and sampler, untrained."""
    entry, track = training.entry, training.track
    precision = "bf16-mixed" if bf16_pays(track.device) else "32-true"
    sizes = (max(entry.width, MULTIPLES.get(entry.contender, 1)), shape[0], shape[1], entry.batch_size)
    job = BenchmarkJob(
        entry.contender, precision, *sizes, track.evaluations, track.device, torch.get_num_threads(), documented=True
    )
    if entry.code is None:
        return peer(job)
    (place / f"{entry.module}.py").write_text(entry.code)
    spec = spec_from_file_location(entry.module, place / f"{entry.module}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    made: Peer = module.peer(job)
    return made


def draw_of(made: Peer, training: Training) -> Tensor:
    """Another library's samples (N, C, H, W), of keyed draws."""
    drawn = []
    for start in range(0, training.track.num_samples, CHUNK):
        torch.manual_seed(keyed_seed("peer", training.seed, "samples", start))
        drawn.append(made.draw(min(CHUNK, training.track.num_samples - start)).float().cpu())
    return torch.cat(drawn)


def batch_of(images: Tensor, seed: int, step: int, batch: int) -> Tensor:
    """The images of a step: whole batches of a new order in each epoch.

    Args:
        images: All of them.
        seed: Of the training.
        step: 1 for the first.
        batch: Number of images.
    """
    epoch, place = divmod(step - 1, max(1, len(images) // batch))
    order = torch.randperm(len(images), generator=keyed_generator("order", seed, epoch))
    return images[order[place * batch : (place + 1) * batch]]


def _keep(training: Training, place: Path, step: int, made: Peer) -> None:
    last = training.state(place, LAST)
    if last.exists():
        last.replace(training.state(place, BEFORE))
    with atomic(last) as file:
        torch.save({"step": step, "state": made.state()}, file)
