"""Kills training at random moments, resumes it, and asks whether it ends as an unbroken run does, bit for bit.

For each family, number of ranks, loader workers and accumulated batches: one run that nothing happens to, and one that
is killed with SIGKILL after a random while or in the middle of writing a checkpoint, again and again, and resumed with
`--ckpt_path last` each time until it ends. Compared are the raw weights, the average (EMA), the optimizer's state and
all logged losses.

    python -m experiments.torture --kills 50
    python -m experiments.torture --kills 4 --keyed false     the keyed seeding taken out: shows that the test can fail

Each run is a fork of this process, which has the libraries loaded, so that a kill costs no second start.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import CLI

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SMALL = ["--model.init_args.net.init_args.model_channels=16", "--model.init_args.net.init_args.dropout=0.1"]


@dataclass(frozen=True)
class Family:
    """A kind of model on the embedded digits.

    Args:
        config: Its config, below configs/.
        options: Options that make it small.
        needs: Families of which a trained run has to be there first; `{NAME}` in an option is that run's checkpoint.
    """

    config: str
    options: list[str]
    needs: tuple[str, ...] = ()


FAMILIES = {
    "ddpm": Family("ddpm_digits.yaml", SMALL),
    "edm": Family("edm_digits.yaml", SMALL),
    "vae": Family("vae_digits.yaml", ["--model.init_args.net.init_args.model_channels=16"]),
    "cold": Family(
        "cold_digits.yaml",
        [
            "--model.init_args.net.init_args.model_channels=16",
            "--model.init_args.degradation=diffusion_lit.diffusion.Mask",
        ],
    ),
    "latent": Family("latent_digits.yaml", [*SMALL, "--model.init_args.vae_ckpt={vae}"], needs=("vae",)),
}

SETTINGS = [  # ranks, loader workers, accumulated batches
    (1, 0, 1),
    (2, 0, 1),
    (1, 2, 3),
    (2, 2, 2),
]

COMMON = [
    *["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"],
    *["--trainer.callbacks=[]", "--trainer.log_every_n_steps=1", "--trainer.val_check_interval=7"],
    *["--checkpoint.every_n_train_steps=3", "--data.init_args.batch_size=128", "--data.init_args.random_flip=true"],
    *["--sample_grid.every=0", "--trajectory.every=0", "--loss_by_noise_level.batches=1"],
    *["--ema.half_life=2000"],
]


def torture(
    kills: int = 50,
    families: list[str] | None = None,
    steps: int = 24,
    keyed: bool = True,
    seed: int = 0,
    out: str = "runs/torture",
) -> None:
    """Kills and resumes training, and prints how many runs ended bit-identical.

    Args:
        kills: Number of kills in all, spread evenly over families and settings.
        families: Names out of the table; all by default.
        steps: Optimizer steps of each run.
        keyed: False takes the keyed seeding of noise and dropout out, so that the comparison must fail.
        seed: Of the random moments.
        out: Folder for the runs and figures.json.
    """
    chosen = families or list(FAMILIES)
    unknown = [name for name in chosen if name not in FAMILIES]
    if unknown or kills < 1:
        raise SystemExit(f"Nothing to do for {kills} kills of {unknown or chosen}; there are {list(FAMILIES)}.")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    import diffusion_lit.commands.fit  # noqa: F401 (loaded once, here)

    if not keyed:
        take_keys_out()
    folder = Path(out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    remove(Path("runs"))
    rng = random.Random(seed)
    cases = [(name, setting) for setting in SETTINGS for name in chosen]
    rows = []
    for index, (name, setting) in enumerate(cases):
        share = kills // len(cases) + (index < kills % len(cases))
        if share:
            rows.append(case(name, setting, share, steps, rng))
            print(line(rows[-1]), flush=True)
    same = [row for row in rows if row["identical"]]
    total, ended = (sum(row[key] for row in rows) for key in ("kills", "ended"))
    saving = sum(row["while_saving"] for row in rows)
    print(
        f"{total} kills, {saving} of them while a checkpoint was written: {ended} runs came to their end, "
        f"and in {len(same)} of {len(rows)} settings all of them bit-identical to the unbroken one."
    )
    (folder / "figures.json").write_text(json.dumps({"keyed": keyed, "steps": steps, "runs": rows}, indent=2))
    if len(same) < len(rows):
        raise SystemExit(1)


def line(row: dict[str, Any]) -> str:
    """A case in words."""
    verdict = "identical" if row["identical"] else f"differs in {', '.join(row['differs'])}"
    return (
        f"{row['family']:<8}{row['ranks']} rank(s), {row['workers']} workers, {row['accumulate']} accumulated: "
        f"{row['kills']} kills ({row['while_saving']} while saving) at steps {row['at']}: {verdict}"
    )


def case(name: str, setting: tuple[int, int, int], kills: int, steps: int, rng: random.Random) -> dict[str, Any]:
    """One family and setting: an unbroken run, a tortured one, and what differs."""
    ranks, workers, accumulate = setting
    label = f"{name}_{ranks}r_{workers}w_{accumulate}a"
    args = arguments(name, setting, steps)
    started = time.perf_counter()
    status = run([*args, f"--name={label}_whole"])
    seconds = time.perf_counter() - started
    if status != 0:
        raise SystemExit(f"The unbroken run of {label} ended with status {status}; see {Path.cwd()}/{label}_whole.log.")
    killed = f"{label}_killed"
    at: list[int] = []
    since_start = while_saving = ended = 0
    differs: set[str] = set()
    while len(at) < kills or since_start:
        saving, last = rng.random() < 0.4, len(at) == kills
        delay = None if saving or last else rng.uniform(0.35, 0.9) * seconds
        resume = ["--ckpt_path=last"]
        if not checkpoint(killed).exists():  # killed before the first checkpoint: from the start, in the same folder
            resume = []
            remove(Path("runs") / killed)
        status = run(
            [*args, f"--name={killed}", *resume],
            kill_after=delay,
            kill_at_save=rng.randint(0, 3) if saving and not last else None,
        )
        if status == -signal.SIGKILL:
            while_saving += saving
            since_start += 1
            path = checkpoint(killed)
            at.append(torch.load(path, weights_only=True)["global_step"] if path.exists() else 0)
            continue
        if since_start or status:  # a run that ended without having been killed shows nothing
            ended += 1
            differs |= {f"exit status {status}"} if status else set(compare(f"{label}_whole", killed))
        remove(Path("runs") / killed)
        since_start = 0
    record = {"family": name, "ranks": ranks, "workers": workers, "accumulate": accumulate, "kills": len(at)}
    record |= {"while_saving": while_saving, "at": at, "ended": ended}
    return record | {"identical": not differs, "differs": sorted(differs)}


def arguments(name: str, setting: tuple[int, int, int], steps: int) -> list[str]:
    """The command of a case."""
    ranks, workers, accumulate = setting
    family = FAMILIES[name]
    for other in family.needs:
        if not checkpoint(f"{other}_needed").exists():
            run([*arguments(other, (1, 0, 1), steps), f"--name={other}_needed"])
    needed = {other: str(checkpoint(f"{other}_needed").resolve()) for other in family.needs}
    options = [option.format(**needed) if needed else option for option in family.options]
    return [
        *["fit", "--config", str(CONFIGS / family.config), *COMMON, *options, f"--trainer.max_steps={steps}"],
        *(from_files(workers) if workers else []),
        f"--trainer.accumulate_grad_batches={accumulate}",
        *([f"--trainer.devices={ranks}", "--trainer.strategy=ddp_fork"] if ranks > 1 else []),
    ]


def from_files(workers: int) -> list[str]:
    """Options that read the digits from a folder of pictures, as loader workers only do for data on disk."""
    root = Path("digits").resolve()
    if not root.exists():
        from PIL import Image

        from datamodules import Digits

        images, labels = Digits(batch_size=1).split("train")
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            (root / str(int(label))).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(root / str(int(label)) / f"{index:04d}.png")
    return [
        *["--data=datamodules.ImageFolder", f"--data.init_args.root={root}", "--data.init_args.image_size=8"],
        *["--data.init_args.channels=1", f"--data.init_args.num_workers={workers}"],
        *[f"--data.init_args.cache_dir={root.parent / 'cache'}", "--data.init_args.random_flip=true"],
        "--data.init_args.batch_size=120",
    ]


def run(args: list[str], kill_after: float | None = None, kill_at_save: int | None = None) -> int:
    """Runs the command in a fork of this process, in a session of its own that can be killed as a whole.

    Args:
        args: The command line.
        kill_after: Kills it after so many seconds.
        kill_at_save: Kills it in the middle of writing a checkpoint, after letting so many through.

    Returns:
        Its exit status, negative for the signal that ended it.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _be_the_run(args, kill_at_save)
    deadline = None if kill_after is None else time.monotonic() + kill_after
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            _end_session(child)  # ranks of a run whose first process is gone
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() > deadline:
            _end_session(child)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.01)


