"""Kills training at random moments, resumes it, and checks that it ends as an unbroken run does, bit for bit.

Every case is drawn from a seed: its family, ranks, loader workers, images per batch, accumulated batches, length in
steps or epochs, the intervals of saving and validation, the kind of average, and a chain of one to four kills. Each
kill is a SIGKILL after a random while, at the end of a step (often the last of an epoch), before a validation is
saved, or in the middle of writing a checkpoint; the run then goes on with `--ckpt_path last`. Images, trajectories,
the loss by noise level and the configs' own figures are drawn as shipped. Compared with one run that nothing happens
to: the raw weights, the average (EMA), the optimizer's and the schedule's state, all logged figures and all images.

    python -m experiments.benchmarks.torture --kills 50
    python -m experiments.benchmarks.torture --kills 10 --without keys      without keyed seeding: must fail
    python -m experiments.benchmarks.torture --kills 10 --without position  the counters as Lightning restores them

Each run is a fork of this process, which has the libraries loaded, so that a kill costs no second start.
"""

import json
import os
import random
import shutil
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from experiments.benchmarks.families import CONFIGS, FAMILIES, FIGURES
from experiments.benchmarks.killed_runs import Kill, checkpoint, compare, run
from experiments.harness.command import command
from experiments.harness.show import keep_json

COMMON = [
    *["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"],
    *["--trainer.log_every_n_steps=1", "--data.init_args.random_flip=true"],
]


