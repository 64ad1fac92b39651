"""One leaderboard of many models, each with its receipt, and a check against torch-fidelity's own command.

Configs that have no run yet are trained first; a checkpoint whose receipt is there already is not measured again. Rows
compare within one table, which holds one data set, one extractor and one number of samples.

    python -m experiments.benchmarks.fid_benchmark --configs configs/edm_digits.yaml,configs/ddpm_digits.yaml
    python -m experiments.benchmarks.fid_benchmark --checkpoints a.ckpt,b.ckpt --num_samples 10000 --extractor inception
    python -m experiments.benchmarks.fid_benchmark --checkpoints a.ckpt --parity random

`--parity` gives torch-fidelity's command a folder of PNG files of a model's samples and one of the reference, and
compares its FID, KID, precision, recall and Inception score with ours: with the weights in a file, or with `random`
ones of the same architecture, which mean nothing but prove the resize and the arithmetic on a machine without internet.
"""

import csv
import json
import subprocess
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from diffusion_lit.commands.evaluate import evaluate
from diffusion_lit.commands.evaluate_plan import Plan
from diffusion_lit.report.receipt_tables import setting_name, shown
from diffusion_lit.storage.hashing import file_hash
from diffusion_lit.storage.runs import find_last
from diffusion_lit.words import short_count
from experiments.benchmarks.parity import compare_with_command
from experiments.harness.command import command
from experiments.harness.runs import COMMAND
from experiments.harness.show import markdown

COLUMNS = ("model", "setting", "nfe", "step", "figure", "precision", "recall", "floor", "seconds", "sha256")


def fid_benchmark(
    configs: str | None = None,
    checkpoints: str | None = None,
    num_samples: int = 1000,
    num_blocks: int = 3,
    extractor: str = "auto",
    extractor_weights: str | None = None,
    reference: str = "train",
    fit_options: str = "",
    parity: str | None = None,
    parity_samples: int = 64,
    batch_size: int = 64,
    devices: int = 1,
    accelerator: str = "auto",
    out: str = "runs/studies/fid_benchmark",
) -> None:
    """Measures models and ranks them.

    Args:
        configs: Configs, separated by commas; the newest run of each is measured, or made where there is none. Without
            checkpoints either, configs/edm_digits.yaml and configs/ddpm_digits.yaml.
        checkpoints: Checkpoint files, separated by commas.
        num_samples: Samples in each block.
        num_blocks: Blocks, for the error bars.
        extractor: As in diffusion-lit evaluate.
        extractor_weights: As in diffusion-lit evaluate.
        reference: Split to compare with.
        fit_options: Further options of diffusion-lit fit for configs without a run, such as "--trainer.max_steps 500".
        parity: Compares with torch-fidelity's command: a file of Inception's weights, or `random`.
        parity_samples: Samples, and images of the reference, that this comparison takes.
        batch_size: Samples drawn at a time.
        devices: Number of processes.
        accelerator: auto, cpu, gpu, ...
        out: Folder for the receipts, leaderboard.md, leaderboard.csv and parity.md.
    """
    folder = Path(out)
    if configs is None and checkpoints is None:
        configs = "configs/edm_digits.yaml,configs/ddpm_digits.yaml"
    paths = [checkpoint_of(Path(config), fit_options) for config in _words(configs)]
    paths += [Path(path) for path in _words(checkpoints)]
    plan = Plan(
        num_samples=num_samples,
        num_blocks=num_blocks,
        extractor=extractor,
        extractor_weights=extractor_weights,
        reference=reference,
        batch_size=batch_size,
        device=accelerator,
    )
    receipts = folder / "receipts"
    reports = {name: measured(path, name, receipts, plan, devices) for name, path in named(paths).items()}
    (folder / "leaderboard.md").write_text(leaderboard(reports))
    write_csv(reports, folder / "leaderboard.csv")
    print((folder / "leaderboard.md").read_text())
    if parity is not None:
        page = compare_with_command(paths[0], parity, parity_samples, folder, batch_size, accelerator)
        (folder / "parity.md").write_text(page)
        print(page)


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def checkpoint_of(config: Path, fit_options: str) -> Path:
    """The last checkpoint of a config's newest run, trained now where there is none."""
    run = Path("runs") / config.stem
    try:
        return find_last(run)
    except ValueError:
        subprocess.run([*COMMAND, "fit", f"--config={config}", *fit_options.split()], check=True)
        return find_last(run)


