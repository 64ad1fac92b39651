"""Speed of training and sampling compared with peers, on the same work in the same run.

    python -m experiments.benchmarks.throughput

Each contender (`contenders`) lives in a process of its own (`processes`) and takes its turn, slice after slice, so
that what else the machine does strikes all alike; what counts is the ratio of the slices of one round, its median and
its spread over the rounds; Ctrl-C ends it with the rounds that are done. Widths are chosen for equal floating-point
operations per image of a training step; what a library's groups of channels leave of a difference is divided out. The
shares refer to the peaks of a matrix product and of a convolution that torch reaches on this machine in the same
precision, measured in the same rounds.
"""

import gc
import os
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffusion_lit.checks import check_count
from diffusion_lit.runtime.hardware import bf16_pays, device_type, hardware, keep_freed_memory, use_threads
from diffusion_lit.runtime.versions import versions
from experiments.benchmarks.contenders import OURS, BenchmarkJob, installed, nearest, title_of
from experiments.benchmarks.processes import Contender
from experiments.benchmarks.stopwatch import Slice, Stopwatch
from experiments.harness.command import command
from experiments.harness.show import keep_json, markdown

DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}


def throughput(
    gflops: float = 8.7,
    batch_size: int = 32,
    channels: int = 3,
    size: int = 32,
    nfe: int = 4,
    rounds: int = 5,
    steps: int = 1,
    samples: int = 32,
    peers: list[str] | None = None,
    precisions: list[str] | None = None,
    accelerator: str = "auto",
    out: str = "runs/studies/throughput",
) -> dict[str, Any]:
    """Measures this project beside its peers.

    Args:
        gflops: Operations per image of a training step, in 10^9, that the widths are chosen for.
        batch_size: Images per training step.
        channels: Channels of an image.
        size: Its side in pixels.
        nfe: Steps of the samplers.
        rounds: How often each contender takes its turn; one more round before them is for warming up.
        steps: Training steps in a turn.
        samples: Images that a turn draws.
        peers: The peers to take part; all that are installed when omitted.
        precisions: 32-true, bf16-mixed or both; by default float32 and what `diffusion-lit fit` chooses here.
        accelerator: auto, cpu or cuda.
        out: Folder for throughput.json and throughput.md.

    Returns:
        The report that is written as JSON.

    Raises:
        ValueError: If there is no such peer or precision, or a count is below 1.
    """
    check_count(batch_size=batch_size, nfe=nfe, rounds=rounds, steps=steps, samples=samples)
    for name in peers or []:
        if name not in installed()[1:]:
            raise ValueError(f"There is no peer {name!r} here; installed are {', '.join(installed()[1:]) or 'none'}.")
    device = device_type(accelerator)
    threads = use_threads()
    default = "bf16-mixed" if bf16_pays(device) else "32-true"
    precisions = precisions or sorted({"32-true", default})
    for precision in precisions:
        if precision not in DTYPES:
            raise ValueError(f"There is no precision {precision!r} here; choose of {', '.join(DTYPES)}.")
    default = default if default in precisions else precisions[0]
    costs = {name: nearest(name, gflops, channels, size) for name in [OURS, *(peers or installed()[1:])]}
    jobs = [
        BenchmarkJob(name, precision, found.width, channels, size, batch_size, nfe, device, threads)
        for name, found in costs.items()
        for precision in precisions
    ]
    report = {
        "gflops": gflops,
        "batch_size": batch_size,
        "shape": [channels, size, size],
        "nfe": nfe,
        "rounds": rounds,
        "default_precision": default,
        "hardware": {**hardware(torch.device(device), 1), "load": os.getloadavg()[0]},
        "versions": versions(),
    }
    taken, peaks, memories = measure(jobs, rounds, steps, samples)
    report["peaks"] = {
        f"{kind}, {precision}": summary([one / 1e9 for one in values]) for (kind, precision), values in peaks.items()
    }
    report["contenders"] = [
        {
            "name": job.name,
            "precision": job.precision,
            **asdict(costs[job.name]),
            "train": rates(taken["train", job.title], taken["train", title_of(OURS, default)], costs, job.name),
            "sample": rates(
                taken["sample", job.title], taken["sample", title_of(OURS, job.precision)], costs, job.name
            ),
            "memory": memories[job.title],
        }
        for job in jobs
    ]
    keep_json(Path(out) / "throughput.json", report)
    text = page(report)
    (Path(out) / "throughput.md").write_text(text)
    print(text)
    return report


Taken = dict[tuple[str, str], list[Slice]]


def measure(
    jobs: list[BenchmarkJob], rounds: int, steps: int, samples: int
) -> tuple[Taken, dict[tuple[str, str], list[float]], dict[str, dict[str, int]]]:
    """Lets the contenders take turns.

    Returns:
        The slices of training and sampling by kind and title, the machine's peaks in operations per second by kind and
        precision, and the memory of each contender in bytes: `at_rest`, before its first step, and at the `peak` of
        training.
    """
    taken: Taken = defaultdict(list)
    peaks: dict[tuple[str, str], list[float]] = defaultdict(list)
    memories: dict[str, dict[str, int]] = {}
    contenders: list[Contender] = []
    try:
        contenders += [Contender(job) for job in jobs]
        for contender in tqdm(contenders, desc="starting", leave=False):
            memories[contender.job.title] = {"at_rest": contender.ask("memory")}
        for turn in tqdm(range(rounds + 1), desc="rounds"):
            try:
                slices, reached = _round(contenders, steps, samples, memories)
            except KeyboardInterrupt:
                if not taken:
                    raise
                break
            if turn == 0:  # the warm-up round
                continue
            for key, one in slices.items():
                taken[key].append(one)
            for peak, value in reached.items():
                peaks[peak].append(value)
    finally:
        for contender in contenders:
            contender.stop()
    return taken, peaks, memories


