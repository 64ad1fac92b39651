"""Checks this project on one NVIDIA GPU, offline, in at most 8 minutes: a line per check, and a JSON of figures.

    make check-gpu                                        or python tools/check_gpu.py
    python tools/check_gpu.py --device cpu --minutes 30   the same lines on a CPU, tiny: a rehearsal without a GPU
    python tools/check_gpu.py --only speed,graphs         some checks; --all true compiles every batch size and layout

It needs torch, which brings jinja2, and the project's other dependencies; a machine with Python 3.12 and torch 2.11
lacks torchvision, lightning, torchmetrics, torch-fidelity, tensorboard, einops, jsonargparse, scikit-learn, matplotlib
and safetensors (`pip install -e .` brings them), and diffusers for the line beside it (`pip install diffusers`); what
is lacking is named at the start. The checks that tell most come first; one for which no time is left is skipped and
said so. The figures are written after each check, so that a run that is cut short leaves those that it had.
"""

import copy
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHORT = ["--trainer.log_every_n_steps=10", "--trainer.enable_progress_bar=false"]
FIT = ["fit", "--config", str(ROOT / "configs/edm_digits.yaml"), *SHORT]
NO_FID = "--trainer.callbacks=[]"


class Skip(Exception):
    """A check that cannot be made here, and why."""


def lacking(*more: str) -> list[str]:
    """Packages that are needed and not installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = []
    for wanted in (*project["dependencies"], *more):
        try:
            version(re.split(r"[^\w.-]", wanted)[0])
        except PackageNotFoundError:
            found.append(wanted)
    return found


@dataclass
class Check:
    """What the checks share: the device, where they write, the time that is left, and the figures so far."""

    device: str
    folder: Path
    until: float
    everything: bool
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def gpu(self) -> bool:
        """Whether it is no rehearsal."""
        return self.device == "cuda"

    def command(self, *options: str, here: bool = True) -> str:
        """Runs `lightning`, and gives what it printed.

        Raises:
            RuntimeError: If it fails or takes more than the time that is left.
        """
        accelerator = [f"--trainer.accelerator={self.device}"] if here else []
        cache = {"XDG_CACHE_HOME": str(self.folder / "cache"), "DIFFUSION_LIT_CACHE": str(self.folder / "cache")}
        env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **cache}
        left = max(20.0, self.until - time.monotonic())
        run = subprocess.run(
            [sys.executable, "-m", "diffusion_lit", *options, *accelerator],
            cwd=self.folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=left,
        )
        if run.returncode:
            raise RuntimeError(
                f"diffusion-lit {' '.join(options[:4])} ... ended with {run.returncode}: {run.stderr[-3000:]}"
            )
        return run.stdout + run.stderr

    def last(self, name: str) -> Path:
        """The last checkpoint of a run."""
        return self.folder / f"runs/{name}/version_0/checkpoints/last.ckpt"


def default_fit(check: Check) -> str:
    """The demo's config as it is, everything on, cut short."""
    said = check.command(*FIT, "--trainer.max_steps=40", "--trainer.val_check_interval=20", "--name=default")
    drawn = list((check.folder / "runs/default/version_0/samples").glob("*.png"))
    assert len(drawn) == 2 and check.last("default").exists(), "no images, or no checkpoint"
    hardware = re.search(r"On .*", said)
    check.figures["hardware"] = hardware[0] if hardware else ""
    return check.figures["hardware"]


def precisions(check: Check) -> str:
    """Ten steps in each precision; bf16-true, in which small steps are lost, is refused in a sentence."""
    for precision in ("16-mixed", "bf16-mixed", "32-true"):
        more = ["--trainer.max_steps=10", NO_FID, f"--trainer.precision={precision}", f"--name={precision}"]
        check.command(*FIT, *more)
    try:
        check.command(*FIT, "--trainer.max_steps=1", NO_FID, "--trainer.precision=bf16-true", "--name=true")
    except RuntimeError as error:
        assert "Traceback" not in str(error) and "bf16-mixed" in str(error), error
        return "16-mixed, bf16-mixed and 32-true end; bf16-true is refused"
    raise AssertionError("bf16-true was not refused")


