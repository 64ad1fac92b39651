"""Where the time of a training step goes, and the overhead of Lightning, samplers and guidance over the network.

    python -m experiments.benchmarks.profile_step --config configs/edm_fashion_mnist.yaml

Three measurements. First `diffusion-lit fit` takes turns with a bare PyTorch loop over the same step (the same batches,
draws, network, loss, precision, optimizer and a plain average of the weights, without Lightning, callbacks and
logging), so that what else the machine does strikes both; the ratio is of CPU time on a CPU, of the clock on a GPU.
Second the records of Lightning's profiler say where the time of `fit` goes. Third each sampler runs with a network of
about 5M parameters and with one that does nothing, and guidance beside one forward of the same batch.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from torch import Tensor, nn

from diffusion_lit.checks import check_count
from diffusion_lit.commands.fit import CLI as LightningFit
from diffusion_lit.commands.fit import run
from diffusion_lit.diffusion import (
    ClassifierFreeGuidance,
    Denoiser,
    EDMPreconditioning,
    EpsPreconditioning,
    LinearSchedule,
    Sampling,
)
from diffusion_lit.nets import UNet
from diffusion_lit.report.facts import count_parameters
from diffusion_lit.runtime.hardware import hardware, keep_freed_memory
from experiments.benchmarks.stopwatch import Slice, Stopwatch
from experiments.benchmarks.turns import Finished, Recorder, Rounds, Turns
from experiments.harness.command import command
from experiments.harness.show import keep_json, markdown

SAMPLERS = {
    "heun": EDMPreconditioning(),
    "euler": EDMPreconditioning(),
    "dpmpp_2m": EDMPreconditioning(),
    "ddpm": EpsPreconditioning(LinearSchedule()),
}
TARGETS = {"Lightning": 0.02, "data": 0.01, "sampler": 0.005, "guidance": 2.05}


def profile_step(
    config: list[str],
    options: list[str] | None = None,
    rounds: int = 40,
    steps: int = 2,
    repeats: int = 5,
    samples: int = 16,
    sampling_steps: int = 4,
    channels: int = 56,
    out: str = "runs/studies/profile_step",
) -> dict[str, Any]:
    """Measures where a step's time goes.

    Args:
        config: Configs as for `diffusion-lit fit`, of a model on pixels.
        options: Further words of its command line, such as ["--data.init_args.root=FOLDER"].
        rounds: Turns of `fit` and of the bare loop.
        steps: Steps in a turn.
        repeats: How often samplers and guidance are timed.
        samples: Images that they draw at a time.
        sampling_steps: Steps of the samplers.
        channels: Width of the network of samplers and guidance; 56 makes 5M parameters.
        out: Folder for profile_step.json.

    Returns:
        The report that is written as JSON.

    Raises:
        ValueError: If a number is below 1.
    """
    check_count(rounds=rounds, steps=steps, repeats=repeats)
    check_count(samples=samples, sampling_steps=sampling_steps, channels=channels)
    recorder = Recorder()
    turns = Turns(rounds, steps, recorder)
    fit(config, options or [], turns)
    mine, bare = ([_spent(one, turns.device) for one in some] for some in (turns.fit, turns.bare))
    ratios = torch.tensor(mine) / torch.tensor(bare) - 1
    low, median, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    total = sum(one.seconds for one in turns.fit)
    report = {
        "config": config,
        "hardware": hardware(torch.device(turns.device), 1),
        "milliseconds": 1e3 * total / (rounds * steps),
        "over_bare": {"median": median, "quartiles": [low, high]},
        "shares": shares(recorder.seconds, total),
        **beside_network(turns.device, repeats, samples, sampling_steps, channels),
    }
    keep_json(Path(out) / "profile_step.json", report)
    print(text(report))
    return report


def fit(config: list[str], options: list[str], turns: Turns) -> None:
    """Runs `diffusion-lit fit` in turns with the bare loop, in a folder that is thrown away."""
    Rounds.study = turns
    with tempfile.TemporaryDirectory() as folder, recording_logging(turns.recorder):
        arguments = [
            *["fit", *[f"--config={path}" for path in config], *options],
            *[f"--trainer.logger.init_args.save_dir={folder}", "--trainer.max_steps=10000000"],
            *["--trainer.val_check_interval=10000000", "--trainer.enable_model_summary=false"],
            f"--trainer.callbacks+={Rounds.__module__}.Rounds",
        ]

        class Recorded(LightningFit):
            """`diffusion-lit fit` under the recorder."""

            def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Any:
                return super()._instantiate_trainer({**config, "profiler": turns.recorder}, callbacks)

        try:
            run(arguments, Recorded)
        except Finished:
            return


@contextmanager
def recording_logging(recorder: Recorder) -> Iterator[None]:
    """Records Lightning's logger connector after a step as an action of the profiler."""
    before = _LoggerConnector.update_train_step_metrics

    def update(self: _LoggerConnector) -> None:
        recorder.start("logging")
        before(self)
        recorder.stop("logging")

    _LoggerConnector.update_train_step_metrics = update  # type: ignore[method-assign]
    try:
        yield
    finally:
        _LoggerConnector.update_train_step_metrics = before  # type: ignore[method-assign]