def named(paths: list[Path]) -> dict[str, Path]:
    """Checkpoints by their names in the table.

    Args:
        paths: The checkpoints; one that is named twice counts once.

    Returns:
        Names such as `edm_digits/version_0`, with `/best` behind it for another than the last checkpoint of a run; the
        file's name outside of a run, and the whole path of files that have one name.
    """
    distinct = {path.resolve(): path for path in paths}
    names = {path: model_name(whole) for whole, path in distinct.items()}
    often = Counter(names.values())
    return {name if often[name] == 1 else str(path.with_suffix("")): path for path, name in names.items()}


def model_name(path: Path) -> str:
    """A checkpoint's own name: that of its run and version, or of its file.

    Returns:
        Such as `edm_digits/version_0`.
    """
    if path.parent.name != "checkpoints":
        return path.stem
    version = path.parents[1]
    return f"{version.parent.name}/{version.name}" + (f"/{path.stem}" if path.stem != "last" else "")


def measured(path: Path, name: str, folder: Path, plan: Plan, devices: int) -> dict[str, Any]:
    """A checkpoint's report; one made before with the same options is reused.

    Args:
        path: The checkpoint.
        name: Its name in the table.
        folder: Where reports go.
        plan: The options of `evaluate`, except for the checkpoint and the report's name.
        devices: Number of processes.
    """
    report = folder / f"{name.replace('/', '_')}.json"
    note = report.with_suffix(".options")
    options = {key: value for key, value in asdict(plan).items() if key not in ("out", "batch_size", "device")}
    wanted = json.dumps({**options, "ckpt_path": file_hash(path)}, sort_keys=True)
    if not (report.exists() and note.exists() and note.read_text() == wanted):
        evaluate(replace(plan, ckpt_path=str(path), out=str(report)), devices)
        note.write_text(wanted)
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def rows(reports: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each table, best first."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for model, report in reports.items():
        extractor, samples = report["extractor"], report["samples"]
        for name, reference in report["references"].items():
            metric = f"{extractor['metric']}_{short_count(samples['num_samples'])}"
            weights = f" (weights {extractor['weights_sha256'][:12]})" if extractor["weights_sha256"] else ""
            title = f"{report['data']['class'].rsplit('.', 1)[1]}, {metric}{weights} against {name}"
            for result in report["results"]:
                found = result["references"][name]["figures"]
                floor = reference.get("floor")
                tables.setdefault(title, []).append(
                    {
                        "model": model,
                        "setting": setting_name(result),
                        "nfe": result["nfe"],
                        "step": report["checkpoint"]["step"],
                        "figure": found[extractor["metric"]],
                        "precision": found.get(f"precision_{extractor['name']}"),
                        "recall": found.get(f"recall_{extractor['name']}"),
                        "floor": floor["figures"][extractor["metric"]] if floor else None,
                        "seconds": report["run"]["sampling_seconds"] / (samples["num_samples"] * samples["num_blocks"]),
                        "sha256": report["checkpoint"]["sha256"][:12],
                    }
                )
    return {title: sorted(table, key=lambda row: row["figure"]["mean"]) for title, table in tables.items()}


def leaderboard(reports: dict[str, dict[str, Any]]) -> str:
    """The tables as Markdown."""
    lines = ["# Leaderboard", "", "Mean ± standard deviation over blocks of samples (minimum); lower is better.", ""]
    for title, table in rows(reports).items():
        told = [
            {
                "model": row["model"],
                "setting": row["setting"],
                "NFE": row["nfe"],
                "step": row["step"],
                "distance": shown(row["figure"], "fd_"),
                **{name: shown(row[name], name) if row[name] else "" for name in ("precision", "recall")},
                "s per sample": f"{row['seconds']:.3g}",
            }
            for row in table
        ]
        if table[0]["floor"]:
            told.append({"model": "real against real", "distance": shown(table[0]["floor"], "fd_")})
        lines += [f"## {title}", "", markdown(told)]
    return "\n".join(lines)


def write_csv(reports: dict[str, dict[str, Any]], path: Path) -> None:
    """The tables as one CSV file, a row per model and setting."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["table", *COLUMNS, "figure_std", "figure_min"])
        for title, table in rows(reports).items():
            for row in table:
                means = [row[name]["mean"] if isinstance(row[name], dict) else row[name] for name in COLUMNS]
                writer.writerow([title, *means, row["figure"]["std"], row["figure"]["min"]])


if __name__ == "__main__":
    command(fid_benchmark)
