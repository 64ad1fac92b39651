"""Is it better to diffuse pixels or latents, for the same training time?

A pixel EDM trains for so many seconds. A VAE trains for a share of the same time, its latents are encoded, and a latent
EDM of the same network trains for what is left. Both draw samples of the same seeds at several numbers of denoiser
calls (NFE); the Fréchet distance to the training images stands against NFE and against the time of a sample. The
distance of reconstructed held-out images is what a perfect latent model would get, that of real ones what any would.

    python -m experiments.pixel_vs_latent --seconds 120
    python -m experiments.pixel_vs_latent --seconds 600 --data datamodules.FashionMNIST --data.root FOLDER
"""

import csv
import time
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything

import datamodules
from diffusion_lit.callbacks import EMA
from diffusion_lit.callbacks.reconstructions import real_images
from diffusion_lit.diffusion.images import to_uint8
from diffusion_lit.evaluation.choose import make_extractor
from diffusion_lit.evaluation.generation import GenerationJob, class_frequencies, draw_labels, draw_samples
from diffusion_lit.modules import EDM, VAE, LatentDiffusion
from diffusion_lit.nets import Autoencoder, UNet
from diffusion_lit.report.facts import count_parameters
from diffusion_lit.report.images import titled_grid
from diffusion_lit.storage.hashing import weights_hash
from diffusion_lit.words import counted
from experiments.harness.command import command
from experiments.harness.evaluator import Evaluator
from experiments.harness.show import keep_figure, markdown

DECAY = 0.4  # share of the time over which the learning rate falls to 0


class Point(NamedTuple):
    """One measurement."""

    model: str
    nfe: float
    distance: float
    milliseconds: float


class Trained(NamedTuple):
    """A trained model and what its training took."""

    name: str
    module: Any
    steps: int
    milliseconds_per_step: float


class TimeBudget(Callback):
    """Stops training after a time, over whose last part the learning rate falls to 0.

    Args:
        seconds: Time for training steps, the preparations of the module included.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.begin = time.perf_counter()
        self.first_step = self.begin
        self.rates: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the learning rate."""
        self.rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        self.first_step = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Sets the learning rate by the time that is left."""
        left = max(0.0, 1 - (time.perf_counter() - self.begin) / self.seconds)
        for group, rate in zip(trainer.optimizers[0].param_groups, self.rates, strict=True):
            group["lr"] = rate * min(1.0, left / DECAY)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Stops when the time is over."""
        trainer.should_stop = time.perf_counter() - self.begin > self.seconds


