"""Why mountains come before sky: in which order a model settles the frequencies and the parts of an image.

A deterministic sampler (Euler on the model's own grid) draws many images, and at each step the estimate x0_hat is
compared with the image x0 that it ends in. A band of frequencies is a ring of its cosine transform (orthonormal
DCT-II), in cycles per image; a region is a tile. Band or tile has settled at the first step from which on

    |x0_hat - x0| <= 0.1 |x0|            norms over the band; of tiles over the tile, |x0| being the image's contrast:
                                         the root mean square over its pixels around its mean

Detail of a tile is its own contrast, the root mean square around the tile's mean: mountains have much, sky has little.
The sign of the rank correlation of detail with the noise level at which a tile settles answers the question: positive
means that detailed tiles settle first.

    python -m experiments.coarse_first
    python -m experiments.coarse_first --config configs/ddpm_landscapes.yaml --data.init_args.root FOLDER
    python -m experiments.coarse_first --ckpt_path runs/edm_cifar10/version_0/checkpoints/last.ckpt
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from scipy.stats import spearmanr
from torch import Tensor

from diffusion_lit.diffusion import Sampling
from diffusion_lit.diffusion.grids import evenly
from diffusion_lit.modules.load import load_module, prepared_data
from diffusion_lit.report.images import StepRecorder
from diffusion_lit.storage.hashing import file_hash
from diffusion_lit.words import article
from experiments.harness.frequencies import band_edges, band_masks, band_power, settled, tile_mean
from experiments.harness.show import image_rows
from experiments.harness.study import QUIET, Study, main

TOLERANCE = 0.1
SHOWN = 8


def coarse_first(
    study: Study, num_steps: int = 40, tiles: int = 4, most_bands: int = 8, ckpt_path: str | None = None
) -> None:
    """What does a model settle first: large shapes or small ones, mountains or sky?

    Follows the estimate x0_hat along a deterministic sampler and notes when each band of frequencies and each part of
    the image is within 10% of its final value.

    Args:
        study: Where it works.
        num_steps: Steps of the sampler.
        tiles: Tiles along a side of the image, which they must divide.
        most_bands: Bands of frequencies, at most half the side of the image.
        ckpt_path: A trained diffusion model of images; by default one is trained.
    """
    path = Path(ckpt_path) if ckpt_path else study.fit({"model": {}})["model"].ckpt_path
    module: Any = load_module(path).to(study.device)
    if not hasattr(module, "denoiser"):
        raise ValueError(f"{path} holds {article(module)}, which has no x0_hat to follow.")
    if module.x_shape != module.image_shape:
        raise ValueError(f"{path} denoises codes, not images, whose frequencies are others; take a model of images.")
    size = module.image_shape[-1]
    if size % tiles:
        raise ValueError(f"{tiles} tiles do not divide images of {size} pixels; choose a divisor.")
    bands = min(most_bands, size // 2)
    sampling = module.sampling.replace(sampler="euler", num_steps=num_steps)
    kept = study.keep(
        {
            "checkpoint": file_hash(path),
            "sampling": sampling.record(),
            "samples": [study.setup.seed, study.setup.num_samples],
            "bands": bands,
            "tiles": tiles,
            "format": 1,
        },
        lambda: follow(study, module, path, sampling, bands, tiles),
    )
    sigmas = kept["sigmas"]
    edges = band_edges(size, bands)
    when = {name: settled(kept[name], TOLERANCE) for name in ("band_errors", "tile_errors")}
    band_rows: list[dict[str, Any]] = [
        {
            "cycles per image": f"{edges[band]:.3g} to {edges[band + 1]:.3g}",
            **summary(when["band_errors"][:, band], sigmas),
            "share of power": float(kept["power"][-1, band] / kept["power"][-1].sum()),
        }
        for band in range(bands)
    ]
    study.table("bands", band_rows, f"When a band is within 10% of its final value, over {len(kept['x0']):,} samples.")
    tile_when, detail = when["tile_errors"], kept["detail"]
    share = [detail.flatten() <= detail.quantile(0.25), detail.flatten() >= detail.quantile(0.75)]
    tile_rows = [
        {"tiles": name, **summary(tile_when.flatten()[rows], sigmas)}
        for name, rows in zip(("the flattest quarter", "the most detailed quarter"), share, strict=True)
    ]
    study.table("tiles", tile_rows, "When tiles of little and of much detail are within 10% of the image's contrast.")
    places = [
        {"row": row, "column": column, **summary(tile_when[:, row * tiles + column], sigmas)}
        for row in range(tiles)
        for column in range(tiles)
    ]
    study.table("places", places, f"The same by place in the image, rows from the top, {tiles} x {tiles} tiles.")
    levels = level_of(tile_when, sigmas)
    ordered = bool(levels.min() < levels.max())  # else no correlation is defined, as of a model that knows nothing yet
    correlation = float(spearmanr(detail.flatten(), levels.flatten()).statistic) if ordered else 0.0

    study.figure("spectrum", draw_spectrum(kept, edges), "The power of x0_hat in each band along the sampling.")
    study.figure("settling", draw_settling(kept, when, edges), "How far bands and tiles are from where they end.")
    study.figure("places", draw_places(kept, tile_when, tiles), "Where in the image x0_hat settles first.")
    columns = kept["shown_steps"].tolist()
    names = [f"{sigmas[step]:.2g}" for step in columns]
    rows = {f"sample {index}": kept["shown"][:, index] for index in range(kept["shown"].shape[1])}
    study.figure("estimates", image_rows(rows, [f"sigma\n{name}" for name in names]), "x0_hat along the sampling.")

    first, last = band_rows[0], band_rows[-1]
    flat, rich = tile_rows
    tiles_order = "detailed tiles come before flat ones" if correlation > 0 else "flat tiles come before detailed ones"
    tiles_order = tiles_order if ordered else "tiles come all at once"
    coarse = first["median sigma"] > last["median sigma"]
    study.finding(
        f"{'Coarse comes before fine' if coarse else 'No order from coarse to fine'}: the band of "
        f"{first['cycles per image']} cycles per image is within 10% of its end at sigma "
        f"{first['median sigma']:.3g} (step {first['median step']:.0f} of {num_steps}), that of "
        f"{last['cycles per image']} at sigma {last['median sigma']:.3g} (step {last['median step']:.0f}); "
        f"{tiles_order}, the most detailed quarter at sigma {rich['median sigma']:.3g}, the flattest "
        f"at {flat['median sigma']:.3g} (rank correlation of detail with sigma {correlation:+.2f})."
    )


def follow(study: Study, module: Any, path: Path, sampling: Sampling, bands: int, tiles: int) -> dict[str, Tensor]:
    """Draws samples and measures every x0_hat against the sample that it ends in.

    Returns:
        sigmas (S,) of the steps; relative errors `band_errors` (S, N, bands) and `tile_errors` (S, N, tiles^2); the
        mean power (S + 1, bands) of x0_hat, at last that of x0; `detail` (N, tiles^2); samples `x0` (N, C, H, W), and
        of the first ones x0_hat at `shown_steps`, `shown` (T, n, C, H, W).
    """
    setup = study.setup
    labels = study.labels(module, prepared_data(path)) if module.num_classes else None
    masks = band_masks(module.image_shape[-1], bands)
    found: dict[str, list[Tensor]] = {name: [] for name in ("band_errors", "tile_errors", "power", "detail", "x0")}
    shown, sigmas, steps = torch.empty(0), torch.empty(0), torch.empty(0)
    for rows in torch.split(torch.arange(setup.num_samples), setup.batch_size):
        own = None if labels is None else labels[rows]
        recorder = StepRecorder(keep=len(rows))
        x0 = module.generate((rows + setup.seed).tolist(), own, sampling, recorder).float().cpu()
        estimates = recorder.x0_hat
        contrast = (x0 - x0.mean((2, 3), keepdim=True)).square().mean((1, 2, 3)).sqrt()
        end = band_power(x0, masks)
        errors = [band_power(x0_hat - x0, masks) / end.clamp(min=1e-12) for x0_hat in estimates]
        found["band_errors"].append(torch.stack(errors).sqrt())
        far = [tile_mean((x0_hat - x0).square(), tiles).sqrt() / contrast[:, None] for x0_hat in estimates]
        found["tile_errors"].append(torch.stack(far))
        found["power"].append(torch.stack([band_power(some, masks).sum(0) for some in (*estimates, x0)]))
        around = tile_mean(x0.square(), tiles) - tile_mean(x0, tiles, each=True).square().mean(1)
        found["detail"].append(around.clamp(min=0).sqrt())
        found["x0"].append(x0)
        if rows[0] == 0:
            sigmas = torch.tensor(recorder.sigmas)
            steps = torch.tensor(evenly(0, len(sigmas) - 1, min(10, len(sigmas))))
            shown = torch.stack([estimates[step][:SHOWN] for step in steps])
    return {
        "sigmas": sigmas,
        "band_errors": torch.cat(found["band_errors"], dim=1),
        "tile_errors": torch.cat(found["tile_errors"], dim=1),
        "power": torch.stack(found["power"]).sum(0) / setup.num_samples,
        "detail": torch.cat(found["detail"]),
        "x0": torch.cat(found["x0"]),
        "shown": shown,
        "shown_steps": steps,
    }


def level_of(steps: Tensor, sigmas: Tensor) -> Tensor:
    """The noise level of steps; 0 for the end of the sampling."""
    return torch.cat([sigmas, sigmas.new_zeros(1)])[steps]


def summary(steps: Tensor, sigmas: Tensor) -> dict[str, float]:
    """Median step (counted from 1) and noise level, and quartiles of the latter.

    Args:
        steps: Of many samples (N,), from 0.
        sigmas: The noise level of each step.
    """
    levels = level_of(steps, sigmas).double()
    low, middle, high = (float(levels.quantile(share)) for share in (0.25, 0.5, 0.75))
    return {
        "median step": float(steps.double().median()) + 1,
        "median sigma": middle,
        "quarter below": low,
        "quarter above": high,
    }


def _along(axes: Any, sigmas: Tensor) -> None:
    axes.set(xscale="log", xlabel="noise level sigma (sampling goes to the right)")
    axes.set_xlim(float(sigmas.max()), float(sigmas.min()))
    axes.grid(True, alpha=0.3)


def _colour(index: int, count: int) -> Any:
    return plt.get_cmap("viridis")(index / max(1, count - 1) * 0.9)


def draw_spectrum(kept: dict[str, Tensor], edges: list[float]) -> plt.Figure:
    """The power of x0_hat in each band, absolute and relative to its end.

    Args:
        kept: From `follow`.
        edges: Of the bands.
    """
    figure, (absolute, relative) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    power, sigmas = kept["power"], kept["sigmas"]
    centres = [(low + high) / 2 for low, high in pairwise(edges)]
    steps = sorted(set(evenly(0, len(sigmas) - 1, 7)))
    for index, step in enumerate(steps):
        absolute.plot(
            centres, power[step], marker="o", label=f"sigma {sigmas[step]:.3g}", color=_colour(index, len(steps))
        )
    absolute.plot(centres, power[-1], color="black", linestyle="--", label="the samples")
    absolute.set(yscale="log", xlabel="cycles per image", ylabel="mean power of x0_hat in the band")
    absolute.legend(fontsize=8)
    absolute.grid(True, alpha=0.3)
    for band in range(power.shape[1]):
        label = f"{edges[band]:.3g} to {edges[band + 1]:.3g}"
        relative.plot(sigmas, power[:-1, band] / power[-1, band], label=label, color=_colour(band, power.shape[1]))
    relative.axhline(1, color="grey", linestyle="--")
    relative.set(ylabel="mean power of x0_hat, that of the samples = 1")
    relative.legend(title="cycles per image", fontsize=8)
    _along(relative, sigmas)
    return figure


def draw_settling(kept: dict[str, Tensor], when: dict[str, Tensor], edges: list[float]) -> plt.Figure:
    """The median error of each band, and the share of bands and tiles that have settled.

    Args:
        kept: From `follow`.
        when: Steps at which bands and tiles settle.
        edges: Of the bands.
    """
    figure, (errors, shares) = plt.subplots(1, 2, figsize=(14, 4.5), layout="constrained")
    sigmas, count = kept["sigmas"], kept["band_errors"].shape[2]
    steps = torch.arange(len(sigmas))
    for band in range(count):
        label, colour = f"{edges[band]:.3g} to {edges[band + 1]:.3g}", _colour(band, count)
        middle = kept["band_errors"][:-1, :, band].median(1).values  # without the last step, which is the end itself
        errors.plot(sigmas[:-1], middle, label=label, color=colour)
        done = (when["band_errors"][:, band] <= steps[:, None]).double().mean(1)
        shares.plot(sigmas, done, label=f"{label} cycles", color=colour)
    detail = kept["detail"]
    for name, rows, style in (
        ("flattest quarter of tiles", detail <= detail.quantile(0.25), "--"),
        ("most detailed quarter of tiles", detail >= detail.quantile(0.75), ":"),
    ):
        done = (when["tile_errors"][rows] <= steps[:, None]).double().mean(1)
        shares.plot(sigmas, done, label=name, color="black", linestyle=style)
    errors.axhline(TOLERANCE, color="grey", linestyle="--", label="settled below")
    errors.set(yscale="log", ylabel="median of |x0_hat - x0| / |x0| in the band")
    errors.legend(title="cycles per image", fontsize=8)
    shares.set(ylabel="share of samples in which it has settled", ylim=(-0.02, 1.02))
    shares.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in (errors, shares):
        _along(axes, sigmas)
    return figure


def draw_places(kept: dict[str, Tensor], when: Tensor, tiles: int) -> plt.Figure:
    """Where in the image it settles, beside the samples' mean and how detailed each place is.

    Args:
        kept: From `follow`.
        when: Steps at which tiles settle, (N, tiles^2).
        tiles: Tiles along a side.
    """
    figure, panels = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    levels = level_of(when, kept["sigmas"])
    mean = (kept["x0"].mean(0).permute(1, 2, 0).clamp(-1, 1) + 1) / 2
    panels[0].imshow(mean, cmap="gray", vmin=0, vmax=1)
    panels[0].set_title("mean of the samples")
    for axes, values, name in (
        (panels[1], kept["detail"].mean(0), "mean contrast within a tile"),
        (panels[2], levels.double().median(0).values, "median sigma at which a tile settles"),
    ):
        shown = axes.imshow(values.reshape(tiles, tiles), cmap="viridis")
        axes.set_title(name)
        figure.colorbar(shown, ax=axes, shrink=0.8)
    for axes in panels[:3]:
        axes.set(xticks=[], yticks=[], xlabel="place in the image")
    detail, values = kept["detail"].flatten(), levels.flatten()
    order = detail.argsort()
    groups = torch.tensor_split(order, 10)
    medians = [float(values[group].double().median()) for group in groups]
    low, high = ([float(values[group].double().quantile(share)) for group in groups] for share in (0.25, 0.75))
    centres = [float(detail[group].mean()) for group in groups]
    panels[3].plot(centres, medians, marker="o", label="median")
    panels[3].fill_between(centres, low, high, alpha=0.2, label="middle half")
    panels[3].set(xlabel="contrast within a tile, tenths of the tiles", ylabel="sigma at which it settles")
    panels[3].legend(fontsize=8)
    panels[3].grid(True, alpha=0.3)
    return figure


if __name__ == "__main__":
    main(coarse_first, "configs/edm_digits.yaml", {**QUIET, "trainer.max_steps": 300}, num_samples=300)