def one_rank(check: Check) -> str:
    """DDP with one rank: NCCL on a GPU."""
    more = ["--trainer.strategy=ddp", "--trainer.devices=1", "--trainer.max_steps=10", NO_FID, "--name=ddp"]
    check.command(*FIT, *more)
    return "NCCL" if check.gpu else "gloo"


def cpu_and_gpu(check: Check) -> str:
    """The same seeds from the same checkpoint on CPU and GPU."""
    import numpy as np

    made = []
    for device in ("cpu", check.device):
        options = ["--num_samples=64", "--labels=all", f"--device={device}", f"--out=drawn_{device}"]
        check.command("sample", "--ckpt_path", str(check.last("default")), *options, here=False)
        made.append(np.load(check.folder / f"drawn_{device}/samples.npz")["arr_0"].astype(int))
    difference = abs(made[0] - made[1])
    check.figures["cpu_and_gpu"] = {"mean": float(difference.mean()), "largest": int(difference.max())}
    assert difference.mean() < 0.5 and difference.max() < 8, check.figures["cpu_and_gpu"]
    return f"mean difference {difference.mean():.4f}, largest {difference.max()} of 255"


def held_out_loss(check: Check) -> str:
    """The loss of the same checkpoint on the same held-out draws."""
    found = []
    for device in ("cpu", check.device):
        options = ["--config", str(ROOT / "configs/edm_digits.yaml"), NO_FID, "--ckpt_path", str(check.last("default"))]
        said = check.command("validate", *options, f"--trainer.accelerator={device}", here=False)
        found.append(float(re.findall(r"val/loss\D+([\d.]+)", said)[-1]))
    check.figures["val_loss"] = found
    assert abs(found[0] - found[1]) < 1e-3 * found[0], found
    return f"{found[0]:.6f} on the CPU, {found[1]:.6f} on {check.device}"


def samplers(check: Check) -> str:
    """Every sampler, a few steps."""
    import torch

    from diffusion_lit import load_model
    from diffusion_lit.diffusion.samplers import SAMPLERS

    module = load_model(str(check.last("default"))).to(check.device)
    refused = []
    for name in SAMPLERS:
        try:
            drawn = module.generate([0, 1, 2, 3], None, module.sampling.replace(sampler=name, num_steps=4))
        except ValueError as error:  # one that suits no model of this kind, and says so
            refused.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        assert torch.isfinite(drawn).all() and drawn.device.type == check.device, name
    check.figures["samplers_refused"] = refused
    return f"{len(SAMPLERS) - len(refused)} of {len(SAMPLERS)} draw" + (f"; {'; '.join(refused)}" if refused else "")


STOPS = """
import warnings, torch
from lightning.pytorch import Callback

class Stops(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if torch.cuda.is_available() and batch_idx == 11:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if torch.cuda.is_available() and batch_idx == 40:
            torch.cuda.set_sync_debug_mode("default")
        if batch_idx == 41:
            print("no host stop in 30 steps", flush=True)
"""


def host_stops(check: Check) -> str:
    """Thirty steps between two logging intervals, in which the host must not wait for the GPU."""
    (check.folder / "stops.py").write_text(STOPS)
    more = ["--trainer.callbacks=stops.Stops", "--trainer.log_every_n_steps=1000", "--trainer.max_steps=50"]
    said = check.command(*FIT, "--trainer.max_epochs=9", *more, "--data.init_args.batch_size=16", "--name=stops")
    assert "no host stop in 30 steps" in said, said[-800:]
    return "none in 30 steps"


def exact_resume(check: Check) -> str:
    """A run in one go and one that was stopped, under deterministic kernels."""
    import torch

    common = [*FIT, NO_FID, "--trainer.deterministic=true"]
    check.command(*common, "--trainer.max_steps=20", "--name=whole", "--model.init_args.lr_scheduler=null")
    for steps, more in ((9, []), (20, ["--ckpt_path=last"])):
        options = [f"--trainer.max_steps={steps}", "--name=parts", "--model.init_args.lr_scheduler=null"]
        check.command(*common, *options, *more)
    one, two = (torch.load(check.last(name), weights_only=True) for name in ("whole", "parts"))
    for part in ("state_dict", "current_model_state"):
        for name, value in one[part].items():
            assert torch.equal(value, two[part][name]), name
    return "bit for bit"


