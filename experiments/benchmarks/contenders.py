"""This project and its peers at the same work, for `throughput` and `time_to_quality`.

A contender is a library's own U-Net under the library's own training step and sampler:

| name                        | network     | training step                          | sampler                  |
| --------------------------- | ----------- | -------------------------------------- | ------------------------ |
| diffusion-lit               | UNet        | `diffusion-lit fit` with all its callbacks | Euler                    |
| diffusers                   | UNet2DModel | train_unconditional.py's loop          | DDIMScheduler            |
| denoising-diffusion-pytorch | Unet        | Trainer.train's loop with its average  | GaussianDiffusion's DDIM |
| smalldiffusion              | Unet        | training_loop                          | samples                  |

The peers are handed their batches ready made, which is in their favour: `diffusion-lit fit` cuts, normalises and draws
its own. A library that is not installed takes no part.
"""

import math
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from datamodules import ImageDataModule
from datamodules.loaders import Split

OURS = "diffusion-lit"
MODULES = {
    OURS: "diffusion_lit",
    "diffusers": "diffusers",
    "denoising-diffusion-pytorch": "denoising_diffusion_pytorch",
    "smalldiffusion": "smalldiffusion",
}
MULTIPLES = {OURS: 4, "diffusers": 32, "denoising-diffusion-pytorch": 8, "smalldiffusion": 32}
IMAGES = 4096


def installed() -> list[str]:
    """The contenders that can take part here, this project first."""
    return [name for name, module in MODULES.items() if find_spec(module) is not None]


