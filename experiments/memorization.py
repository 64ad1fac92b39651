"""How many training images can be drawn out of a model, as the training set shrinks?

The same network is trained for the same number of steps on 1, 16, 256 and all training images, and draws samples of
the same seeds. A sample is a copy of a training image by the evaluation's nearest-neighbour test
(`diffusion_lit.evaluation.memorization`): it is nearer to it than chance allows, given how near held-out images come.
The training images that have a copy are those that were extracted, as in Carlini et al. 2023 (arXiv 2301.13188).

    python -m experiments.memorization
    python -m experiments.memorization --config configs/edm_fashion_mnist.yaml --data.init_args.root FOLDER
    python -m experiments.memorization --counts '[1, 16, 256, 4096, null]'
"""

from typing import Any

import matplotlib.pyplot as plt

from datamodules import Subset
from diffusion_lit.evaluation.memorization import compare, worst_triples
from diffusion_lit.modules.load import load_data, load_module, prepared_data
from diffusion_lit.report.memorization import pairs_image
from experiments.harness.evaluator import Evaluator
from experiments.harness.runs import Trained
from experiments.harness.show import lines
from experiments.harness.study import QUIET, Study, main


def memorization(study: Study, counts: list[int | None] = [1, 16, 256, None]) -> None:  # noqa: B006 (never changed)
    """How many training images can be drawn out of a model, as the training set shrinks?

    Trains one network on fewer and fewer images for the same number of steps and looks for copies among its samples.

    Args:
        study: Where it works.
        counts: Numbers of training images; null for all.
    """
    data = whole_data(study)
    trained = study.fit(
        {
            "all" if count is None else f"{count:,}": {
                "data": data
                if count is None
                else {"class_path": "datamodules.Subset", "init_args": {"data": data, "count": count}}
            }
            for count in counts
        }
    )
    first = load_data(next(iter(trained.values())).ckpt_path)
    evaluator = study.evaluator_on(first.data if isinstance(first, Subset) else first)
    rows = []
    for name, run in trained.items():
        own = prepared_data(run.ckpt_path)
        labels = study.labels(load_module(run.ckpt_path), own)  # those that it saw
        samples = study.draw(run, evaluator, labels=labels)
        training, held_out = own.reference_images("train"), own.reference_images("test")
        found = compare(samples.images, training, held_out, bool(own.random_flip), study.device)
        extracted = len(found.training[found.copies].unique())
        rows.append(
            {
                "training images": len(training),
                "samples": len(samples.images),
                "copies": len(found.copies),
                "share of copies": len(found.copies) / len(samples.images),
                "extracted": extracted,
                "share extracted": extracted / len(training),
                "median distance ratio": found.record["median_ratio"],
                **evaluator.measure(samples),
                "train/loss": last_values(run, "train/loss"),
                "val/loss": last_values(run, "val/loss", 1),
            }
        )
        pairs = pairs_image(worst_triples(found, samples.images, training, held_out))
        caption = f"Trained on {name}: sample, nearest training and nearest held-out image, two triples a row."
        study.images(f"pairs_{name.replace(',', '')}", pairs, caption)
        row = rows[-1]
        study.tell(f"{name}: {row['copies']} copies, median ratio of distances {row['median distance ratio']:.3g}")
    study.table("copies", rows, "Copies among the samples, by the distance of pixels, and their quality.")
    study.figure(
        "copies", draw_figure(rows, evaluator), "Copies and extracted images against the size of the training set."
    )
    told_of = "; ".join(
        f"trained on {row['training images']:,}, {row['share of copies']:.1%} of the samples are copies and "
        f"{row['extracted']:,} training images ({row['share extracted']:.1%}) were extracted"
        for row in rows
    )
    study.finding(f"Of {study.setup.num_samples:,} samples each: {told_of}.")


def whole_data(study: Study) -> dict[str, Any]:
    """The data set as the config and the options describe it; the options are taken out of those of the trainings."""
    whole: dict[str, Any] = study.value("data")
    for name in [name for name in study.options if name.startswith("data.")]:
        del study.options[name]
    return whole


def last_values(run: Trained, name: str, count: int = 10) -> float:
    """The mean of the last values that a training logged.

    Returns:
        The mean; not a number where nothing was logged.
    """
    values = list(run.curves[name][1])[-count:] if name in run.curves else []
    return float(sum(values) / len(values)) if values else float("nan")


def draw_figure(rows: list[dict[str, Any]], evaluator: Evaluator) -> plt.Figure:
    """Copies and extracted images against the number of training images."""
    seen = [{**row, "median distance ratio": max(row["median distance ratio"], 1e-3)} for row in rows]
    panels = {
        "share": ["share of copies", "share extracted"],
        "median of d(training) / d(held out)": ["median distance ratio"],
        "loss at the end of training": ["train/loss", "val/loss"],
    }
    figure = lines(seen, "training images", panels, evaluator, log=True)
    shares, ratio, loss = figure.axes
    shares.set_ylim(-0.03, 1.03)
    ratio.axhline(1, color="grey", linestyle="--", label="as near to held-out images")
    ratio.legend(fontsize=8)
    ratio.set_yscale("log")
    loss.set_yscale("log")
    return figure


if __name__ == "__main__":
    SMALL = {**QUIET, "trainer.max_steps": 300, "model.init_args.sampling.num_steps": 9}
    main(memorization, "configs/edm_digits.yaml", SMALL, num_samples=300)