def clock(check: Check, work: Callable[[], Any], times: int) -> float:
    """Seconds of one call, after three to warm up."""
    import torch

    wait = torch.cuda.synchronize if check.gpu else (lambda: None)
    for _ in range(3 if check.gpu else 1):
        work()
    wait()
    start = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - start) / times


def peak(check: Check) -> float:
    """Operations per second of a bf16 convolution, 256 channels at 32x32, forward and backward, in NHWC."""
    import torch

    batch, width = (256, 256) if check.gpu else (2, 32)
    layer = torch.nn.Conv2d(width, width, 3, padding=1, device=check.device, dtype=torch.bfloat16)
    layer.to(memory_format=torch.channels_last)
    x = torch.randn(batch, width, 32, 32, device=check.device, dtype=torch.bfloat16, requires_grad=True)
    x = x.to(memory_format=torch.channels_last).detach().requires_grad_()
    out = torch.randn_like(layer(x))
    seconds = clock(check, lambda: layer(x).backward(out), 20 if check.gpu else 2)
    return 3 * 2 * batch * 32 * 32 * width * width * 9 / seconds


def train_step(check: Check, net: Any, batch: int, channels_last: bool) -> float:
    """Images per second of a training step in bf16 autocast with fused AdamW."""
    import torch

    net = net.to(check.device).train()
    net.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    x, t = torch.randn(batch, 3, 32, 32, device=check.device), torch.rand(batch, device=check.device)

    def step() -> None:
        with torch.autocast(check.device, torch.bfloat16):
            loss = net(x, t).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return batch / clock(check, step, 10 if check.gpu else 1)


def speed(check: Check) -> str:
    """The DDPM++ network's images per second and share of the measured peak, eager and compiled."""
    import torch

    from diffusion_lit.callbacks.cost import network_cost
    from diffusion_lit.nets.presets import DDPMpp

    net = DDPMpp(in_channels=3, image_size=32, channel_mult=(2, 2, 2) if check.gpu else (1,))
    torch.backends.cudnn.benchmark = True  # as `fit` has it
    flop, top = network_cost(net, (3, 32, 32)).training, peak(check)
    figures: dict[str, Any] = {"peak_tflops": top / 1e12, "gflop_per_image": flop / 1e9, "images_per_s": {}}
    check.figures["speed"] = figures
    plans = [(64, True, False), (512, True, False), (512, False, False), (512, True, True)]
    plans += [(64, False, False), (64, True, True), (512, False, True)] if check.everything else []
    for batch, nhwc, compiled in plans:
        batch = batch if check.gpu else 2
        probe = copy.deepcopy(net)
        if compiled:
            probe.compile(backend="inductor" if check.gpu else "eager", dynamic=False)
        name = f"{batch} {'NHWC' if nhwc else 'NCHW'} {'compiled' if compiled else 'eager'}"
        if check.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            found = train_step(check, probe, batch, nhwc)
        except torch.OutOfMemoryError:
            print(f"         {name}: out of memory")
            continue
        memory = torch.cuda.max_memory_allocated() / 2**30 if check.gpu else 0.0
        figures["images_per_s"][name] = {"images_per_s": found, "share": found * flop / top, "gib": memory}
        print(f"         {name}: {found:,.0f} images/s, {found * flop / top:.0%} of the peak, {memory:.1f} GiB")
    best = max(one["share"] for one in figures["images_per_s"].values())
    assert best >= 0.5 or not check.gpu, f"{best:.0%} of the measured bf16 convolution peak; the target is 50%"
    return f"{best:.0%} of {top / 1e12:.1f} TFLOP/s"