def build(name: str, width: int, channels: int, size: int) -> nn.Module:
    """A library's U-Net: three levels of `width` times (1, 2, 2), two blocks each, attention on the smallest maps.

    denoising-diffusion-pytorch has its own four levels and its own places for attention.

    Args:
        name: The contender.
        width: Channels of the first level.
        channels: Channels of an image.
        size: Its side.
    """
    if name == OURS:
        from diffusion_lit.nets import UNet

        return UNet(channels, size, **our_net(width, size))
    if name == "diffusers":
        from diffusers import UNet2DModel

        made: nn.Module = UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=2,
            block_out_channels=(width, 2 * width, 2 * width),
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        )
        return made
    if name == "smalldiffusion":
        import smalldiffusion

        return smalldiffusion.Scaled(smalldiffusion.Unet)(
            size, channels, channels, ch=width, ch_mult=(1, 2, 2), attn_resolutions=(size // 4,)
        )
    from denoising_diffusion_pytorch import Unet

    net: nn.Module = Unet(dim=width, channels=channels)
    return net


def our_net(width: int, size: int) -> dict[str, Any]:
    """The options of this project's U-Net in the comparison."""
    return {
        "model_channels": width,
        "channel_mult": (1, 2, 2),
        "num_blocks": 2,
        "attention_resolutions": (size // 4,),
        "noise_embedding": "fourier",
    }


def call(name: str, net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """One forward of a contender's network on noisy images (B, C, H, W) at t (B,), in (0, 1]."""
    if name == OURS:
        made: Tensor = net(x, t)
    elif name == "diffusers":
        made = net(x, (999 * t).long()).sample
    elif name == "smalldiffusion":
        made = net(x, t[:, None, None, None])
    else:
        made = net(x, (999 * t).long())
    return made


@dataclass
class Cost:
    """What a network costs: its width, parameters, and floating-point operations per image."""

    width: int
    parameters: int
    forward: int
    training: int


def cost(name: str, width: int, channels: int, size: int) -> Cost:
    """Counts a contender's parameters, and with torch's FlopCounterMode the operations of a forward and of a step."""
    with torch.device("meta"):  # the counts depend on shapes only
        net = build(name, width, channels, size).train()
        x, t = torch.zeros(1, channels, size, size), torch.full((1,), 0.5)
    with sdpa_kernel(SDPBackend.MATH), torch.device("meta"):  # the counter knows no fused attention of the CPU
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            call(name, net, x, t)
        with FlopCounterMode(display=False) as training:
            call(name, net, x, t).sum().backward()
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return Cost(width, parameters, forward.get_total_flops(), training.get_total_flops())


def nearest(name: str, gflops: float, channels: int, size: int) -> Cost:
    """The width whose training step is closest to a number of operations.

    Args:
        name: The contender.
        gflops: Wanted, in 10^9 per image, forward and backward.
        channels: Channels of an image.
        size: Its side.
    """
    step = MULTIPLES[name]
    first = cost(name, max(step, 32), channels, size)
    guess = first.width * math.sqrt(gflops * 1e9 / first.training)
    widths = {max(step, step * (round(guess / step) + shift)) for shift in (-1, 0, 1)}
    costs = [cost(name, width, channels, size) for width in sorted(widths)]
    return min(costs, key=lambda found: abs(math.log(found.training / (gflops * 1e9))))


@dataclass
class BenchmarkJob:
    """The work of a contender's process.

    Args:
        name: The contender.
        precision: `32-true` or `bf16-mixed`.
        width: Channels of the first level.
        channels: Channels of an image.
        size: Its side.
        batch_size: Images per step.
        nfe: Steps of the sampler.
        device: `cpu` or `cuda`.
        threads: Threads of torch on a CPU.
        documented: Whether a peer trains with the settings of its own examples and not with its code's defaults.
    """

    name: str
    precision: str
    width: int
    channels: int
    size: int
    batch_size: int
    nfe: int
    device: str
    threads: int
    documented: bool = False

    @property
    def title(self) -> str:
        """Name and precision."""
        return f"{self.name}, {'bf16' if self.precision == 'bf16-mixed' else 'float32'}"


@dataclass
class Slice:
    """Cost of some work: seconds, CPU seconds, page faults, and the number of images."""

    seconds: float
    cpu: float
    faults: int
    images: int


class Stopwatch:
    """Measures the time of this process from the stopwatch's construction."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._wait()
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self._faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    def read(self, images: int) -> Slice:
        """What has passed."""
        self._wait()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - self._faults
        return Slice(time.perf_counter() - self._wall, time.process_time() - self._cpu, faults, images)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def memory(device: str) -> int:
    """Bytes at this process's peak so far: of its device memory, or on a CPU of all its memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def autocast(job: BenchmarkJob) -> AbstractContextManager[Any]:
    """bf16 autocast where the job is in bf16."""
    return torch.autocast(job.device, torch.bfloat16) if job.precision == "bf16-mixed" else nullcontext()


Step = Callable[[Tensor], None]
Draw = Callable[[int], Tensor]


@dataclass
class Peer:
    """A peer with its training step and sampler.

    Args:
        net: Its network.
        step: Its training step on a batch in [-1, 1].
        draw: Its sampler, from a number of images to images in [-1, 1].
        parts: What holds its state, by name: whatever has `state_dict` and `load_state_dict`.
    """

    net: nn.Module
    step: Step
    draw: Draw
    parts: dict[str, Any]

    def state(self) -> dict[str, Any]:
        """All that training changes."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def restore(self, state: dict[str, Any], x: Tensor) -> None:
        """Goes back to a state.

        Args:
            state: From `state`.
            x: The batch of the step that it was taken after, for peers that pause within a step.
        """
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def peer(job: BenchmarkJob) -> Peer:
    """A peer's network with its training step and its sampler.

    Args:
        job: What to build.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(
        mixed_precision="bf16" if job.precision == "bf16-mixed" else "no", cpu=job.device == "cpu"
    )
    net = build(job.name, job.width, job.channels, job.size).to(accelerator.device)
    makers = {"diffusers": _diffusers, "smalldiffusion": _smalldiffusion}
    return makers.get(job.name, _denoising_diffusion_pytorch)(job, net, accelerator)


def _diffusers(job: BenchmarkJob, net: Any, accelerator: Any) -> Peer:
    """The loop of diffusers' examples/unconditional_image_generation/train_unconditional.py, at its defaults."""
    from diffusers import DDIMScheduler, DDPMScheduler
    from diffusers.optimization import get_cosine_schedule_with_warmup

    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    schedule = get_cosine_schedule_with_warmup(optimizer, 500, 100_000)
    model, optimizer, schedule = accelerator.prepare(net, optimizer, schedule)
    noising = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")

    def step(x: Tensor) -> None:
        model.train()
        noise = torch.randn_like(x)
        t = torch.randint(0, 1000, (len(x),), device=x.device)
        loss = nn.functional.mse_loss(model(noising.add_noise(x, noise, t), t).sample, noise)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss.detach().item()  # what its progress bar shows

    @torch.no_grad()
    def draw(count: int) -> Tensor:
        model.eval()
        sampler = DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        sampler.set_timesteps(job.nfe)
        x = torch.randn(count, job.channels, job.size, job.size, device=accelerator.device)
        for t in sampler.timesteps:
            x = sampler.step(model(x, t).sample, t, x).prev_sample
        return x

    return Peer(net, step, draw, {"net": net, "optimizer": optimizer, "schedule": schedule})


def _denoising_diffusion_pytorch(job: BenchmarkJob, net: Any, accelerator: Any) -> Peer:
    """The loop of denoising_diffusion_pytorch.Trainer.train, at its defaults or its README's learning rate."""
    from denoising_diffusion_pytorch import GaussianDiffusion
    from ema_pytorch import EMA

    diffusion = GaussianDiffusion(net, image_size=job.size, timesteps=1000, sampling_timesteps=job.nfe)
    diffusion = diffusion.to(accelerator.device)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=8e-5 if job.documented else 1e-4, betas=(0.9, 0.99))
    average = EMA(diffusion, beta=0.995, update_every=10).to(accelerator.device)
    model, optimizer = accelerator.prepare(diffusion, optimizer)

    def step(x: Tensor) -> None:
        model.train()
        with accelerator.autocast():
            loss = model((x + 1) / 2)
        loss.item()  # what its progress bar shows
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()

    @torch.inference_mode()
    def draw(count: int) -> Tensor:
        average.ema_model.eval()
        with accelerator.autocast():
            shape = (count, job.channels, job.size, job.size)
            made: Tensor = average.ema_model.ddim_sample(shape) * 2 - 1
            return made

    return Peer(net, step, draw, {"net": diffusion, "optimizer": optimizer, "average": average})


def _smalldiffusion(job: BenchmarkJob, net: Any, accelerator: Any) -> Peer:
    """The training_loop and samples of smalldiffusion, with the schedule of its FashionMNIST and CIFAR-10 examples."""
    import smalldiffusion

    schedule = smalldiffusion.ScheduleLogLinear(sigma_min=0.01, sigma_max=20, N=800)
    batches: list[Tensor] = []

    class Fed:
        """A loader of the batches passed to `step`."""

        def __iter__(self) -> Any:
            while True:
                yield batches[-1]

    loop = smalldiffusion.training_loop(Fed(), net, schedule, accelerator=accelerator, lr=7e-4)
    weights = [parameter.data for parameter in net.parameters()]
    average = [weight.clone() for weight in weights] if job.documented else []
    turns = 0

    def step(x: Tensor) -> None:
        """One turn of the loop, which pauses between the forward and the backward of a step."""
        nonlocal turns
        batches[:] = [x]
        next(loop)
        if average:  # as torch_ema does in the example, at its decay of 0.999
            torch._foreach_lerp_(average, weights, 1 - min(0.999, (1 + turns) / (10 + turns)))
        turns += 1

    def swap() -> None:
        for weight, mean in zip(weights if average else [], average, strict=True):
            kept = weight.clone()
            weight.copy_(mean)
            mean.copy_(kept)

    @torch.no_grad()
    def draw(number: int) -> Tensor:
        swap()
        with autocast(job):
            *_, x = smalldiffusion.samples(
                net, schedule.sample_sigmas(job.nfe), gam=1.6, batchsize=number, accelerator=accelerator
            )
        swap()
        made: Tensor = x
        return made

    class Paused(Peer):
        """Its state is that before the backward pass of the last batch; the forward pass is repeated."""

        def state(self) -> dict[str, Any]:
            optimizer = accelerator._optimizers[0].state_dict()
            return {"net": net.state_dict(), "optimizer": optimizer, "average": average, "turns": turns}

        def restore(self, state: dict[str, Any], x: Tensor) -> None:
            nonlocal turns
            net.load_state_dict(state["net"])
            batches[:] = [x]
            next(loop)
            accelerator._optimizers[0].load_state_dict(state["optimizer"])
            for mean, value in zip(average, state["average"], strict=True):
                mean.copy_(value)
            turns = state["turns"]

    return Paused(net, step, draw, {})


class RandomImages(ImageDataModule):
    """Random images in memory, to measure speed.

    Args:
        batch_size: Images per step.
        channels: Channels of an image.
        size: Its side.
    """

    def __init__(self, batch_size: int = 64, channels: int = 3, size: int = 32) -> None:
        super().__init__(batch_size, use_labels=False)
        self.shape = (channels, size, size)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of the images."""
        return self.shape

    @property
    def class_names(self) -> list[str]:
        """None."""
        return []

    def read(self, split: str) -> Split:
        """The same images for every split."""
        generator = torch.Generator().manual_seed(0)
        count = IMAGES if split == "train" else self.batch_size
        return Split(torch.randint(0, 256, (count, *self.shape), dtype=torch.uint8, generator=generator), None)


class TrainOnRequest(Callback):
    """Lets `diffusion-lit fit` train as many steps at a time as the other end of a pipe asks for.

    The time of a slice runs from the start of its first step to the start of the step after its last: data, callbacks,
    logging and the trainer's own work are in it.
    """

    pipe: Any = None
    job: BenchmarkJob

    def __init__(self) -> None:
        self._left = 0
        self._steps = 0
        self._watch: Stopwatch | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Reports the finished slice and waits for the next."""
        if self._left:
            self._left -= 1
            return
        if self._watch is not None:
            self.pipe.send(self._watch.read(self._steps * self.job.batch_size))
        draw = self._draw(pl_module)
        self._steps = serve(self.pipe, self.job, draw)
        self._left = self._steps - 1
        self._watch = Stopwatch(self.job.device)

    def _draw(self, module: Any) -> Draw:
        from diffusion_lit.diffusion import Sampling

        def draw(count: int) -> Tensor:
            with autocast(self.job):
                made: Tensor = module.generate(range(count), sampling=Sampling("euler", self.job.nfe))
            return made

        return draw


def serve(pipe: Any, job: BenchmarkJob, draw: Draw) -> int:
    """Answers the other end's questions until it asks for training.

    Args:
        pipe: To the other end.
        job: What this process does.
        draw: Its sampler.

    Returns:
        The number of steps to train.
    """
    while True:
        asked, count = pipe.recv()
        if asked == "train":
            return int(count)
        if asked == "sample":
            watch = Stopwatch(job.device)
            draw(count)
            pipe.send(watch.read(count))
        elif asked == "memory":
            pipe.send(memory(job.device))


def work(pipe: Any, job: BenchmarkJob, folder: str) -> None:
    """A contender's process; it runs until it is killed.

    Args:
        pipe: To the process that measures.
        job: What to do.
        folder: Where it may write.
    """
    os.environ["TQDM_DISABLE"] = "1"
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
    torch.manual_seed(0)
    torch.set_num_threads(job.threads)
    if job.name == OURS:
        _fit(pipe, job, folder)
    made = peer(job)
    x = torch.rand(job.batch_size, job.channels, job.size, job.size).to(job.device) * 2 - 1
    while True:
        steps = serve(pipe, job, made.draw)
        watch = Stopwatch(job.device)
        for _ in range(steps):
            made.step(x)
        pipe.send(watch.read(steps * job.batch_size))


def _fit(pipe: Any, job: BenchmarkJob, folder: str) -> None:
    """`diffusion-lit fit`, paced."""
    from diffusion_lit.commands.main import main

    TrainOnRequest.pipe, TrainOnRequest.job = pipe, job
    net = {name: list(v) if isinstance(v, tuple) else v for name, v in our_net(job.width, job.size).items()}
    main(
        [
            *["fit", "--name=throughput", f"--trainer.logger.init_args.save_dir={folder}"],
            *["--trainer.max_steps=1000000", "--trainer.val_check_interval=1000000"],
            *["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"],
            *[f"--trainer.callbacks={__name__}.TrainOnRequest", f"--trainer.precision={job.precision}"],
            f"--trainer.accelerator={'gpu' if job.device == 'cuda' else 'cpu'}",
            f"--data={__name__}.RandomImages",
            *[f"--data.batch_size={job.batch_size}", f"--data.channels={job.channels}", f"--data.size={job.size}"],
            *["--model=diffusion_lit.modules.EDM", "--model.net=diffusion_lit.nets.UNet"],
            *[f"--model.net.{name}={value}" for name, value in net.items()],
        ]
    )


class Contender:
    """A contender in a process of its own, whose memory and allocator are its own too.

    Args:
        job: What it does.
    """

    def __init__(self, job: BenchmarkJob) -> None:
        self.job = job
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=work, args=(other, job, self._folder.name), daemon=True)
        self._process.start()
        other.close()

    def ask(self, what: str, count: int = 0) -> Any:
        """Asks for `train` (steps), `sample` (images) or `memory`, and waits for the answer.

        Raises:
            RuntimeError: If the process died.
        """
        try:
            self._pipe.send((what, count))
            return self._pipe.recv()
        except (EOFError, BrokenPipeError) as error:
            raise RuntimeError(f"{self.job.title} ended before it answered; its message stands above.") from error

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.join()
        self._folder.cleanup()