def _end_session(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def _be_the_run(args: list[str], kill_at_save: int | None) -> None:
    """What the fork does; never returns."""
    status = 70
    try:
        os.setsid()
        name = next(arg.split("=")[1] for arg in args if arg.startswith("--name="))
        log = os.open(f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if kill_at_save is not None:
            kill_while_saving(kill_at_save)
        from diffusion_lit.commands.main import main

        main(args)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def kill_while_saving(let_through: int) -> None:
    """Kills all processes of the run in the middle of a checkpoint's write.

    Args:
        let_through: Number of checkpoints that are written before.
    """
    from diffusion_lit.storage import checkpoint_io as saving

    before: Callable[..., None] = saving._save
    left = [let_through]

    def save(content: dict[str, Any], file: Any) -> None:
        if left[0] == 0:
            before(content, file)
            file.flush()
            os.ftruncate(file.fileno(), file.tell() // 2)
            os.killpg(os.getpgid(0), signal.SIGKILL)
        left[0] -= 1
        before(content, file)

    saving._save = save


def take_keys_out() -> None:
    """Lets noise, noise levels and dropout come from the global generator, as they do in most training code."""
    import diffusion_lit.modules.base as base

    def unkeyed(*key: int | str, device: Any = "cpu") -> torch.Generator:
        return torch.Generator(device).manual_seed(int(torch.randint(2**62, ())))

    base.keyed_generator = unkeyed
    base.KeyedModule.on_train_batch_start = lambda *args: None  # type: ignore[method-assign]


def checkpoint(name: str) -> Path:
    """The last checkpoint of a run."""
    return Path("runs") / name / "version_0" / "checkpoints" / "last.ckpt"


def remove(folder: Path) -> None:
    """Deletes a run."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def compare(whole: str, killed: str) -> list[str]:
    """What differs between two runs, to the bit."""
    one, two = (torch.load(checkpoint(name), weights_only=True) for name in (whole, killed))
    parts = {
        "raw weights": "current_model_state",
        "average weights": "state_dict",
        "optimizer": "optimizer_states",
        "schedule": "lr_schedulers",
        "global step": "global_step",
    }
    differs = [what for what, key in parts.items() if not equal(one[key], two[key])]
    logs = [losses(Path("runs") / name / "version_0") for name in (whole, killed)]
    if logs[0] != logs[1]:
        differs.append("logged losses")
    return differs


def equal(one: Any, two: Any) -> bool:
    """Whether two nested values are the same to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(equal, one, two))
    return bool(one == two)


def losses(folder: Path) -> dict[str, dict[int, float]]:
    """All logged losses by tag and step; of a step that was done twice, the later."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if "loss" in value.tag and value.HasField("tensor"):
                    found.setdefault(value.tag, {})[event.step] = value.tensor.float_val[0]
    return found


if __name__ == "__main__":
    CLI(torture, as_positional=False)
