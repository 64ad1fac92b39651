"""Which figure tells a better model from a worse one with the fewest samples?

From one trained model come samples that are known to be worse than its own: of the same network trained for a quarter
of the steps, drawn in few steps, with noise added, and with one class left out. For each of them and each number of
samples, a figure is taken of random subsets of the better and of the worse samples; it is right where it puts the
better one first.

    python -m experiments.metrics
    python -m experiments.metrics --config configs/edm_cifar10.yaml --extractor efficientnet_lite0
"""

from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from diffusion_lit.diffusion.images import from_uint8, to_uint8
from diffusion_lit.diffusion.rng import keyed_generator
from diffusion_lit.evaluation.features import Features
from diffusion_lit.evaluation.metrics import compute_metrics
from diffusion_lit.modules.load import load_module
from experiments.harness.evaluator import Evaluator
from experiments.harness.show import image_rows
from experiments.harness.study import QUIET, Study, main

MORE_IS_BETTER = ("precision", "recall", "density", "coverage", "isc")
RIGHT = 0.95  # share of right answers from which two sets count as distinguished


def metrics(
    study: Study,
    counts: list[int] = [50, 100, 200, 400, 800],  # noqa: B006 (never changed)
    draws: int = 16,
    few_steps: int = 4,
    noise: float = 0.08,
    left_out: int = 0,
) -> None:
    """Which figure tells better from worse with the fewest samples?

    Ranks samples of a model against worse ones of known kinds by every figure, at several numbers of samples.

    Args:
        study: Where it works.
        counts: Numbers of samples, of which the last is drawn of each kind, half as many again.
        draws: Pairs of random subsets that each share of right answers is taken over.
        few_steps: Sampling steps of the samples that have too few.
        noise: Standard deviation of the added noise, in [-1, 1].
        left_out: Number of the class that is left out.
    """
    steps = int(study.value("trainer.max_steps"))
    short = max(1, steps // 4)
    trained = study.fit({"model": {}, "a quarter": {"trainer.max_steps": short, "trainer.val_check_interval": short}})
    evaluator = study.evaluator(trained)
    module: Any = load_module(trained["model"].ckpt_path)
    classes = module.num_classes
    total = max(counts) * 3 // 2
    labels = torch.arange(total) % classes if classes else None

    def draw(name: str, labels: Tensor | None, **changes: Any) -> Tensor:
        study.tell(name)
        sampling = module.sampling.replace(**changes)
        samples = study.draw(trained["a quarter" if "quarter" in name else "model"], evaluator, sampling, labels, total)
        return samples.images

    better = draw("model", labels)
    shaken = from_uint8(better)
    shaken = shaken + noise * torch.randn(shaken.shape, generator=keyed_generator("metrics"))
    kinds = {
        "a quarter of the training": draw("a quarter", labels),
        f"{few_steps} steps": draw(f"{few_steps} steps", labels, num_steps=few_steps),
        f"noise of {noise:g}": to_uint8(shaken),
    }
    if labels is not None and classes > 1:
        others = torch.tensor([label for label in range(classes) if label != left_out])
        kinds[f"without class {left_out}"] = draw("without a class", others[torch.arange(total) % (classes - 1)])
    features = {name: evaluator.extractor.extract(images, 250) for name, images in {"better": better, **kinds}.items()}
    shares = right_answers(features, evaluator, counts, draws)
    rows = [{"figure": figure, **{kind: needed(shares[figure][kind], counts) for kind in kinds}} for figure in shares]
    study.table(
        "samples", rows, f"Samples from which {RIGHT:.0%} of the comparisons are right at all larger numbers too."
    )
    study.figure("right", draw_shares(shares, counts, list(kinds)), "Share of right answers against samples.")
    shown = {"better": better[:12], **{name: images[:12] for name, images in kinds.items()}}
    study.figure("samples", image_rows(shown), "The better samples, and the worse ones of the same seeds.")
    scores = {figure: sum(sum(by.values()) for by in kind.values()) for figure, kind in shares.items()}
    most = max(scores, key=lambda figure: scores[figure])
    best = next(row for row in rows if row["figure"] == most)
    told = ", ".join(f"{kind}: {best[kind]}" for kind in kinds)
    study.finding(
        f"Over all kinds and numbers {most} is right most often ({scores[most] / len(kinds) / len(counts):.0%}); it "
        f"needs so many samples: {told}."
    )


def right_answers(
    features: dict[str, Features], evaluator: Evaluator, counts: list[int], draws: int
) -> dict[str, dict[str, dict[int, float]]]:
    """How often each figure puts the better samples first.

    Args:
        features: Those of the better samples under "better", and of worse ones by their kind.
        evaluator: What they are measured by.
        counts: Numbers of samples.
        draws: Pairs of subsets for each number.

    Returns:
        Shares in [0, 1] by figure, kind and number; a figure that is not to be had of so few counts as a half.
    """
    reference = evaluator.reference
    values: dict[str, dict[int, list[dict[str, float]]]] = {}
    for name, some in features.items():
        generator = keyed_generator("metrics", name)
        values[name] = {
            count: [
                compute_metrics(
                    evaluator.extractor, some[torch.randperm(len(some), generator=generator)[:count]], reference
                )
                for _ in range(draws)
            ]
            for count in counts
        }
    figures = list(values["better"][max(counts)][0])
    kinds = [name for name in features if name != "better"]
    return {
        figure: {
            kind: {count: _share(values["better"][count], values[kind][count], figure) for count in counts}
            for kind in kinds
        }
        for figure in figures
    }


def _share(better: list[dict[str, float]], worse: list[dict[str, float]], figure: str) -> float:
    """The share of all pairs in which a figure is right, a tie counting half."""
    if figure not in better[0]:
        return 0.5
    sign = 1 if figure.startswith(MORE_IS_BETTER) else -1
    one, other = (
        torch.tensor([sign * values[figure] for values in some], dtype=torch.float64) for some in (better, worse)
    )
    gaps = one[:, None] - other[None]
    return float(((gaps > 0).double() + 0.5 * (gaps == 0)).mean())


def needed(shares: dict[int, float], counts: list[int]) -> str:
    """The smallest number from which the answers are right at it and all larger ones, in words."""
    enough = None
    for count in sorted(counts, reverse=True):
        if shares[count] < RIGHT:
            break
        enough = count
    return f"more than {max(counts)}" if enough is None else str(enough)


def draw_shares(shares: dict[str, dict[str, dict[int, float]]], counts: list[int], kinds: list[str]) -> plt.Figure:
    """Right answers against the number of samples, a panel per kind and a line per figure.

    Args:
        shares: As of `right_answers`.
        counts: Numbers of samples.
        kinds: The kinds.
    """
    figure, panels = plt.subplots(
        1, len(kinds), figsize=(3.6 * len(kinds), 4), layout="constrained", squeeze=False, sharey=True
    )
    for axes, kind in zip(panels[0], kinds, strict=True):
        for index, (name, by) in enumerate(shares.items()):
            style = ("-", "--", ":")[index // 5 % 3]
            axes.plot(counts, [by[kind][count] for count in counts], style, marker="o", markersize=3, label=name)
        axes.axhline(0.5, color="grey", linewidth=0.8)
        axes.set(xscale="log", xlabel="samples", title=kind, ylim=(0, 1.03))
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xticks([], minor=True)
        axes.grid(True, alpha=0.3)
    panels[0, 0].set_ylabel("share of right answers")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    return figure


if __name__ == "__main__":
    SMALL = {**QUIET, "trainer.max_steps": 600, "model.init_args.sampling.num_steps": 9}
    main(metrics, "configs/edm_digits.yaml", SMALL, num_samples=800)