@dataclass(frozen=True)
class Setting:
    """The settings of a case; lengths and intervals in optimizer steps."""

    family: str
    ranks: int
    workers: int
    batch_size: int
    accumulate: int
    epochs: int | None
    steps: int
    save_every: int
    validate_every: int
    widths: bool

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, the last of which may sum up fewer batches."""
        return -(-(1437 // self.batch_size) // self.accumulate)

    @property
    def length(self) -> int:
        """Optimizer steps of the run."""
        return self.steps if self.epochs is None else self.epochs * self.steps_per_epoch


def draw(family: str, rng: random.Random) -> Setting:
    """Draws a setting.

    Returns:
        One of 8 to 30 steps.
    """
    batch_size = rng.choice([96, 128, 160, 192])
    accumulate = rng.choice([1, 1, 2, 3, 4])
    ranks = rng.choice([1, 1, 1, 2])
    per_epoch = -(-(1437 // batch_size) // accumulate)
    epochs = max(2, rng.randint(8, 24) // per_epoch) if rng.random() < 0.5 else None
    return Setting(
        *(family, ranks, rng.choice([0, 0, 2]), batch_size, accumulate, epochs),
        *(rng.randint(8, 30), rng.choice([1, 1, 2, 3, 5]), rng.randint(3, 9), rng.random() < 0.25),
    )


def draw_chain(setting: Setting, count: int, rng: random.Random) -> list[Kill]:
    """Draws kills at rising steps, of which many lie at the ends of epochs.

    Returns:
        The kills in their order.
    """
    edges = list(range(setting.steps_per_epoch, setting.length, setting.steps_per_epoch))
    steps = [
        rng.choice(edges) if edges and rng.random() < 0.5 else rng.randint(1, setting.length) for _ in range(count)
    ]
    kinds = [rng.choice(["step", "step", "step", "saving", "validation", "moment"]) for _ in range(count)]
    amounts = {"saving": lambda: rng.randint(0, 3), "validation": lambda: rng.randint(0, 1)}
    return [
        Kill(kind, step if kind == "step" else amounts.get(kind, lambda: rng.randint(300, 900))())
        for kind, step in zip(kinds, sorted(steps), strict=True)
    ]


def torture(
    kills: int = 50,
    families: list[str] | None = None,
    without: Literal["keys", "position"] | None = None,
    seed: int = 0,
    out: str = "runs/torture",
) -> None:
    """Kills and resumes training, and prints how many runs ended bit-identical.

    Args:
        kills: Number of kills in all.
        families: Names out of the table; all by default.
        without: Takes a repair out, so that the comparison must fail.
        seed: Of all that is drawn.
        out: Folder for the runs and figures.json.
    """
    chosen = families or list(FAMILIES)
    unknown = [name for name in chosen if name not in FAMILIES]
    if unknown or kills < 1:
        raise SystemExit(f"Nothing to do for {kills} kills of {unknown or chosen}; there are {list(FAMILIES)}.")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    take_out(without)
    folder = Path(out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    shutil.rmtree("runs", ignore_errors=True)
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    left = kills
    while left:
        setting = draw(chosen[len(rows) % len(chosen)], rng)
        chain = draw_chain(setting, min(left, rng.randint(1, 4)), rng)
        rows.append(case(len(rows), setting, chain))
        left -= len(rows[-1]["at"])  # a run may end before the last of its kills
        print(line(rows[-1]), flush=True)
        keep_json(folder / "figures.json", {"without": without, "seed": seed, "runs": rows})
    same = [row for row in rows if not row["differs"]]
    happened = sum(len(row["at"]) for row in rows)
    print(f"{happened} kills in {len(rows)} runs, of which {len(same)} ended bit-identical to the unbroken one.")
    if len(same) < len(rows):
        raise SystemExit(1)


def line(row: dict[str, Any]) -> str:
    """A case in words."""
    setting = Setting(**row["setting"])
    length = f"{setting.epochs} epochs" if setting.epochs else f"{setting.steps} steps"
    verdict = f"differs in {', '.join(row['differs'])}" if row["differs"] else "identical"
    return (
        f"{setting.family:<12}{setting.ranks} rank(s), {setting.workers} workers, {setting.accumulate} x "
        f"{setting.batch_size} images, {length} ({setting.steps_per_epoch} an epoch), saved every "
        f"{setting.save_every}, validated every {setting.validate_every}: {row['kills']} left {row['at']}: {verdict}"
    )


def case(number: int, setting: Setting, chain: list[Kill]) -> dict[str, Any]:
    """One setting: an unbroken run, one with a chain of kills, and what differs."""
    args = arguments(setting)
    whole, killed = f"{number:02d}_{setting.family}_whole", f"{number:02d}_{setting.family}_killed"
    started = time.perf_counter()
    if status := run([*args, f"--name={whole}"]):
        raise SystemExit(f"The unbroken run ended with status {status}; see {Path.cwd()}/{whole}.log.")
    seconds = time.perf_counter() - started
    at: list[int] = []
    status = -signal.SIGKILL
    for kill in [*chain, None]:
        resume = ["--ckpt_path=last"] if checkpoint(killed).exists() else []
        if not resume:  # killed before the first checkpoint: from the start, in the same folder
            shutil.rmtree(Path("runs") / killed, ignore_errors=True)
        status = run([*args, f"--name={killed}", *resume], kill, seconds)
        if status == -signal.SIGKILL:
            path = checkpoint(killed)
            at.append(torch.load(path, weights_only=True)["global_step"] if path.exists() else 0)
        else:
            break
    differs = [f"exit status {status}"] if status else compare(whole, killed)
    if not differs:
        for name in (whole, killed):
            shutil.rmtree(Path("runs") / name, ignore_errors=True)
    kills = [f"{kill.kind} {kill.at}" for kill in chain]
    return {"setting": asdict(setting), "kills": kills, "at": at, "differs": differs}


def arguments(setting: Setting) -> list[str]:
    """The command of a case."""
    family = FAMILIES[setting.family]
    needed = {}
    for other in family.needs:
        name = f"needed_{other}"
        if not checkpoint(name).exists():
            run([*arguments(Setting(other, 1, 0, 128, 1, None, 12, 12, 12, False)), f"--name={name}"])
        needed[other] = str(checkpoint(name).resolve())
    limit = [f"--trainer.max_steps={setting.steps}"]
    if setting.epochs is not None:
        limit = ["--trainer.max_steps=-1", f"--trainer.max_epochs={setting.epochs}"]
    return [
        *["fit", "--config", str(CONFIGS / family.config), *COMMON, *limit],
        *(option.format(**needed) if needed else option for option in family.options),
        *(from_files(setting.workers) if setting.workers else []),
        f"--trainer.callbacks={json.dumps([FIGURES[name] for name in family.figures])}",
        f"--data.init_args.batch_size={setting.batch_size}",
        f"--trainer.accumulate_grad_batches={setting.accumulate}",
        f"--trainer.val_check_interval={setting.validate_every}",
        f"--checkpoint.every_n_train_steps={setting.save_every}",
        *(["--ema.sigma_rel=[0.05,0.1]", "--ema.snapshot_every=4"] if setting.widths else []),
        *([f"--trainer.devices={setting.ranks}", "--trainer.strategy=ddp_fork"] if setting.ranks > 1 else []),
    ]


def from_files(workers: int) -> list[str]:
    """Options to read the digits from a folder of images, since loader workers are used for data on disk only."""
    root = Path("digits").resolve()
    if not root.exists():
        from PIL import Image

        from datamodules import Digits

        split = Digits(batch_size=1).split("train")
        assert isinstance(split.images, torch.Tensor) and split.labels is not None
        for index, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
            (root / str(int(label))).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(root / str(int(label)) / f"{index:04d}.png")
    return [
        *["--data=datamodules.ImageFolder", f"--data.init_args.root={root}", "--data.init_args.image_size=8"],
        *["--data.init_args.channels=1", f"--data.init_args.num_workers={workers}"],
        f"--data.init_args.cache_dir={root.parent / 'cache'}",
    ]


def take_out(what: str | None) -> None:
    """Removes a repair.

    Args:
        what: "keys": noise, noise levels and dropout come from the global generator, as in most training code;
            "position": the loop's counters are restored as Lightning does it.
    """
    import diffusion_lit.modules.base as module
    from diffusion_lit.callbacks.loop import RunLoop

    def unkeyed(*key: int | str, device: Any = "cpu") -> torch.Generator:
        return torch.Generator(device).manual_seed(int(torch.randint(2**62, ())))

    base: Any = module
    if what == "keys":
        base.keyed_generator = unkeyed
        base.BaseModule.on_train_batch_start = lambda *args: None
    if what == "position":
        del RunLoop.load_state_dict


if __name__ == "__main__":
    command(torture)
