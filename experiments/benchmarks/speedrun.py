"""The speedrun: the best images from a fixed time of training, with receipts that anyone can check.

    python -m experiments.benchmarks.speedrun --track fashion_mnist --root FOLDER_OF_FASHION_MNIST
    python -m experiments.benchmarks.speedrun --track fashion_mnist --root FOLDER --entry smalldiffusion
    python -m experiments.benchmarks.speedrun --verify .../receipt.json --root FOLDER

Each track locks data, time, device, seeds, number of samples and evaluations, and the measure (`tracks`). An entry is a
config, or another library (`entries`). Its trainings run one after the other, each from scratch, and are told of the
time: the length of the schedule is set from the pace of the first steps, whose time is taken off, and, until the
learning rate decays, from the pace of late. Training alone is timed, from the first step on; saving a state every so
many steps is in it. Interrupted, the command goes on with the seed that was not finished.

`receipt.json` holds the entry in full, the track and its hash, commit, versions, hardware, for each seed the images
seen, the hashes of its weights and its figures, and a hash of all this. Beside it lie the states at the end and
`replayed` steps before, and the samples. `--verify` does the first and the last of these steps again and compares the
weights bit for bit, draws the samples again and measures them. Where the states are missing, as of a receipt in a
repository, `--retrain` makes them again, which takes as long as the trainings did. Bits are compared on like hardware
only (processor, instruction set, threads, version of torch); elsewhere the figures may differ by 2%.
"""

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusion_lit.report.facts import magnitude
from diffusion_lit.runtime.versions import versions
from experiments.benchmarks.entries import Entry, read_entry
from experiments.benchmarks.seeds import machine_of, seed_of, summary_of
from experiments.benchmarks.tracks import TRACKS, Judge
from experiments.benchmarks.trainings import GUIDED, Training
from experiments.benchmarks.verification import seal, verify_receipt
from experiments.harness.command import command
from experiments.harness.show import keep_json, markdown

OUT = Path("runs/speedrun")


def speedrun(
    track: str = "fashion_mnist",
    entry: str | None = None,
    root: str | None = None,
    extractor_weights: str | None = None,
    out: str | None = None,
    verify: str | None = None,
    retrain: bool = False,
    trust: bool = False,
) -> dict[str, Any]:
    """Trains an entry for the time of a track, measures its images and writes a receipt; or verifies one.

    Args:
        track: The track: fashion_mnist, cifar10, digits_one_step, cifar10_gpu, or digits_seconds to try an entry.
        entry: A YAML, or the name of one in experiments/benchmarks/speedruns; by default diffusion-lit, and that of the
            receipt for `--verify`.
        root: Folder of the track's data, where it is not the digits.
        extractor_weights: File of the extractor's weights, where it needs one.
        out: Folder of the states, the samples and the receipt; runs/speedrun/TRACK/ENTRY by default.
        verify: Receipt to verify; the other options, but root and extractor_weights, are in it.
        retrain: With verify: trains again what has no states beside the receipt.
        trust: With verify: runs the Python file in the receipt, and classes of others that its config names.

    Raises:
        ValueError: If there is no such track or entry, this machine is not that of the track, or the receipt is wrong.
    """
    if verify is not None:
        return verify_receipt(Path(verify), root, extractor_weights, entry, retrain, trust)
    if track not in TRACKS:
        raise ValueError(f"There is no track {track!r}; choose one of {', '.join(TRACKS)}.")
    chosen = read_entry(entry or "diffusion-lit", track)
    return run(track, chosen, root, extractor_weights, OUT / track / chosen.name if out is None else Path(out))


def run(name: str, entry: Entry, root: str | None, weights: str | None, out: Path) -> dict[str, Any]:
    """Trains an entry on a track and writes its receipt.

    Args:
        name: Name of the track.
        entry: What takes part.
        root: Folder of the data.
        weights: File of the extractor's weights, where it needs one.
        out: Folder.
    """
    track = TRACKS[name]
    machine = machine_of(track)
    data = track.make_data(root, 1)
    judge = Judge(track, data, weights)
    runs = [
        {"seed": seed, **seed_of(out / f"seed_{seed}", Training(entry, track, seed, root, track.minutes), judge)}
        for seed in track.seeds
    ]
    receipt: dict[str, Any] = {
        "track": {"name": name, "key": track.key, **asdict(track)},
        "entry": asdict(entry),
        "versions": versions(),
        "hardware": machine,
        "images": data.fingerprint("train"),
        "extractor": judge.extractor.identity(),
        "metric": judge.metric,
        "real_against_real": None if judge.floor is None else {"figure": judge.floor[0], "images": judge.floor[1]},
        "runs": runs,
        "summary": summary_of(runs),
    }
    receipt["sha256"] = seal(receipt)
    keep_json(out / "receipt.json", receipt)
    print(f"{table([receipt])}\nThe receipt is {out / 'receipt.json'}.")
    return receipt


def table(receipts: list[dict[str, Any]]) -> str:
    """Receipts of a track as a table in Markdown, the best first."""
    first = receipts[0]
    mean = f"{first['metric']}, mean of {len(first['track']['seeds'])} seeds"
    rows = []
    for receipt in sorted(receipts, key=lambda one: one["summary"][GUIDED]["mean"]):
        runs, summary = receipt["runs"], receipt["summary"]
        rows.append(
            {
                "entry": receipt["entry"]["name"],
                "images seen": magnitude(round(statistics.mean(one["images"] for one in runs))),
                mean: f"{summary[GUIDED]['mean']:.2f}",
                "each seed": ", ".join(f"{one['figures'][GUIDED]:.2f}" for one in runs),
                "unguided": next((f"{value['mean']:.2f}" for kind, value in summary.items() if kind != GUIDED), ""),
            }
        )
    floor = first["real_against_real"]
    if floor is not None:
        rows.append({"entry": f"real images, {floor['images']} of them", mean: f"{floor['figure']:.2f}"})
    return markdown(rows)


if __name__ == "__main__":
    from experiments.benchmarks.speedrun import speedrun as this  # its processes import it by this name

    command(this)
