"""How good are the images after so many minutes of training? This project and its peers, given the same time.

    python -m experiments.benchmarks.time_to_quality --root FOLDER_OF_FASHION_MNIST

Every contender trains on FashionMNIST padded to 32x32, from scratch, for the same time of the clock on the same
threads, one after the other; then it draws the same number of images in the same number of network evaluations, and
the Fréchet distance of these to the training images is taken on the features of one classifier. Training alone is
timed: starting up and sampling are not.

The peers get the settings of their own documents, and in their favour batches ready made, bf16 where it pays, no
mirrored images (a shoe of this data set looks to the left), narrowed networks and small batches, since the documented
ones would take a few hundred steps in this time:

| peer                        | from                           | kept                                                  |
| --------------------------- | ------------------------------ | ----------------------------------------------------- |
| denoising-diffusion-pytorch | its README and Trainer         | v, sigmoid schedule, Adam 8e-5, clipping, its average |
| smalldiffusion              | examples/fashion_mnist_unet.py | log-linear schedule, AdamW 7e-4, average, gam 1.6     |

This project trains configs/edm_fashion_mnist.yaml, the length of the schedule being set from the pace of its first
steps, whose time is taken off. It is told the classes, of which the peers' examples know nothing, and draws with the
config's guidance, where a step counts as two evaluations; its images without guidance are measured beside them.
Interrupted, it goes on with the contender that was not finished.
"""

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from torch import Tensor

from datamodules import FashionMNIST
from diffusion_lit.diffusion.images import to_uint8
from diffusion_lit.evaluation.choose import make_extractor
from diffusion_lit.evaluation.generation import class_frequencies, draw_labels
from diffusion_lit.evaluation.metrics import Statistics, frechet_distance
from diffusion_lit.evaluation.reference import real_against_real, reference_of
from diffusion_lit.modules.load import load_module
from diffusion_lit.report.facts import magnitude
from diffusion_lit.report.images import grid_image
from diffusion_lit.runtime.hardware import bf16_pays, device_type, hardware, use_threads
from diffusion_lit.storage.atomic import atomic
from experiments.benchmarks.contenders import MULTIPLES, OURS, BenchmarkJob, installed, peer
from experiments.harness.command import command
from experiments.harness.study import DPI, image_rows

CONFIG = Path(__file__).resolve().parents[2] / "configs/edm_fashion_mnist.yaml"
PEERS = {"denoising-diffusion-pytorch": 16, "smalldiffusion": 32}  # and the widths that they are given
BATCH, PEER_BATCH = 64, 32  # images per step: the config's, and the README's of the first peer
UNGUIDED = f"{OURS}, without guidance"
PACE_STEPS = 24
CHUNK = 100
SHOWN = 14  # images of each in the figure


def time_to_quality(
    root: str = "data",
    minutes: float = 7.0,
    seeds: int = 3,
    contenders: list[str] | None = None,
    nfe: int = 20,
    num_samples: int = 2000,
    batch_size: int | None = None,
    options: list[str] | None = None,
    classifier: str | None = None,
    accelerator: str = "auto",
    out: str = "runs/studies/time_to_quality",
) -> list[dict[str, Any]]:
    """Trains all contenders for the same time and measures their images.

    Args:
        root: Folder of FashionMNIST's four idx files, or where they are downloaded to.
        minutes: Training time of each.
        seeds: Number of runs of each contender, with the seeds 0, 1, ...
        contenders: Who takes part; this project and the peers that are installed when omitted.
        nfe: Network evaluations per image.
        num_samples: Images that each draws.
        batch_size: Images per training step of all; by default 64 here and 32 of the peers.
        options: Further words of `lightning fit`'s command line, for this project's run.
        classifier: Checkpoint of configs/classifier_fashion_mnist.yaml, whose features count; by default a small one
            that is trained on the spot.
        accelerator: auto, cpu or cuda.
        out: Folder of the samples, the records, the images and the table.

    Returns:
        A record for each set of images, of which a run of this project makes two.

    Raises:
        ValueError: If there is no such contender, or a number is out of range.
    """
    known = [OURS, *[name for name in PEERS if name in installed()]]
    names = contenders or known
    for name in names:
        if name not in known:
            raise ValueError(f"There is no contender {name!r} here; choose of {', '.join(known)}.")
    if minutes <= 0 or min(seeds, nfe, batch_size or 1) < 1 or num_samples < 2:
        raise ValueError("minutes must be above 0, seeds, nfe and batch_size at least 1, and num_samples at least 2.")
    data = FashionMNIST(root)
    data.prepare_data()
    data.setup()
    folder, device = Path(out), device_type(accelerator)
    threads = use_threads()
    extractor = make_extractor("classifier", classifier, data.image_shape)
    extractor.load(data)
    reference = reference_of(data, "train", extractor)
    records, shown = [], {}
    for seed in range(seeds):
        for name in names:
            settings = {
                "contender": name,
                "seed": seed,
                "minutes": minutes,
                "nfe": nfe,
                "num_samples": num_samples,
                "batch_size": batch_size or (BATCH if name == OURS else PEER_BATCH),
                "options": options or [],
                "precision": "bf16-mixed" if bf16_pays(device) else "32-true",
                "hardware": hardware(torch.device(device), 1) | {"threads": threads},
            }
            place = folder / f"{name}_{seed}"
            record = finished(place, settings)
            if record is None:
                record = compete(place, settings, root, device)
            for title, drawn in np.load(place / "samples.npz").items():
                features = extractor.extract(torch.from_numpy(drawn).permute(0, 3, 1, 2), CHUNK)
                distance = frechet_distance(Statistics.of(features.features), reference.statistics)
                records.append({**record, "contender": title, "distance": distance})
                shown.setdefault(title, torch.from_numpy(drawn[:SHOWN]).permute(0, 3, 1, 2))
                print(f"{title}, seed {seed}: {extractor.metric} {distance:.2f}")
    floor = real_against_real(reference, reference_of(data, "val", extractor).features, num_samples)
    image_rows(shown).savefig(folder / "samples.png", dpi=DPI, bbox_inches="tight")
    text = table(records, floor, extractor.metric)
    (folder / "time_to_quality.md").write_text(text + "\n")
    (folder / "time_to_quality.json").write_text(json.dumps(records, indent=2) + "\n")
    print(text)
    return records


