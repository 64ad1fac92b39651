"""Starting from another model: a class that a trained model does not know is learnt from its weights or from nothing.

One model is trained without one class. From its average weights (`diffusion-lit fit --init_from`) models of all classes
go on, for shares of the steps, and others of the same lengths start from nothing. Learning rate, average and the order
of the data are those of a fresh run of that length.

    python -m experiments.warm_start
    python -m experiments.warm_start --config configs/edm_fashion_mnist.yaml --left_out Bag --data.init_args.root DIR
"""

from typing import Any

import torch

from diffusion_lit.evaluation.metrics import Statistics, frechet_distance
from experiments.harness.show import image_rows, lines
from experiments.harness.study import QUIET, Study, main
from experiments.memorization import whole_data


def warm_start(
    study: Study,
    left_out: str = "3",
    shares: list[float] = [0.25, 0.5, 1.0],  # noqa: B006 (never changed)
) -> None:
    """How many steps does a start from another model save?

    Trains a model without one class, and from it and from nothing models of all classes, of several lengths.

    Args:
        study: Where it works.
        left_out: Name of the class that the first model does not know.
        shares: Lengths of the trainings of all classes, as shares of the first one's steps.
    """
    steps = int(study.value("trainer.max_steps"))
    data = whole_data(study)
    subset = {"class_path": "datamodules.Subset", "init_args": {"data": data, "without": [left_out]}}
    first = study.fit({f"without {left_out}": {"data": subset}})[f"without {left_out}"]
    starts = {"from nothing": {}, f"from the model without {left_out}": {"init_from": str(first.ckpt_path)}}
    variants: dict[str, dict[str, Any]] = {}
    for start, options in starts.items():
        for share in sorted(shares):
            count = max(1, round(steps * share))
            variants[f"{start}, {count} steps"] = {
                **options,
                "data": data,
                "trainer.max_steps": count,
                "trainer.val_check_interval": count,
            }
    trained = study.fit(variants)
    evaluator = study.evaluator(trained)
    names = evaluator.data.class_names
    labels = torch.arange(study.setup.num_samples) % len(names)
    new = names.index(left_out)
    real = evaluator.reference
    assert real.features is not None and real.labels is not None
    of_class = Statistics.of(real.features.features[real.labels == new])
    rows, shown = [], {}
    for name, run in trained.items():
        samples = study.draw(run, evaluator, labels=labels)
        drawn = samples.features.features[labels == new]
        rows.append(
            {
                "start": name.rpartition(", ")[0],
                "steps": variants[name]["trainer.max_steps"],
                **evaluator.measure(samples),
                f"{evaluator.metric} of {left_out}": frechet_distance(Statistics.of(drawn), of_class),
                "val/loss": run.metrics["val/loss"],
            }
        )
        shown[name] = torch.cat([samples.images[labels == new][:4], samples.images[labels != new][:8]])
    study.table("quality", rows, f"{study.setup.num_samples:,} samples, every class equally often.")
    figure = lines(rows, "steps", {evaluator.metric: [evaluator.metric]}, evaluator, by="start")
    study.figure("quality", figure, "Quality against the number of steps.")
    study.figure("samples", image_rows(shown), f"Four samples of {left_out} and eight others, of the same seeds.")
    cold, warm = ([row for row in rows if row["start"] == start] for start in starts)
    last = cold[-1]
    enough = next((row for row in warm if row[evaluator.metric] <= last[evaluator.metric]), None)
    reached = (
        "in none of these lengths" if enough is None else f"after {enough['steps']:,} ({enough[evaluator.metric]:.3g})"
    )
    study.finding(
        f"From nothing {last['steps']:,} steps reach {evaluator.metric} {last[evaluator.metric]:.3g}; from the weights "
        f"of a model without {left_out} this is reached {reached}."
    )


if __name__ == "__main__":
    SMALL = {**QUIET, "trainer.max_steps": 400, "model.init_args.sampling.num_steps": 9}
    main(warm_start, "configs/edm_digits.yaml", SMALL, num_samples=1000)