def _round(
    contenders: list[Contender], steps: int, samples: int, memories: dict[str, dict[str, int]]
) -> tuple[dict[tuple[str, str], Slice], dict[tuple[str, str], float]]:
    """One turn of each contender at training, one at sampling, and the machine's peaks."""
    slices: dict[tuple[str, str], Slice] = {}
    for contender in contenders:
        title = contender.job.title
        slices["train", title] = contender.ask("train", steps)
        memories[title]["peak"] = contender.ask("memory")
    for contender in contenders:
        slices["sample", contender.job.title] = contender.ask("sample", samples)
    precisions = dict.fromkeys(contender.job.precision for contender in contenders)
    device = contenders[0].job.device
    reached = {(kind, one): work(device, DTYPES[one]) for one in precisions for kind, work in WORKS.items()}
    return slices, reached


def matrix_product(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a product of two square matrices."""
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return _rate(lambda: a @ b, 2 * side**3, device)


def convolution(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a 3x3 convolution of the middle of such a network: 128 channels at 16x16 pixels."""
    channels, side, batch = (256, 32, 256) if device == "cuda" else (128, 16, 64)
    layer = nn.Conv2d(channels, channels, 3, padding=1, device=device, dtype=dtype).requires_grad_(False)
    x = torch.randn(batch, channels, side, side, device=device).to(dtype)
    if device == "cuda":
        layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    return _rate(lambda: layer(x), 2 * 9 * channels**2 * side**2 * batch, device)


WORKS: dict[str, Callable[[str, torch.dtype], float]] = {"matrix product": matrix_product, "convolution": convolution}


def _rate(work: Callable[[], Tensor], operations: int, device: str, repeats: int = 5) -> float:
    """Operations per second of the fastest of a few repeats."""
    work()
    best = float("inf")
    for _ in range(repeats):
        watch = Stopwatch(device)
        work()
        best = min(best, watch.read().seconds)
    gc.collect()
    return operations / best


def summary(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest of some values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def rates(mine: list[Slice], ours: list[Slice], costs: dict[str, Any], name: str) -> dict[str, Any]:
    """Speed of a contender, and this project's as a multiple of it, round by round.

    Returns:
        `images_per_second`; `at_equal_flops`, those times its operations per image over this project's; `ratio`, this
        project's images per second over those; each with median, min and max; `page_faults` per image; and
        `cpu_share`, CPU seconds per second.
    """
    share = costs[name].training / costs[OURS].training
    equal = [one.images / one.seconds * share for one in mine]
    return {
        "images_per_second": summary([one.images / one.seconds for one in mine]),
        "at_equal_flops": summary(equal),
        "ratio": summary([one.images / one.seconds / rate for one, rate in zip(ours, equal, strict=True)]),
        "page_faults": statistics.median(one.faults / one.images for one in mine),
        "cpu_share": statistics.median(one.cpu / one.seconds for one in mine),
    }


def page(report: dict[str, Any]) -> str:
    """The report as text.

    Args:
        report: As `throughput` returns it.
    """
    default, machine = report["default_precision"], report["hardware"]
    training, sampling = [], []
    for one in report["contenders"]:
        trained, drawn = one["train"], one["sample"]
        title = title_of(one["name"], one["precision"])
        reached = trained["images_per_second"]["median"] * one["training"] / 1e9
        peaks = {kind: report["peaks"][f"{kind}, {one['precision']}"]["median"] for kind in WORKS}
        training.append(
            {
                "contender": title,
                "parameters": f"{one['parameters'] / 1e6:.1f}M",
                "GFLOP/image": f"{one['training'] / 1e9:.2f}",
                "images/s": spread(trained["images_per_second"]),
                "at equal FLOPs": f"{trained['at_equal_flops']['median']:.3g}",
                "times": spread(trained["ratio"]),
                "GFLOP/s": f"{reached:.0f}",
                **{f"of {kind}": f"{reached / peak:.0%}" for kind, peak in peaks.items()},
                "memory of training": f"{(one['memory']['peak'] - one['memory']['at_rest']) / 2**20:,.0f} MiB",
            }
        )
        sampling.append(
            {
                "contender": title,
                "images/s": spread(drawn["images_per_second"]),
                "times": spread(drawn["ratio"]),
                "page faults/image": f"{drawn['page_faults']:,.0f}",
            }
        )
    lines = [
        "# Throughput beside peers",
        "",
        f"{'x'.join(map(str, report['shape']))} images, batches of {report['batch_size']}, {report['rounds']} rounds;",
        f"{machine['processor']}, {machine['threads']} threads, load {machine['load']:.1f} at the start; torch "
        f"{report['versions']['torch']}. Each figure is the median (smallest to largest round).",
        "",
        f"Training. Times: images/s of {OURS} at its default here ({default}), over the contender's at equal FLOPs.",
        "",
        markdown(training),
        f"Sampling, {report['nfe']} steps. Times: images/s of {OURS} in the same precision, over the contender's at "
        "equal FLOPs.",
        "",
        markdown(sampling),
        "Peaks of this machine: " + "; ".join(f"{k} {spread(v)} GFLOP/s" for k, v in report["peaks"].items()),
    ]
    return "\n".join([*lines, ""])


def spread(values: dict[str, float]) -> str:
    """A median with the smallest and the largest."""
    return f"{values['median']:.3g} ({values['min']:.3g} to {values['max']:.3g})"


if __name__ == "__main__":
    keep_freed_memory()
    command(throughput)