def finished(place: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a run that was done before with the same settings, or None."""
    path = place / "record.json"
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return record if {name: record.get(name) for name in settings} == settings else None


def compete(place: Path, settings: dict[str, Any], root: str, device: str) -> dict[str, Any]:
    """Lets a contender train and draw in a process of its own, and keeps what it made.

    Raises:
        RuntimeError: If the process failed.
    """
    place.mkdir(parents=True, exist_ok=True)
    (place / "record.json").unlink(missing_ok=True)
    process = multiprocessing.get_context("spawn").Process(target=_compete, args=(place, settings, root, device))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{settings['contender']} ended with status {process.exitcode}; its message stands above.")
    record: dict[str, Any] = json.loads((place / "record.json").read_text())
    return record


def _compete(place: Path, settings: dict[str, Any], root: str, device: str) -> None:
    torch.set_num_threads(settings["hardware"]["threads"])
    torch.manual_seed(settings["seed"])
    os.environ["TQDM_DISABLE"] = "1"
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
    contest = _ours if settings["contender"] == OURS else _theirs
    drawn, facts = contest(settings, root, device)
    pixels = {title: to_uint8(samples).permute(0, 2, 3, 1).numpy() for title, samples in drawn.items()}
    np.savez_compressed(place / "samples.npz", **pixels)
    for title, samples in drawn.items():
        grid_image(samples[:40], 10).save(place / f"{title}.png")
    with atomic(place / "record.json") as file:
        file.write(json.dumps({**settings, **facts}, indent=2).encode())


class Deadline(Callback):
    """Notes when training began and when each step ended, and ends it when the time is over.

    Attributes:
        seconds: The time.
        latest: The one of the latest run.
    """

    seconds = float("inf")
    latest: "Deadline"

    def __init__(self) -> None:
        self.times: list[float] = []
        Deadline.latest = self

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Notes when the first step began."""
        self.times = self.times or [time.perf_counter()]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Notes the time, and ends the training where it is over."""
        self.times.append(time.perf_counter())
        if self.times[-1] - self.times[0] > self.seconds:
            trainer.should_stop = True


def _ours(settings: dict[str, Any], root: str, device: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`lightning fit`: some steps for the pace, then the run itself in what is left of the time."""
    from diffusion_lit.commands.main import main

    budget = 60 * settings["minutes"]
    with tempfile.TemporaryDirectory() as folder:

        def fit(steps: int) -> None:
            main(
                [
                    *["fit", f"--config={CONFIG}", "--name=run", f"--data.root={root}", *settings["options"]],
                    *[f"--seed_everything={settings['seed']}", f"--data.batch_size={settings['batch_size']}"],
                    *[f"--trainer.logger.init_args.save_dir={folder}", f"--trainer.max_steps={steps}"],
                    *["--trainer.limit_val_batches=0", f"--trainer.callbacks={Deadline.__module__}.Deadline"],
                    f"--trainer.accelerator={'gpu' if device == 'cuda' else 'cpu'}",
                    *["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"],
                ]
            )

        Deadline.seconds = budget / 4
        fit(PACE_STEPS)
        times = Deadline.latest.times
        slow = min(2, len(times) - 2)  # the first steps, which warm up
        pace = (times[-1] - times[slow]) / (len(times) - 1 - slow)
        Deadline.seconds = max(0.0, budget - (times[-1] - times[0]))
        planned = max(1, int(0.98 * Deadline.seconds / pace))
        fit(planned)
        trained = len(Deadline.latest.times) - 1
        module: Any = load_module(Path(folder) / "run/version_1/checkpoints/last.ckpt").to(device)
    frequencies = class_frequencies(_data(root, settings["batch_size"]), module.num_classes)
    drawn, first = {}, 10**6 * settings["seed"]
    for title, scale in {OURS: module.sampling.cfg_scale, UNGUIDED: 1.0}.items():
        steps = settings["nfe"] if scale == 1 else max(1, settings["nfe"] // 2)
        sampling = module.sampling.replace(sampler="dpmpp_2m", num_steps=steps, cfg_scale=scale)
        parts = []
        for start in range(0, settings["num_samples"], CHUNK):
            seeds = [first + row for row in range(start, min(start + CHUNK, settings["num_samples"]))]
            parts.append(module.generate(seeds, draw_labels(seeds, frequencies), sampling).cpu())
        drawn[title] = torch.cat(parts)
    facts = {"images": trained * settings["batch_size"], "steps": trained, "planned": planned}
    facts |= {"cfg_scale": module.sampling.cfg_scale, "parameters": sum(one.numel() for one in module.net.parameters())}
    return drawn, facts


def _data(root: str, batch_size: int) -> FashionMNIST:
    data = FashionMNIST(root, batch_size)
    data.setup()
    return data


def _theirs(settings: dict[str, Any], root: str, device: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A peer's own step on ready batches until the time is over."""
    name, batch = settings["contender"], settings["batch_size"]
    width = max(PEERS[name], MULTIPLES[name])
    threads = settings["hardware"]["threads"]
    job = BenchmarkJob(
        name, settings["precision"], width, 1, 32, batch, settings["nfe"], device, threads, documented=True
    )
    step, draw = peer(job)
    images = torch.as_tensor(np.array(_data(root, batch).reference_images("train")))
    generator = torch.Generator().manual_seed(settings["seed"])
    count, start, order = 0, time.perf_counter(), torch.empty(0, dtype=torch.int64)
    while time.perf_counter() - start < 60 * settings["minutes"]:
        if len(order) < batch:
            order = torch.randperm(len(images), generator=generator)
        rows, order = order[:batch], order[batch:]
        step(images[rows].to(device).float().div_(127.5).sub_(1))
        count += 1
    drawn = []
    for first in range(0, settings["num_samples"], CHUNK):
        drawn.append(draw(min(CHUNK, settings["num_samples"] - first)).float().cpu())
    return {name: torch.cat(drawn)}, {"images": count * batch, "steps": count, "job": asdict(job)}


def table(records: list[dict[str, Any]], floor: tuple[float, int] | None, metric: str) -> str:
    """The table in Markdown, and what the best peer's distance is of this project's.

    Args:
        records: Of all runs.
        floor: The distance of real images to real ones, and at what number.
        metric: Name of the distance.
    """
    names = list(dict.fromkeys(record["contender"] for record in records))
    distances = {name: [one["distance"] for one in records if one["contender"] == name] for name in names}
    first = records[0]
    lines = [
        f"{first['minutes']:g} minutes of training each on {first['hardware']['processor']}, "
        f"{first['hardware']['threads']} threads; {first['num_samples']} samples in {first['nfe']} evaluations.",
        "",
        f"| contender | images seen | {metric}, mean | each seed |",
        "| --- | --: | --: | --- |",
    ]
    for name in names:
        images = statistics.mean(one["images"] for one in records if one["contender"] == name)
        each = ", ".join(f"{value:.2f}" for value in distances[name])
        lines.append(f"| {name} | {magnitude(round(images))} | {statistics.mean(distances[name]):.2f} | {each} |")
    if floor is not None:
        lines.append(f"| real images, {floor[1]} of them | | {floor[0]:.2f} | |")
    peers = [statistics.mean(values) for name, values in distances.items() if name not in (OURS, UNGUIDED)]
    if OURS in distances and peers:
        share = statistics.mean(distances[OURS]) / min(peers)
        lines += ["", f"{OURS} is at {share:.2f} of the best peer's distance; at most 0.25 is the target."]
    return "\n".join(lines)


if __name__ == "__main__":
    from experiments.benchmarks import (
        time_to_quality as this,  # the module that the callback is named by, which __main__ is not
    )

    command(this.time_to_quality)
