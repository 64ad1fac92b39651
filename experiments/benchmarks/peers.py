"""Other libraries' networks under their own training steps and samplers."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.benchmarks import contenders
from experiments.benchmarks.contenders import BenchmarkJob


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
    """A peer's network with its training step and its sampler."""
    from accelerate import Accelerator

    accelerator = Accelerator(
        mixed_precision="bf16" if job.precision == "bf16-mixed" else "no", cpu=job.device == "cpu"
    )
    net = contenders.build(job.name, job.width, job.channels, job.size).to(accelerator.device)
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
