"""From a denoiser of one noise level to a DDPM: what knowing the time, and the class, is good for.

1. A U-Net without any notion of time learns to take away noise of one strength in one step, and is then tried on noise
   of every other strength. Strengths are told for pixels in [0, 1], where 0.5 is sigma = 1 of this project's [-1, 1].
2. A DDPM, which is told the time, does that at every strength, and draws images.
3. A DDPM that is told the class as well draws them by class, with guidance.

The small form, on 8x8 digits, has fewer channels, smaller batches and more epochs of its few images. The recipe in
full (hidden 128, batch 256, Adam 1e-4, 5 epochs; then hidden 64, batch 128, Adam 1e-3 falling to a tenth, 20 epochs) is
what --config takes:

    python -m experiments.single_step_denoiser
    python -m experiments.single_step_denoiser --config configs/studies/single_step_denoiser.yaml \
        --data.init_args.root FOLDER
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from diffusion_lit.modules.load import load_module, prepared_data
from experiments.harness.evaluator import first_images
from experiments.harness.runs import Trained
from experiments.harness.study import Study, image_rows, main

NOISE = 0.5  # trained, for pixels in [0, 1]
UNIT = 2.0  # sigma, for pixels in [-1, 1], of noise of strength 1 for pixels in [0, 1]
STRENGTHS = torch.linspace(0, 1, 11)
DDPM = "configs/studies/time_conditioned_ddpm.yaml"


def single_step_denoiser(
    study: Study,
    epochs: list[int] | None = None,
    ddpm_epochs: list[int] | None = None,
    cfg_scale: float = 5.0,
    held_out: int = 256,
) -> None:
    """What does a denoiser gain by being told the time, and the class?

    Trains a denoiser of one noise level, tries it on others, and goes on to a DDPM that is told the noise level and to
    one that is told the class.

    Args:
        study: Where it works.
        epochs: After how many epochs the denoiser is looked at, the last being its length; a multiple of the first.
        ddpm_epochs: The same for the DDPMs.
        cfg_scale: Guidance of the class-conditional one.
        held_out: Images that the denoisers are measured on.
    """
    small = study.setup.config is None
    first, last = epochs or ([4, 20] if small else [1, 5])
    ddpm_first, ddpm_last = ddpm_epochs or ([15, 60] if small else [5, 20])
    single = study.fit({"single step": keep(first, last)})["single step"]
    data = prepared_data(single.ckpt_path)
    steps = ddpm_last * (len(data.reference_images("train")) // int(study.value("data.init_args.batch_size")))
    decay = {
        "class_path": "torch.optim.lr_scheduler.ExponentialLR",
        "init_args": {"gamma": 0.1 ** (1 / steps)},
    }
    options = {**keep(ddpm_first, ddpm_last), "model.init_args.lr_scheduler": decay}
    told = study.fit(
        {
            "time": {**options, "data.init_args.use_labels": False},
            "time and class": {**options, "data.init_args.use_labels": True},
        },
        DDPM,
    )

    clean = first_images(data, "val", held_out)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(study.setup.seed))
    denoisers = {
        f"one noise level, {count} epochs": Denoise(at_epoch(single, count), constant=True) for count in (first, last)
    }
    denoisers[f"told the noise, {ddpm_last} epochs"] = Denoise(at_epoch(told["time"], ddpm_last), constant=False)
    errors = denoise(study, denoisers, clean, noise)
    rows = samples(study, told, (ddpm_first, ddpm_last), cfg_scale)
    study.figure(
        "losses", losses({"single step": single, **told}), "Training loss, linear above and logarithmic below."
    )
    here, none, whole = (errors[strength] for strength in (NOISE, 0.0, 1.0))
    names = list(denoisers)
    metric = next(key for key in rows[0] if key.startswith(("fd_", "fid_")))
    plain, guided = rows[-2][metric], rows[-1][metric]
    study.finding(
        f"Trained at noise {NOISE} alone, a denoiser leaves a squared error of {here[names[1]]:.3g} there (the noisy "
        f"image has {NOISE**2:.2g}; one that is told the noise leaves {here[names[2]]:.3g}), but "
        f"{none[names[1]]:.2g} on clean images and {whole[names[1]]:.2g} at noise 1, against {none[names[2]]:.2g} "
        f"and {whole[names[2]]:.2g}; guidance {cfg_scale:g} takes {metric} from {plain:.3g} to {guided:.3g}, "
        f"precision from {rows[-2]['precision']:.2f} to {rows[-1]['precision']:.2f} and recall from "
        f"{rows[-2]['recall']:.2f} to {rows[-1]['recall']:.2f}."
    )


class Denoise:
    """A trained denoiser that takes noise of any strength.

    Args:
        ckpt_path: Its checkpoint.
        constant: Whether it is always told the one noise level that it knows.
    """

    def __init__(self, ckpt_path: Path, constant: bool) -> None:
        module: Any = load_module(ckpt_path)
        self.denoiser = module.denoiser
        self.constant = constant

    @torch.no_grad()
    def __call__(self, x: Tensor, strength: float) -> Tensor:
        """Takes the noise away.

        Args:
            x: Noisy images (N, C, H, W).
            strength: Standard deviation of the noise for pixels in [0, 1].

        Returns:
            Images (N, C, H, W), in [-1, 1].
        """
        sigma = UNIT * (NOISE if self.constant else strength)
        scaling = self.denoiser.scaling
        made: Tensor = self.denoiser(x, torch.tensor(sigma).clamp(scaling.sigma_min, scaling.sigma_max))
        return made


def keep(every: int, last: int) -> dict[str, Any]:
    """Options of a training that keeps checkpoints at an interval of epochs.

    Returns:
        Options of `diffusion-lit fit`.
    """
    checkpoint = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {
            "filename": "after_epoch_{epoch}",
            "auto_insert_metric_name": False,
            "every_n_epochs": every,
            "save_top_k": -1,
        },
    }
    return {"trainer.max_epochs": last, "trainer.callbacks": [checkpoint]}


def at_epoch(run: Trained, count: int) -> Path:
    """The checkpoint of a training after a number of epochs.

    Args:
        run: A training with `keep`.
        count: Number of epochs.

    Returns:
        The file; Lightning counts epochs from 0.
    """
    return run.ckpt_path.with_name(f"after_epoch_{count - 1}.ckpt")


def denoise(study: Study, denoisers: dict[str, Denoise], clean: Tensor, noise: Tensor) -> dict[float, dict[str, float]]:
    """Takes noise of every strength away in one step, and draws and tables what is left.

    Args:
        study: Where it goes.
        denoisers: By name.
        clean: Images (N, C, H, W) in [-1, 1].
        noise: Standard normal, of the same shape.

    Returns:
        The mean squared error, for pixels in [0, 1], by strength and denoiser.
    """
    shown = 10
    noisy = clean + UNIT * NOISE * noise
    rows = {"clean": clean[:shown], f"noise {NOISE}": noisy[:shown]}
    rows |= {name: function(noisy[:shown], NOISE) for name, function in denoisers.items()}
    study.figure("one_step", image_rows(rows), f"Noise {NOISE} on pixels in [0, 1], taken away in one step.")

    errors: dict[float, dict[str, float]] = {}
    for strength in STRENGTHS.tolist():
        strength = round(strength, 3)
        x = clean + UNIT * strength * noise
        made = {name: function(x, strength) for name, function in denoisers.items()}
        found = {name: float((image - clean).square().mean()) / UNIT**2 for name, image in made.items()}
        errors[strength] = {"noisy": strength**2, **found}
    study.table(
        "errors",
        [{"noise": strength, **values} for strength, values in errors.items()],
        f"Mean squared error of {len(clean)} held-out images, pixels in [0, 1]; one level was trained at {NOISE}.",
    )
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name in next(iter(errors.values())):
        values = [errors[strength][name] ** 0.5 for strength in errors]
        axes.plot(list(errors), values, marker="o", label=name, color="grey" if name == "noisy" else None)
    axes.axvline(NOISE, color="grey", linestyle=":", label="trained at")
    axes.set(xlabel="noise, for pixels in [0, 1]", ylabel="root mean squared error", ylim=(0, 0.5))
    axes.grid(True, alpha=0.3)
    axes.legend()
    study.figure("out_of_distribution", figure, "One denoising step at noise of every strength.")

    columns = STRENGTHS[::2].tolist()
    rows = {"noisy": torch.cat([clean[:1] + UNIT * strength * noise[:1] for strength in columns])}
    for name, function in denoisers.items():
        restored = [function(x[None], strength) for x, strength in zip(rows["noisy"], columns, strict=True)]
        rows[name] = torch.cat(restored)
    sheet = image_rows(rows, [f"{strength:.1f}" for strength in columns])
    caption = "One held-out image under noise of every strength, for pixels in [0, 1]."
    study.figure("out_of_distribution_images", sheet, caption)
    return errors


def samples(study: Study, told: dict[str, Trained], epochs: tuple[int, int], cfg_scale: float) -> list[dict[str, Any]]:
    """Draws from the DDPMs at two ages, with and without guidance."""
    evaluator = study.evaluator(told["time and class"].ckpt_path)
    rows, total = [], study.setup.num_samples
    for name, run in told.items():
        for count in epochs:
            path = at_epoch(run, count)
            module: Any = load_module(path)
            classes = module.num_classes
            labels = torch.arange(total) % classes if classes else None
            for scale in (1.0, cfg_scale) if classes else (1.0,):
                drawn = study.draw(path, evaluator, module.sampling.replace(cfg_scale=scale), labels)
                guided = scale if classes else None
                rows.append({"told": name, "epochs": count, "guidance": guided, **evaluator.measure(drawn)})
                how = f", guidance {scale:g}, a row per class" if classes else ""
                caption = f"Told the {name}, after {count} epochs{how}."
                columns = min(10, total // classes) if classes else 10
                grid = by_class(drawn.images, classes, columns) if columns else drawn.images
                names = [str(kind) for kind in module.class_names] if classes and columns else []
                file = f"samples_{name.replace(' ', '_')}_{count}_{scale:g}"
                study.images(file, grid, caption, columns or 10, names)
    study.table("quality", rows, f"{study.setup.num_samples:,} samples against the training images.")
    return rows


def by_class(images: Tensor, classes: int, columns: int) -> Tensor:
    """The first samples of classes 0, 1, 2, ... in turn, a row per class.

    Args:
        images: Samples (N, C, H, W).
        classes: Number of classes; 0 for none, where they stay as they are.
        columns: Samples of each class.

    Returns:
        Rows of `columns` samples, four without classes; at most ten rows.
    """
    if classes == 0:
        return images[: 4 * columns]
    first = images[: classes * columns].unflatten(0, (columns, classes))
    return first.transpose(0, 1)[:10].flatten(0, 1)


def losses(trained: dict[str, Trained]) -> plt.Figure:
    """The training loss of each model, linear and logarithmic.

    Returns:
        The figure, of two rows of panels.
    """
    figure, panels = plt.subplots(2, len(trained), figsize=(4 * len(trained), 6.5), layout="constrained", sharex="col")
    for column, (name, run) in enumerate(trained.items()):
        for axes, scale in zip(panels[:, column], ("linear", "log"), strict=True):
            axes.plot(*run.curves["train/loss"], alpha=0.6, label="training, one batch")
            axes.plot(*run.curves["val/loss"], marker="o", markersize=3, label="held out")
            axes.set(yscale=scale)
            axes.grid(True, which="both", alpha=0.3)
        panels[0, column].set_title(name)
        panels[1, column].set_xlabel("training step")
    panels[0, 0].set_ylabel("loss")
    panels[1, 0].set_ylabel("loss, logarithmic")
    panels[0, 0].legend()
    return figure


if __name__ == "__main__":
    SMALL = {
        "data.class_path": "datamodules.Digits",
        "data.init_args.batch_size": 32,
        "model.init_args.net.init_args.model_channels": 32,
        "model.init_args.optimizer.init_args.lr": 0.001,
        "sample_grid.every": 0,
        "trajectory.every": 0,
    }
    main(single_step_denoiser, "configs/studies/single_step_denoiser.yaml", SMALL, num_samples=150)