def shares(seconds: dict[str, float], total: float) -> dict[str, float]:
    """The parts of a step as shares of its time.

    Args:
        seconds: Of each action of Lightning's profiler, what lies inside it taken off.
        total: Seconds of all steps.

    Returns:
        Share of each part; what no action claims is Lightning's own.
    """
    parts = {
        "data": lambda name: "dataloader_next" in name or "batch_to_device" in name or "dataloader_iter" in name,
        "forward": lambda name: name.endswith(".training_step"),
        "backward": lambda name: name.endswith(".backward"),
        "optimizer": lambda name: name.endswith((".optimizer_step", ".optimizer_zero_grad")),
        "EMA": lambda name: name.startswith("[Callback]EMA."),
        "guard": lambda name: name.startswith("[Callback]NonFiniteGuard."),
        "progress bar": lambda name: "ProgressBar." in name,
        "other callbacks": lambda name: name.startswith("[Callback]") and "Rounds." not in name,
        "logging": lambda name: name == "logging",
    }
    found: dict[str, float] = dict.fromkeys(parts, 0.0)
    for name, spent in seconds.items():
        part = next((part for part, belongs in parts.items() if belongs(name)), None)
        if part is not None:
            found[part] += spent / total
    return {**found, "Lightning itself": 1 - sum(found.values())}


class Nothing(nn.Module):
    """A network that costs nothing."""

    num_classes = 0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, noise: Tensor, label: Tensor | None = None) -> Tensor:
        """Its input."""
        return x


def beside_network(device: str, repeats: int, samples: int, steps: int, channels: int) -> dict[str, Any]:
    """The overhead of samplers and guidance over the network's forwards.

    Args:
        device: `cpu` or `cuda`.
        repeats: How often each is timed.
        samples: Images at a time.
        steps: Steps of the samplers.
        channels: Width of the network.

    Returns:
        `samplers`, the share of each sampler's time that is not the network's; `guidance`, a guided denoiser's time as
        a multiple of one forward of the same batch; `parameters` of the network.
    """
    torch.manual_seed(0)
    net = UNet(num_classes=10, model_channels=channels, noise_embedding="fourier").to(device).eval()
    found: dict[str, float] = {}
    for name, scaling in SAMPLERS.items():
        sampling = Sampling(name, steps, grid="trailing" if name == "ddpm" else "karras")
        seconds = []
        for network, count in ((net, repeats), (Nothing(), 3 * repeats)):
            denoiser = Denoiser(network, scaling).to(device).eval()
            seconds.append(_timed(partial(sampling.generate, denoiser, (3, 32, 32), range(samples)), device, count))
        found[name] = seconds[1] / seconds[0]
    denoiser = Denoiser(net, EDMPreconditioning()).to(device).eval()
    guided = ClassifierFreeGuidance(denoiser, 2.0)
    x, sigma = torch.randn(samples, 3, 32, 32, device=device), torch.tensor(1.0)
    labels = torch.arange(samples, device=device) % 10
    ratios = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            two, one = (_timed(partial(call, x, sigma, labels), device, 1) for call in (guided, denoiser))
            ratios.append(two / one)
    return {"samplers": found, "guidance": statistics.median(ratios[1:]), "parameters": count_parameters(net)}


def _timed(work: Callable[[], Any], device: str, repeats: int) -> float:
    """Median of `_spent`."""
    taken = []
    if repeats > 1:
        work()
    for _ in range(repeats):
        watch = Stopwatch(device)
        work()
        taken.append(_spent(watch.read(), device))
    return statistics.median(taken)


def _spent(one: Slice, device: str) -> float:
    """Seconds: of the clock on a GPU, of the CPU elsewhere, which other programs do not affect."""
    return one.seconds if device == "cuda" else one.cpu


def text(report: dict[str, Any]) -> str:
    """The report as text."""

    def target(value: float, limit: float) -> str:
        return "met" if value <= limit else "missed"

    over, data = report["over_bare"], report["shares"]["data"]
    machine = report["hardware"]
    lines = [
        f"A step takes {report['milliseconds']:.1f} ms on {machine['processor']}, {machine['threads']} threads.",
        "",
        markdown([{"part": name, "share of the step": f"{share:.2%}"} for name, share in report["shares"].items()]),
        f"Lightning, callbacks and logging over a bare loop of the same step: {over['median']:+.1%} "
        f"(quartiles {over['quartiles'][0]:+.1%} and {over['quartiles'][1]:+.1%}); at most "
        f"{TARGETS['Lightning']:.0%} is the target, {target(over['median'], TARGETS['Lightning'])}.",
        f"Data: {data:.2%} of the step; below {TARGETS['data']:.0%} is the target, {target(data, TARGETS['data'])}.",
        f"Beside the forwards of a network of {report['parameters'] / 1e6:.1f}M parameters on 3x32x32:",
    ]
    for name, share in report["samplers"].items():
        lines.append(f"  {name}: {share:.2%}; at most {TARGETS['sampler']:.1%}, {target(share, TARGETS['sampler'])}")
    lines.append(
        f"Guidance: {report['guidance']:.3f} forwards; at most {TARGETS['guidance']}, "
        f"{target(report['guidance'], TARGETS['guidance'])}."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    keep_freed_memory()
    command(profile_step)
