"""A sweep of one's own: a YAML says what is varied, `diffusion-lit fit` trains each variant, and a table compares them.

    config: configs/ddpm_digits.yaml                      # the experiment
    options: {trainer.max_steps: 400}                     # what all variants share beside it
    grid:                                                 # every combination of these
      model.init_args.optimizer.init_args.lr: [0.01, 0.001, 0.0001]
    runs:                                                 # and each of these, by name; none or one of the two will do
      linear: {model.init_args.schedule: diffusion_lit.diffusion.LinearSchedule}
      cosine: {model.init_args.schedule: diffusion_lit.diffusion.CosineSchedule}

    python -m experiments.sweep --config my_sweep.yaml --jobs 2

Options are named as on the command line of `diffusion-lit fit`. Interrupted and started again it goes on; changed, it
trains what is new. Each run's parameters and metrics are in TensorBoard's HParams tab (`make board`), and the table,
the curves and the last samples of each on one page under `runs/studies/`.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import yaml
from PIL import Image

from diffusion_lit.commands.configs import find_config
from experiments.harness.runs import Trained, grid, label_of
from experiments.harness.study import Study, main

KNOWN = ("config", "options", "grid", "runs")


def sweep(study: Study, metric: str = "val/loss") -> None:
    """Which of these variants is best?

    Trains every variant that a YAML names and compares what they logged at last.

    Args:
        study: Where it works.
        metric: What decides, lower being better: a name of what is logged, such as fd_classifier_1k.
    """
    rows: list[dict[str, Any]] = []
    curves = {}
    config, shared, variants = read(find_config(study.config))
    study.options = {**shared, **study.options}
    trained = study.fit(variants, config)
    for name, run in trained.items():
        if metric not in run.metrics:
            raise ValueError(f"The run {name} logged no {metric}; choose one of {', '.join(sorted(run.metrics))}.")
        others = {key: value for key, value in run.metrics.items() if key not in ("epoch", metric)}
        rows.append({"run": name, metric: run.metrics[metric], **others, "seconds": run.seconds})
        curves[name] = run.curves[metric]
    columns = [name for name in rows[0] if all(name in row for row in rows)]
    study.table("table", [{name: row[name] for name in columns} for row in rows], "What each run logged at last.")
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, (steps, values) in curves.items():
        axes.plot(steps, values, marker="o", markersize=3, label=name)
    axes.set(xlabel="training step", ylabel=metric)
    axes.legend(fontsize=8)
    axes.grid(True, alpha=0.3)
    study.figure("curves", figure, f"{metric} along the training of each run.")
    for run in trained.values():
        show_samples(study, run)
    best = min(rows, key=lambda row: row[metric])
    study.finding(f"Of {len(rows)} variants {best['run']} has the lowest {metric}, {best[metric]:.4g}.")


def show_samples(study: Study, run: Trained) -> None:
    """Puts the last grid of samples that a training drew on the page."""
    grids = sorted((run.folder / "samples").glob("*.png"))
    if grids:
        with Image.open(grids[-1]) as image:
            study.images(f"samples_{run.run.name}", image.copy(), f"Samples of {run.run.name} at its end.")


def read(path: Path) -> tuple[str, dict[str, Any], dict[str, dict[str, Any]]]:
    """Reads a sweep.

    Args:
        path: The YAML.

    Returns:
        The config, the options that all variants share, and those of each variant by its name.

    Raises:
        ValueError: If the file is not a sweep, or has a key that sweeps do not have.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as a sweep: {error}") from error
    if not isinstance(content, dict) or "config" not in content:
        raise ValueError(f"{path} is no sweep; it needs a line such as config: configs/ddpm_digits.yaml.")
    for name in content:
        if name not in KNOWN:
            raise ValueError(f"{path} says {name}, but a sweep has {', '.join(KNOWN)}.")
    for name in ("options", "grid", "runs"):
        _check_mapping(name, content.get(name), path)
    for name, options in (content.get("runs") or {}).items():
        _check_mapping(f"runs: {name}", options, path)
    for name, values in (content.get("grid") or {}).items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path} says grid: {name}: {values}, but a list of values stands there, such as [1, 2].")
    named = content.get("runs") or {"": {}}
    variants = {}
    for name, options in named.items():
        for values in grid(content.get("grid") or {}):
            label = ",".join(part for part in (name, label_of(values) if values else "") if part) or path.stem
            variants[label] = {**(options or {}), **values}
    return content["config"], content.get("options") or {}, variants


def _check_mapping(name: str, value: Any, path: Path) -> None:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{path} says {name}: {value}, but options stand there, such as trainer.max_steps: 100.")


if __name__ == "__main__":
    main(sweep, "configs/studies/sweep.yaml")
