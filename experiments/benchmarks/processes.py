"""Contenders in processes of their own, which train, draw and measure memory when they are asked to."""

import multiprocessing
import os
import resource
import sys
import tempfile
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from datamodules import ImageDataModule
from datamodules.loaders import Split
from experiments.benchmarks.contenders import OURS, BenchmarkJob, our_net
from experiments.benchmarks.peers import Draw, autocast, peer
from experiments.benchmarks.stopwatch import Stopwatch

IMAGES = 4096


def memory(device: str) -> int:
    """Bytes at this process's peak so far: of its device memory, or on a CPU of all its memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
    """A contender's process; it runs until it is killed."""
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