def beside_diffusers(check: Check) -> str:
    """The UNet2DModel of diffusers under the same bf16 autocast: as it is built (eager, NCHW), and both compiled."""
    if missing := lacking("diffusers>=0.42")[-1:]:
        raise Skip(f"pip install {missing[0]}")
    from diffusers import UNet2DModel

    from diffusion_lit.callbacks.cost import network_cost
    from experiments.benchmarks.contenders import Called

    width = 160 if check.gpu else 32
    blocks = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
              "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]}  # fmt: skip
    unet = UNet2DModel(32, 3, 3, block_out_channels=[width, 2 * width, 2 * width], layers_per_block=3, **blocks)
    net = Called("diffusers", unet)
    flop, batch = network_cost(net, (3, 32, 32)).training, 512 if check.gpu else 2
    plain = train_step(check, copy.deepcopy(net), batch, False)
    net.compile(backend="inductor" if check.gpu else "eager", dynamic=False)
    compiled = train_step(check, net, batch, True)
    rates = {"defaults": plain * flop, "compiled": compiled * flop}
    check.figures["diffusers"] = {"gflop_per_image": flop / 1e9, "images_per_s": [plain, compiled]}
    speeds = check.figures.get("speed", {})
    mine = [one["images_per_s"] * speeds["gflop_per_image"] * 1e9 for one in speeds.get("images_per_s", {}).values()]
    if not mine:
        return "no figures of ours to compare with: run the check `speed` too"
    ratio = max(mine) / rates["defaults"]
    check.figures["diffusers"]["times_defaults"] = ratio
    assert ratio >= 2 or not check.gpu, f"{ratio:.2f} times diffusers' defaults at equal operations; the target is 2"
    return f"{ratio:.2f} times its defaults, {max(mine) / rates['compiled']:.2f} times it compiled, at equal operations"


def graphs(check: Check) -> str:
    """Sampling with CUDA graphs beside plain sampling."""
    from diffusion_lit import load_model

    module, count = load_model(str(check.last("default"))).to(check.device), 512 if check.gpu else 8
    found = []
    for compiled in (False, True):
        if compiled:
            options = {"mode": "reduce-overhead"} if check.gpu else {"backend": "eager"}
            module.net.compile(dynamic=False, **options)
        found.append(count / clock(check, lambda: module.generate(range(count)).sum().item(), 3 if check.gpu else 1))
    check.figures["sampling_images_per_s"] = found
    return f"{found[0]:,.0f} images/s, {found[1]:,.0f} with graphs"


CHECKS: dict[str, Callable[[Check], str]] = {
    "fit": default_fit,
    "host-stops": host_stops,
    "speed": speed,
    "diffusers": beside_diffusers,
    "cpu-and-gpu": cpu_and_gpu,
    "precisions": precisions,
    "val-loss": held_out_loss,
    "samplers": samplers,
    "graphs": graphs,
    "resume": exact_resume,
    "nccl": one_rank,
}


def main(
    device: str = "cuda", out: str = "check_gpu.json", minutes: float = 8.0, only: str = "", all: bool = False
) -> None:
    """Runs the checks.

    Args:
        device: cuda, or cpu for a rehearsal.
        out: The figures, a JSON file.
        minutes: Time for all.
        only: Names of checks, separated by commas; all by default. Most need `fit` before them, which is added.
        all: Whether every batch size and layout is compiled, beyond the 8 minutes.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no NVIDIA GPU here; --device cpu rehearses the same lines on the CPU.")
    chosen = ["fit", *(name for name in only.split(",") if name != "fit")] if only else list(CHECKS)
    if unknown := [name for name in chosen if name not in CHECKS]:
        raise SystemExit(f"There is no check {unknown[0]!r}; choose among {', '.join(CHECKS)}.")
    started, failed = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        check = Check(device, Path(folder), started + 60 * minutes, all)
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        check.figures |= {"device": name, "torch": torch.__version__, "python": sys.version.split()[0], "checks": {}}
        for name in chosen:
            begun = time.monotonic()
            if begun > check.until:
                result, said = "SKIP", "no time is left; --minutes gives more"
            else:
                try:
                    result, said = "PASS", CHECKS[name](check)
                except Skip as reason:
                    result, said = "SKIP", str(reason)
                except Exception as error:
                    result, said = "FAIL", f"{type(error).__name__}: {error}"
            failed += result != "PASS"
            seconds = time.monotonic() - begun
            check.figures["checks"][name] = {"result": result, "said": said, "seconds": round(seconds, 1)}
            check.figures["seconds"] = round(time.monotonic() - started)
            Path(out).write_text(json.dumps(check.figures, indent=1))
            print(f"{result}  {name:<12} {seconds:5.0f} s  {said}", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} passed in {check.figures['seconds']} s; the figures are in {out}")
    raise SystemExit(min(failed, 1))


if __name__ == "__main__":
    if missing := lacking():
        raise SystemExit(f"This Python lacks what the project needs: pip install {' '.join(map(repr, missing))}")
    from jsonargparse import CLI

    CLI(main)