def pixel_vs_latent(
    seconds: float = 120,
    data: LightningDataModule | None = None,
    vae_share: float = 0.4,
    num_steps: list[int] = [3, 5, 9, 18],  # noqa: B006 (never changed)
    num_samples: int = 1000,
    model_channels: int = 48,
    latent_channels: int = 4,
    learning_rate: float = 0.001,
    extractor: str = "auto",
    extractor_weights: str | None = None,
    accelerator: str = "auto",
    seed: int = 0,
    out: str = "runs/studies/pixel_vs_latent",
) -> list[Point]:
    """Trains a pixel and a latent EDM for the same time and compares them.

    Args:
        seconds: Training time of each side; the VAE's is part of the latent side's.
        data: Data set, as a class of datamodules and its arguments; scikit-learn's digits by default.
        vae_share: Share in (0, 1) of the latent side's time that the VAE gets.
        num_steps: Numbers of steps of Heun's method, of 2 N - 1 denoiser calls.
        num_samples: Samples of each point.
        model_channels: Width of the network, which is the same on both sides.
        latent_channels: Channels of a latent.
        learning_rate: Learning rate of all three trainings.
        extractor: What images are compared by: classifier, inception, pixels, ...; auto as in `diffusion-lit evaluate`.
        extractor_weights: Local file of the extractor's weights.
        accelerator: auto, cpu, gpu, ...
        seed: Seed of the trainings and of the first sample.
        out: Folder for the figure, the tables and the sample grids.

    Returns:
        The measurements.
    """
    source: Any = data or datamodules.Digits(64)
    source.prepare_data()
    source.setup()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    seed_everything(seed)
    channels, size, _ = source.image_shape
    optimizer: Any = lambda parameters: torch.optim.AdamW(parameters, lr=learning_rate)  # noqa: E731

    def network(shape: tuple[int, int, int]) -> UNet:
        attended = tuple(side for side in (shape[1], shape[1] // 2) if side in (8, 4))
        return UNet(
            shape[0], shape[1], source.num_classes, model_channels, (1, 2), 1, attended, noise_embedding="fourier"
        )

    pixel = train("pixel EDM", EDM(network(source.image_shape), optimizer=optimizer), source, seconds, accelerator)

    begin = time.perf_counter()
    net = Autoencoder(channels, size, latent_channels, 32, (1, 2), patch_size=2 if size >= 32 else 1)
    vae = train("VAE", VAE(net, optimizer=optimizer), source, vae_share * seconds, accelerator, folder / "vae.ckpt")
    left = seconds - (time.perf_counter() - begin)
    side = size // net.factor
    module = LatentDiffusion(
        network((latent_channels, side, side)),
        str(folder / "vae.ckpt"),
        cache_dir=str(folder / "latents"),
        optimizer=optimizer,
    )
    latent = train("latent EDM", module, source, left, accelerator)

    measure = make_extractor(extractor, extractor_weights, source.image_shape)
    measure.load(source)
    measure.to(pixel.module.device)
    evaluator = Evaluator(source, measure, num_samples)
    points = [
        point for one in (pixel, latent) for point in sample(one, evaluator, num_steps, num_samples, seed, folder)
    ]
    real = real_images(latent.module.trainer, num_samples)
    made = [to_uint8(latent.module.reconstruct(part.to(latent.module.device))) for part in torch.split(real, 100)]
    limits = [("reconstructed", evaluator.distance(measure.extract(torch.cat(made))), len(real))]
    limits += [] if evaluator.floor is None else [("real against real", *evaluator.floor)]
    write(points, [pixel, vae, latent], limits, measure.metric, folder)
    return points


def train(
    name: str, module: Any, data: Any, seconds: float, accelerator: str, ckpt_path: Path | None = None
) -> Trained:
    """Trains a model for a time; the module is left with its average weights.

    Raises:
        ValueError: If there is no time left to train in.
    """
    if seconds <= 0:
        raise ValueError(f"There is no time left for the {name}; raise seconds or lower vae_share.")
    budget, average = TimeBudget(seconds), EMA(half_life=20_000)
    trainer = Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=-1,
        callbacks=[budget, average],
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data)
    steps = trainer.global_step
    spent = 1000 * (time.perf_counter() - budget.first_step) / max(1, steps)
    if ckpt_path is not None:
        trainer.save_checkpoint(ckpt_path)
    average.on_validation_start(trainer, module)
    print(f"{name}: {steps:,} steps in {seconds:.0f} s, {spent:.1f} ms each")
    return Trained(name, module.eval(), steps, spent)


def sample(
    trained: Trained, evaluator: Evaluator, num_steps: list[int], count: int, seed: int, folder: Path
) -> list[Point]:
    """Draws samples at several numbers of steps and measures them.

    Args:
        trained: The model.
        evaluator: Measures.
        num_steps: Numbers of steps.
        count: Samples of each point.
        seed: Seed of the first sample.
        folder: Where the sample grid goes.

    Returns:
        One point per number of steps.
    """
    module, points = trained.module, []
    labels = draw_labels(range(seed, seed + count), class_frequencies(evaluator.data, module.num_classes))
    weights = weights_hash(module.state_dict())
    for steps in num_steps:
        setting = module.sampling.replace(num_steps=steps)
        record = {"weights": weights, "extractor": evaluator.extractor.identity(), "sampling": setting.record()}
        job = GenerationJob(setting, count, seed, labels, record, folder / "parts", batch_size=100)
        drawn = draw_samples(job, module, evaluator.extractor)
        distance = evaluator.distance(drawn.features)
        points.append(Point(trained.name, drawn.forwards, distance, 1000 * drawn.seconds / count))
        print(f"{trained.name}: NFE {drawn.forwards:.0f}, {evaluator.metric} {distance:.3g}")
    classes = min(module.num_classes, 10)
    shown = torch.arange(classes).repeat_interleave(8) if classes else None
    images = module.generate(range(seed, seed + 8 * (classes or 8)), shown)
    names = [str(name) for name in module.class_names[:classes]]
    grid = titled_grid([list(row) for row in images.cpu().split(8)], names)
    grid.save(folder / f"samples_{trained.name.split()[0]}.png")
    return points


def write(
    points: list[Point], trained: list[Trained], limits: list[tuple[str, float, int]], metric: str, folder: Path
) -> None:
    """Writes the figure and the tables as Markdown and CSV, and prints the tables.

    Args:
        points: The measurements.
        trained: The models.
        limits: What the best of models could get: name, distance and number of images.
        metric: Name of the distance.
        folder: Where the files go.
    """
    models = [
        {
            "trained": one.name,
            "parameters": f"{count_parameters(one.module) / 1e6:.2f} M",
            "steps": one.steps,
            "ms per step": one.milliseconds_per_step,
        }
        for one in trained
    ]
    rows = [{"model": p.model, "NFE": p.nfe, metric: p.distance, "ms per sample": p.milliseconds} for p in points]
    rows += [{"model": f"{name}, {counted(count, 'image')}", metric: distance} for name, distance, count in limits]
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([Point._fields, *points])
    (folder / "table.md").write_text(f"{markdown(models)}\n{markdown(rows)}")
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    for axes, field, label in (
        (panels[0], "nfe", "denoiser calls per sample (NFE)"),
        (panels[1], "milliseconds", "milliseconds per sample"),
    ):
        for name in dict.fromkeys(point.model for point in points):
            own = [point for point in points if point.model == name]
            axes.plot([getattr(p, field) for p in own], [p.distance for p in own], marker="o", label=name)
        for style, (name, distance, _) in zip((":", "--"), limits, strict=False):
            axes.axhline(distance, color="grey", linestyle=style, label=name)
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.grid(True, which="both", alpha=0.3)
    panels[0].set_ylabel(metric)
    panels[0].legend()
    keep_figure(folder / "figure.png", figure)
    print(f"{markdown(models)}\n{markdown(rows)}")
    print(f"{folder}/figure.png, table.md, table.csv, samples_pixel.png and samples_latent.png")


if __name__ == "__main__":
    command(pixel_vs_latent)
