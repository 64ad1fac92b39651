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
| diffusers                   | train_unconditional.py         | linear schedule, AdamW 1e-4, warm-up of 500 steps     |

This project trains configs/edm_fashion_mnist.yaml, the length of the schedule being set from the pace of its first
steps, whose time is taken off. It is told the classes, of which the peers' examples know nothing, and draws with the
config's guidance, where a step counts as two evaluations; its images without guidance are measured beside them.
Interrupted, it goes on with the contender that was not finished. It is the speedrun (`speedrun`) of several entries, on
terms of one's own: without a locked measure, and without receipts.
"""

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion_lit.checks import check_count, check_number
from diffusion_lit.report.facts import magnitude
from diffusion_lit.runtime.hardware import device_type
from experiments.benchmarks.contenders import OURS, installed
from experiments.benchmarks.entries import Entry, read_entry
from experiments.benchmarks.seeds import machine_of, samples_in, seed_of
from experiments.benchmarks.tracks import Judge, Track
from experiments.benchmarks.trainings import GUIDED, Training
from experiments.harness.command import command
from experiments.harness.show import image_rows, keep_json, markdown
from experiments.harness.study import split

PEERS = ("denoising-diffusion-pytorch", "smalldiffusion", "diffusers")
UNGUIDED = f"{OURS}, without guidance"
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
        options: Further words of `diffusion-lit fit`'s command line, for this project's run.
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
    check_number(above=0, minutes=minutes)
    check_count(seeds=seeds, nfe=nfe, batch_size=batch_size)
    check_count(2, num_samples=num_samples)
    track = Track(
        "datamodules.FashionMNIST",
        minutes,
        device=device_type(accelerator),
        threads=None,
        seeds=tuple(range(seeds)),
        num_samples=num_samples,
        evaluations=nfe,
        extractor="classifier",
    )
    machine, folder = machine_of(track), Path(out)
    judge = Judge(track, track.make_data(root, 1), classifier)
    records: list[dict[str, Any]] = []
    shown: dict[str, Tensor] = {}
    for seed in range(seeds):
        for name in names:
            place = folder / f"{name}_{seed}"
            entry = take_part(name, nfe, batch_size, split(options or [])[1])
            made = seed_of(place, Training(entry, track, seed, root, minutes), judge)
            drawn = samples_in(place)
            for kind, distance in made["figures"].items():
                title = name if kind == GUIDED else f"{name}, {kind}"
                told = {"contender": title, "seed": seed, "minutes": minutes, "nfe": nfe, "num_samples": num_samples}
                records.append({**told, "hardware": machine, **made, "distance": distance})
                shown.setdefault(title, drawn[kind][:SHOWN])
                print(f"{title}, seed {seed}: {judge.metric} {distance:.2f}")
    image_rows(shown).save(folder / "samples.png")
    text = table(records, judge.floor, judge.metric)
    (folder / "time_to_quality.md").write_text(text)
    keep_json(folder / "time_to_quality.json", records)
    print(text)
    return records


def take_part(name: str, nfe: int, batch_size: int | None, options: dict[str, Any]) -> Entry:
    """The entry of a contender under the conditions of the comparison.

    Args:
        name: The contender.
        nfe: Evaluations of the network per image.
        batch_size: Images per training step; None for the entry's own.
        options: What differs from this project's config.
    """
    entry = read_entry(name, "fashion_mnist")
    if name != OURS:
        return replace(entry, batch_size=batch_size or entry.batch_size)
    given = {} if batch_size is None else {"data.init_args.batch_size": batch_size}
    steps = {"model.init_args.sampling.num_steps": max(1, nfe // 2)}
    return replace(entry, options={**entry.options, **steps, **given, **options})


def table(records: list[dict[str, Any]], floor: tuple[float, int] | None, metric: str) -> str:
    """The table in Markdown, and the ratio of the best peer's distance to this project's.

    Args:
        records: Of all runs.
        floor: The distance of real images to real ones, and at what number.
        metric: Name of the distance.
    """
    names = list(dict.fromkeys(record["contender"] for record in records))
    distances = {name: [one["distance"] for one in records if one["contender"] == name] for name in names}
    first = records[0]
    rows = [
        {
            "contender": name,
            "images seen": magnitude(
                round(statistics.mean(one["images"] for one in records if one["contender"] == name))
            ),
            f"{metric}, mean": f"{statistics.mean(found):.2f}",
            "each seed": ", ".join(f"{value:.2f}" for value in found),
        }
        for name, found in distances.items()
    ]
    if floor is not None:
        rows.append({"contender": f"real images, {floor[1]} of them", f"{metric}, mean": f"{floor[0]:.2f}"})
    text = (
        f"{first['minutes']:g} minutes of training each on {first['hardware']['processor']}, "
        f"{first['hardware']['threads']} threads; {first['num_samples']} samples in {first['nfe']} evaluations.\n\n"
        f"{markdown(rows)}"
    )
    peers = [statistics.mean(values) for name, values in distances.items() if name not in (OURS, UNGUIDED)]
    if OURS in distances and peers:
        share = statistics.mean(distances[OURS]) / min(peers)
        text += f"\n{OURS} is at {share:.2f} of the best peer's distance; at most 0.25 is the target.\n"
    return text


if __name__ == "__main__":
    command(time_to_quality)
