"""Small and long or large and short: networks of different width at equal compute.

Each network is trained for as many steps as the same number of floating-point operations allows: what the smallest one
takes in `trainer.max_steps` steps. A step is counted as three forward passes, since the backward pass takes about two.
The digits are too few for large networks, so that the small form stays below 2 million parameters; the widths of the
second line, in the U-Net of 32-pixel images, go from 2 to 33 million.

    python -m experiments.capacity
    python -m experiments.capacity --config configs/edm_cifar10.yaml --widths [34,68,136] --data.init_args.root DIR
"""

from typing import Any

from diffusion_lit.modules.load import load_module
from experiments.harness.networks import build, cost, step_cost
from experiments.harness.show import image_rows, lines
from experiments.harness.study import QUIET, Study, main

WIDTH = "model_channels"


def capacity(
    study: Study,
    widths: list[int] = [16, 32, 48],  # noqa: B006 (never changed)
    seconds: float = 2.0,
) -> None:
    """How large should a network be, for the same compute?

    Trains one U-Net at several widths for the same number of floating-point operations.

    Args:
        study: Where it works.
        widths: Channels of the first level; the smallest trains for the config's number of steps.
        seconds: How long the time of a training step is measured.
    """
    widths = sorted(widths)
    nets = {width: build(study, **{WIDTH: width}) for width in widths}
    costs = {width: cost(net) for width, net in nets.items()}
    steps = {
        width: max(1, round(int(study.value("trainer.max_steps")) * costs[widths[0]].forward / costs[width].forward))
        for width in widths
    }
    batch_size = int(study.value("data.init_args.batch_size"))
    plan = [
        {
            "channels": width,
            "parameters M": costs[width].parameters / 1e6,
            "GFLOP per image": costs[width].forward / 1e9,
            "steps": steps[width],
            "TFLOP in all": 3 * costs[width].forward * batch_size * steps[width] / 1e12,
        }
        for width in widths
    ]
    study.table("plan", plan, "What is trained.")
    trained = study.fit(
        {
            f"{width} channels": {
                f"model.init_args.net.init_args.{WIDTH}": width,
                "trainer.max_steps": steps[width],
                "trainer.val_check_interval": steps[width],
            }
            for width in widths
        }
    )
    evaluator = study.evaluator(trained)
    rows, shown = [], {}
    for planned in plan:
        run = trained.get(f"{planned['channels']} channels")
        if run is None:
            continue
        drawn = study.draw(run, evaluator)
        module: Any = load_module(run.ckpt_path).to(study.device)
        net = module.net
        rows.append(
            {
                **planned,
                **evaluator.measure(drawn),
                "val/loss": run.metrics["val/loss"],
                **step_cost(net, batch_size, seconds),
                "ms per sample": 1000 * drawn.seconds / len(drawn.features),
            }
        )
        shown[f"{planned['parameters M']:.3g}M"] = drawn.images[:12]
    study.table("quality", rows, f"{study.setup.num_samples:,} samples of each network, against the training images.")
    panels = {
        evaluator.metric: [evaluator.metric],
        "validation loss": ["val/loss"],
        "milliseconds of a training step": ["ms per step"],
    }
    figure = lines(rows, "parameters M", panels, evaluator, xlabel="parameters, millions", log=True)
    study.figure("quality", figure, "Quality and speed against size, at equal compute.")
    study.figure("samples", image_rows(shown), "Samples of the same seeds, by the number of parameters.")
    best = min(rows, key=lambda row: row[evaluator.metric])
    others = ", ".join(
        f"{row['parameters M']:.3g}M ({row['steps']:,} steps) {row[evaluator.metric]:.3g}"
        for row in rows
        if row is not best
    )
    study.finding(
        f"At {rows[0]['TFLOP in all']:.3g} TFLOP of training {best['parameters M']:.3g}M parameters ({best['steps']:,} "
        f"steps) are best with {evaluator.metric} {best[evaluator.metric]:.3g}; {others}."
    )


if __name__ == "__main__":
    SMALL = {**QUIET, "trainer.max_steps": 1800, "model.init_args.sampling.num_steps": 9}
    main(capacity, "configs/edm_digits.yaml", SMALL, num_samples=300)
