"""Which sampler is best for how many denoiser calls?

Every sampler that is no alias of another draws samples of the same seeds from one checkpoint at several numbers of
function evaluations (NFE), and the Fréchet distance to the training images and the time are drawn against the NFE. A
sampler of two calls a step gets half the steps. Interrupted, it goes on where it was.

    python -m experiments.sampler_comparison --ckpt_path runs/edm_fashion_mnist/version_0/checkpoints/last.ckpt
"""

from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from diffusion_lit.diffusion.generate import Sampling
from diffusion_lit.diffusion.samplers import SAMPLERS
from diffusion_lit.evaluation.choose import make_extractor
from diffusion_lit.evaluation.generation import GenerationJob, class_frequencies, draw_labels, draw_samples
from diffusion_lit.modules.load import load_module, prepared_data
from diffusion_lit.runtime.hardware import pick_device
from diffusion_lit.storage.hashing import file_hash
from experiments.harness.command import command
from experiments.harness.evaluator import Evaluator
from experiments.harness.show import keep_figure, keep_table, lines

ALIASES = ("ddim", "euler_ancestral")  # ddim with eta 0 is euler, with eta 1 euler_ancestral is ddpm


class Point(NamedTuple):
    """One measurement."""

    sampler: str
    steps: int
    nfe: float
    distance: float
    milliseconds: float


def sampler_comparison(
    ckpt_path: str,
    nfe: list[int] = [5, 9, 17, 35],  # noqa: B006 (never changed)
    samplers: list[str] | None = None,
    rtol: list[float] = [0.02, 0.002],  # noqa: B006
    num_samples: int = 1000,
    extractor: str = "auto",
    extractor_weights: str | None = None,
    data_root: str | None = None,
    batch_size: int = 100,
    seed: int = 0,
    device: str = "auto",
    out: str = "runs/studies/sampler_comparison",
) -> list[Point]:
    """Measures samplers at equal numbers of denoiser calls.

    Args:
        ckpt_path: Checkpoint of a diffusion model.
        nfe: Denoiser calls per sample; each sampler takes the most steps that these allow.
        samplers: Their names; when omitted all that follow the ODE or its SDE, but the aliases.
        rtol: Tolerances of the adaptive rk45, which has no number of steps.
        num_samples: Samples of each point.
        extractor: What images are compared by: classifier, inception, pixels, ...; auto as in `diffusion-lit evaluate`.
        extractor_weights: Local file of the extractor's weights.
        data_root: Where the checkpoint's own data lies now.
        batch_size: Samples drawn at a time.
        seed: Seed of the first sample; the same for every point.
        device: auto, cpu, cuda, ...
        out: Folder for the figure, the table and what an interrupted run has done.

    Returns:
        The measurements.
    """
    chosen = samplers or [name for name in SAMPLERS if name not in ALIASES and SAMPLERS[name].order]
    module: Any = load_module(ckpt_path).to(pick_device(device))
    settings = [setting for name in chosen for setting in settings_of(module.sampling, name, sorted(nfe), rtol)]
    data = prepared_data(ckpt_path, root=data_root)
    measure = make_extractor(extractor, extractor_weights, module.image_shape)
    measure.load(data)
    measure.to(module.device)
    evaluator = Evaluator(data, measure, num_samples)
    labels = draw_labels(range(seed, seed + num_samples), class_frequencies(data, module.num_classes))

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    record = {"checkpoint": file_hash(Path(ckpt_path)), "extractor": measure.identity()}
    points = []
    with tqdm(total=len(settings) * num_samples, unit="img") as bar:
        for setting in settings:
            job = GenerationJob(
                setting,
                num_samples,
                seed,
                labels,
                {**record, "sampling": setting.record()},
                folder / "parts",
                batch_size,
            )
            bar.set_description(f"{setting.sampler}, {setting.num_steps} steps")
            drawn = draw_samples(job, module, measure, bar.update)
            distance, milliseconds = evaluator.distance(drawn.features), 1000 * drawn.seconds / num_samples
            points.append(Point(setting.sampler, setting.num_steps, drawn.forwards, distance, milliseconds))
    write(points, evaluator, num_samples, folder)
    return points


def settings_of(default: Sampling, name: str, nfe: list[int], rtol: list[float]) -> list[Sampling]:
    """The settings of one sampler for given numbers of denoiser calls.

    Returns:
        One setting per number of calls (or per tolerance), without those of no step.
    """
    sampler = SAMPLERS[name]
    if sampler.nfe(1) is None:  # two steps: an adaptive one to sigma_min, and the last to 0
        return [
            default.replace(sampler=name, num_steps=2, sampler_options={"rtol": value, "atol": value}) for value in rtol
        ]
    steps = [max((n for n in range(1, most + 1) if (sampler.nfe(n) or 0) <= most), default=0) for most in nfe]
    return [default.replace(sampler=name, num_steps=n) for n in dict.fromkeys(steps) if n]


def write(points: list[Point], evaluator: Evaluator, count: int, folder: Path) -> None:
    """Writes the figure, and the table as Markdown and CSV, and prints the table.

    Args:
        points: The measurements.
        evaluator: What measured them.
        count: Samples of each point.
        folder: Where the files go.
    """
    floor = evaluator.floor
    real = [] if floor is None else [{"sampler": f"{floor[1]:,} real images", "distance": floor[0]}]
    keep_table(folder / "table", [point._asdict() for point in points], real)
    rows = [{**point._asdict(), "nfe": round(point.nfe)} for point in points]
    panels = {evaluator.metric: ["distance"], "milliseconds per sample": ["milliseconds"]}
    figure = lines(rows, "nfe", panels, evaluator, by="sampler", xlabel="denoiser calls per sample (NFE)", log=True)
    quality, cost = figure.axes
    quality.set_ylabel(f"{evaluator.metric}, {count:,} samples")
    cost.set_yscale("log")
    for axes in (quality, cost):
        axes.legend().remove()
    figure.legend(*quality.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    keep_figure(folder / "figure.png", figure)
    print(f"\n{folder}/figure.png, table.md and table.csv")


if __name__ == "__main__":
    command(sampler_comparison)
