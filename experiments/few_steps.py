"""Few steps: what is left of quality when a sample may cost one denoiser call, two, four, ...

A teacher (EDM) is drawn by each sampler with the most steps that so many calls allow, of which the best counts. Beside
it stand a consistency model that is tuned from a teacher of half the length for the other half, and a MeanFlow from
nothing, so that all have seen the same number of training images. The consistency model takes its own noise levels for
one step or two; for more, those after the first are spaced evenly in log sigma from `high` to `low`. The same seeds and
classes are drawn by all.

    python -m experiments.few_steps
    python -m experiments.few_steps --config configs/edm_fashion_mnist.yaml --data.init_args.root FOLDER \
        --tuned configs/consistency_fashion_mnist.yaml --meanflow configs/meanflow_fashion_mnist.yaml
"""

from typing import Any

import torch

from diffusion_lit.diffusion.generate import Sampling
from diffusion_lit.diffusion.images import from_uint8
from diffusion_lit.evaluation.generation import Samples
from diffusion_lit.evaluation.metrics import kernel_distance, kernel_name
from diffusion_lit.modules.load import load_module
from experiments.harness.evaluator import Evaluator
from experiments.harness.runs import Trained
from experiments.harness.show import lines
from experiments.harness.study import QUIET, Study, image_rows, main
from experiments.sampler_comparison import settings_of

SHOWN = 10  # images of each row


def few_steps(
    study: Study,
    nfe: list[int] = [1, 2, 4, 8, 16, 35],  # noqa: B006 (never changed)
    samplers: list[str] = ["heun", "dpmpp_2m", "unipc", "euler"],  # noqa: B006
    tuned: str = "configs/consistency_digits.yaml",
    meanflow: str = "configs/meanflow_digits.yaml",
    high: float = 5.0,
    low: float = 0.2,
    cfg_scale: float | None = None,
) -> None:
    """How good are samples of one step, two, four, and more?

    Trains a diffusion model, one of half the length that is then tuned to a consistency model for the other half, and
    a MeanFlow, and measures all at equal numbers of denoiser calls.

    Args:
        study: Where it works.
        nfe: Denoiser calls per sample.
        samplers: Samplers of the teacher.
        tuned: Config of the consistency model, on the same data and network.
        meanflow: Config of the MeanFlow, on the same data.
        high: Noise level of the consistency model's second step, where it takes more than two.
        low: Noise level of its last step, where it takes more than two.
        cfg_scale: Guidance of the teacher; as it is trained to be drawn by default.
    """
    trained = train(study, tuned, meanflow)
    evaluator = study.evaluator(trained)
    rows, images = [], {}
    for name, run in trained.items():
        module: Any = load_module(run.ckpt_path)
        default: Sampling = module.sampling
        for calls in nfe:
            if name == "tuned":
                settings = [default.replace(grid_options={"levels": levels(calls, high, low, default)})]
            elif name == "meanflow":
                settings = [default.replace(num_steps=calls)]
            else:
                teacher = default.replace(cfg_scale=cfg_scale)  # in as many steps as the calls allow
                settings = [one for sampler in samplers for one in settings_of(teacher, sampler, [calls], [])]
            found = [(measure(study, run, evaluator, setting), setting) for setting in settings]
            (figures, drawn), setting = min(found, key=lambda one: one[0][0][evaluator.metric])
            row = {"model": name, "NFE": calls, "sampler": setting.sampler, "steps": setting.num_steps, **figures}
            rows.append(row)
            images[f"{name}, {calls}"] = from_uint8(drawn.images[:SHOWN])
    count = study.setup.num_samples
    study.table("quality", rows, f"{count:,} samples of the same seeds against the training images.")
    panels = {name: [name] for name in (evaluator.metric, "precision", "recall")}
    figure = lines(rows, "NFE", panels, evaluator, by="model", xlabel="denoiser calls per sample (NFE)", log=True)
    study.figure("quality", figure, "Quality and variety against denoiser calls per sample.")
    study.figure("images", image_rows(images), "The same seeds and classes: the model, and its denoiser calls.")
    study.finding(sentence(rows, evaluator))


def train(study: Study, tuned: str, meanflow: str) -> dict[str, Trained]:
    """The teacher, the model tuned from one of half the length, and the MeanFlow, after as many images in all."""
    total = int(study.value("trainer.max_steps"))
    first = total // 2
    found = study.fit({"teacher": {"trainer.max_steps": total}, "half": {"trainer.max_steps": first}})
    start = found["half"].ckpt_path.resolve()
    options = {"trainer.max_steps": total - first, "init_from": str(start)}
    return {
        "teacher": found["teacher"],
        **study.fit({"tuned": options}, tuned),
        **study.fit({"meanflow": {"trainer.max_steps": total}}, meanflow),
    }


def levels(calls: int, high: float, low: float, default: Sampling) -> list[float]:
    """Noise levels of a consistency model's steps: its own for one or two, its first and others behind it for more.

    Args:
        calls: Number of steps.
        high: The second of more than two.
        low: The last of more than two.
        default: How the model is drawn by default.
    """
    own = [float(level) for level in default.grid_options["levels"]]
    if calls < 3:
        return own[:calls]
    spaced = torch.linspace(torch.tensor(high).log(), torch.tensor(low).log(), calls - 1, dtype=torch.float64).exp()
    return [own[0], *spaced.tolist()]


def measure(study: Study, run: Trained, evaluator: Evaluator, setting: Sampling) -> tuple[dict[str, float], Samples]:
    """The figures of a model's samples, and the samples.

    Returns:
        Distance, kernel distance, precision and recall by name; and the samples.
    """
    drawn = study.draw(run, evaluator, setting)
    assert evaluator.reference.features is not None
    figures = evaluator.measure(drawn)
    kernel = kernel_distance(drawn.features.features, evaluator.reference.features.features)
    return {**figures, kernel_name(evaluator.extractor.name): kernel}, drawn


def sentence(rows: list[dict[str, Any]], evaluator: Evaluator) -> str:
    """What was found."""
    metric = evaluator.metric

    def told(model: str) -> str:
        own = [row for row in rows if row["model"] == model]
        return ", ".join(f"{row[metric]:.3g} in {row['NFE']}" for row in own)

    floor = f" (real images get {evaluator.floor[0]:.3g})" if evaluator.floor else ""
    best = told("teacher")
    others = [
        f"the {model} {told(model)}" for model in dict.fromkeys(row["model"] for row in rows) if model != "teacher"
    ]
    return f"In denoiser calls per sample, {'; '.join(others)}; the teacher under its best sampler {best}{floor}."


if __name__ == "__main__":
    main(few_steps, "configs/edm_digits.yaml", {**QUIET, "trainer.max_steps": 900}, num_samples=300)
