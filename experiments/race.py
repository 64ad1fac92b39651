"""The race: variants of a config compete for the same time of the clock on your data, and half of them go on.

    python -m experiments.race --config configs/edm_fashion_mnist.yaml --hours 6 --data.init_args.root FOLDER
    python -m experiments.race --config my.yaml --hours 2 --variants my_variants.yaml

The variants stand in a YAML as for `experiments.sweep` (`configs/studies/race.yaml` by default): each is what differs
from the config. In each round every variant is trained from scratch for the same time, one after the other and never
two at once, with a schedule as long as that time, and measured: the kernel distance of its samples to the training
images (unbiased, so that few samples do), with the standard error over blocks of samples, or over seeds in the last
round. The better half and the config itself go on, for twice the time. The last round has `--finalists` variants, all
of them together as one more, and `--seeds` seeds.

The race ends in `winner.yaml`, which `diffusion-lit fit --config` takes, and in a page that says of each variant
whether it helped, against the config in the same round. Interrupted, the same command goes on with the training that
was not finished. A variant that fails is told and leaves the race. Where the hours are over before the last round is,
that of before decides.
"""

import math
import statistics
import time
from dataclasses import replace
from typing import Any

import matplotlib.pyplot as plt
import yaml

from diffusion_lit.checks import check_count, check_number
from diffusion_lit.commands.configs import find_config
from diffusion_lit.evaluation.features import Features
from diffusion_lit.report.facts import magnitude
from diffusion_lit.storage.atomic import atomic
from experiments.benchmarks.entries import Entry
from experiments.benchmarks.seeds import TrainingFailed, samples_in, train_once
from experiments.benchmarks.tracks import Judge, Track
from experiments.benchmarks.trainings import GUIDED, Training
from experiments.harness.configs import merge, read_config
from experiments.harness.evaluator import BATCH
from experiments.harness.halving import BASE, SIGNIFICANT, Result, Round, combined, plan, survivors
from experiments.harness.runs import Run, Trained
from experiments.harness.study import Study, main
from experiments.look_at_data import statistics as statistics_of
from experiments.look_at_data import suggest
from experiments.sweep import read

TOGETHER = "all finalists together"
BLOCKS = 4  # of samples, for the standard error
VERDICTS = {
    "helps": "What helped",
    "hurts": "What hurt",
    "no difference seen": f"What made no difference that {SIGNIFICANT:g} standard errors show",
}


def race(
    study: Study,
    hours: float = 1.0,
    variants: str = "configs/studies/race.yaml",
    finalists: int = 3,
    seeds: int = 3,
) -> None:
    """Which of these variants is best after the same time?

    Variants of a config compete at equal time of the clock by successive halving.

    Args:
        study: Where it works.
        hours: How long the race may take as a whole.
        variants: A YAML as for experiments.sweep.
        finalists: Variants in the last round.
        seeds: Seeds of each in the last round.
    """
    check_number(above=0, hours=hours)
    check_count(finalists=finalists, seeds=seeds)
    if study.setup.jobs != 1 or study.setup.gpus:
        raise ValueError("A race trains one variant at a time, since two would take each other's time; leave --jobs.")
    _, shared, given = read(find_config(variants))
    if BASE in given or TOGETHER in given:
        raise ValueError(f"{variants} calls a variant {BASE!r} or {TOGETHER!r}, which the race does itself; rename it.")
    runner = Runner(study, {**shared, **study.options}, hours)
    field = {BASE: {}, **runner.levels_of_data(), **given}
    rounds = plan(len(field), hours, finalists, seeds)
    history: list[dict[str, Result]] = []
    for number, current in enumerate(rounds):
        if number:
            field = survivors(field, history[-1], current.count)
        if number == len(rounds) - 1 and len(field) > 2:
            field = {**field, TOGETHER: combined(field, history[-1] if history else {})}
        study.tell(f"round {number + 1} of {len(rounds)}: {len(field)} variants, {current.minutes:.3g} minutes each")
        results = runner.round(field, current)
        if results is None:
            study.text(f"The {hours:g} hours were over in round {number + 1} of {len(rounds)}, which does not count.")
            break
        if BASE not in results:
            if not history:
                raise ValueError("The config itself cannot be trained, so that there is nothing to compare with.")
            study.text(f"The config itself failed in round {number + 1}, which does not count.")
            break
        history.append(results)
    if not history:
        raise ValueError(f"{hours:g} hours do not hold a single round of {len(field)} variants; give more.")
    report(runner, history)


class Runner:
    """Trains and measures.

    Args:
        study: Where it works.
        shared: Options of all variants.
        hours: How long all may take.
    """

    def __init__(self, study: Study, shared: dict[str, Any], hours: float) -> None:
        self.study = study
        self.shared = shared
        self.hours = hours
        of_data = {name: value for name, value in shared.items() if name.startswith("data.")}
        self.config = merge(read_config(find_config(study.config)), of_data)
        data = self.config.get("data") or {}
        arguments = data.get("init_args") or {}
        if "batch_size" not in arguments:
            raise ValueError(f"{study.config} has no data.init_args.batch_size; give --data.init_args.batch_size.")
        self.track = Track(
            str(data.get("class_path")),
            0.0,
            {key: value for key, value in arguments.items() if key != "batch_size"},
            device=study.device.type,
            threads=None,
            num_samples=study.setup.num_samples,
            evaluations=10**6,
            extractor=study.setup.extractor,
            metric="kd",
            replayed=10**6,
        )
        self.data = self.track.make_data(None, 1)
        self.judge = Judge(self.track, self.data, study.setup.extractor_weights)
        self.spent = 0.0  # seconds, those of trainings that were there already included

    def levels_of_data(self) -> dict[str, dict[str, Any]]:
        """The variant of EDM's settings that the data suggests (`look_at_data`); none of another model."""
        if not str(self.shared.get("model.class_path", self.config["model"]["class_path"])).endswith("EDM"):
            return {}
        images = self.data.reference_images("train")
        found = suggest(statistics_of(images).sigma_data, images.shape[-1])
        scaling = {"class_path": "diffusion_lit.diffusion.EDMPreconditioning"}
        levels = {"class_path": "diffusion_lit.diffusion.LogNormal"}
        return {
            f"levels of the data, P_mean {found.P_mean:.2f}": {
                "model.init_args.scaling": {**scaling, "init_args": {"sigma_data": round(found.sigma_data, 3)}},
                "model.init_args.noise_levels": {
                    **levels,
                    "init_args": {"P_mean": round(found.P_mean, 3), "P_std": found.P_std},
                },
            }
        }

    def round(self, field: dict[str, dict[str, Any]], current: Round) -> dict[str, Result] | None:
        """Trains and measures all that take part.

        Returns:
            The results by variant, without those that failed; none where the config itself failed, with which all
            others are compared; None where the hours are over.
        """
        found = {}
        for name, options in field.items():
            made = [self.trained(name, options, current.minutes, seed) for seed in range(current.seeds)]
            if any(one is None for one in made):
                return None
            if name == BASE and not all(made):
                return {}
            if all(made):
                found[name] = self.result(name, options, current, [one for one in made if one])
        return found

    def trained(self, name: str, options: dict[str, Any], minutes: float, seed: int) -> dict[str, Any] | None:
        """A training with its figures, `{}` where it failed, None where the hours are over."""
        track = replace(self.track, minutes=minutes)
        entry = Entry(name, self.config, {**self.shared, **options})
        training = Training(entry, track, seed, None, minutes, unguided=False)
        plain = "".join(letter if letter.isalnum() or letter in "=.,-" else "_" for letter in name)
        place = self.study.folder / "runs" / f"{plain}-{entry.key[:8]}" / f"{minutes:.4g}_minutes_{seed}"
        record = place / "wall.txt"
        if not record.exists() and self.spent > 3600 * self.hours:
            return None
        begun = time.perf_counter()
        try:
            facts = train_once(place, training)
        except TrainingFailed as error:
            self.study.text(f"{name} failed and left the race: {error}")
            self.study.tell(f"{name} failed and left the race; its message stands above.")
            self.spent += time.perf_counter() - begun
            return {}
        features = self.judge.extractor.extract(samples_in(place)[GUIDED], BATCH).features
        figures = [self.judge.distance(Features(block)) for block in features.chunk(BLOCKS)]
        if not record.exists():
            record.write_text(f"{time.perf_counter() - begun}")
        self.spent += float(record.read_text())
        self.study.tell(f"{name}, seed {seed}: {self.judge.metric} {statistics.mean(figures):.4g}")
        name = f"{name}, seed {seed}, {minutes:.3g} minutes"
        self.study.trained[name] = Trained(Run(name, self.study.config, options), place, facts["seconds"])
        return {**facts, "figures": figures, "place": place}

    def result(self, name: str, options: dict[str, Any], current: Round, made: list[dict[str, Any]]) -> Result:
        """The figure of a variant with its error: over seeds where there are several, and at least that of samples."""
        means = [statistics.mean(one["figures"]) for one in made]
        errors = [statistics.stdev(one["figures"]) / BLOCKS**0.5 for one in made]
        error = math.sqrt(sum(value**2 for value in errors)) / len(made)
        if len(means) > 1:
            error = max(error, statistics.stdev(means) / len(means) ** 0.5)
        images = statistics.mean(one["images"] for one in made)
        figure, first = statistics.mean(means), made[0]
        return Result(name, current.minutes, figure, error, images, first["place"], options, first["batch_size"])


def report(runner: Runner, history: list[dict[str, Result]]) -> None:
    """Writes the config of the winner, and fills the page."""
    study, metric = runner.study, runner.judge.metric
    best, base = min(history[-1].values(), key=lambda one: one.figure), history[-1][BASE]
    write_winner(runner, best)
    study.finding(
        f"After {best.minutes:.3g} minutes each, {best.name} is best with {metric} {best.figure:.4g} ± "
        f"{best.error:.2g}, {BASE} {base.figure:.4g} ± {base.error:.2g}; its config is winner.yaml."
    )
    latest = {one.name: (number, one) for number, results in enumerate(history) for one in results.values()}
    rows = []
    for name, (number, one) in sorted(latest.items(), key=lambda pair: (-pair[1][0], pair[1][1].figure)):
        then = history[number][BASE]
        verdict = "" if name == BASE else one.against(then)
        told = {"variant": name, "round": number + 1, "minutes": f"{one.minutes:.3g}"}
        told |= {"images": magnitude(round(one.images)), metric: one.figure, "error": one.error}
        rows.append({**told, f"{metric}, {BASE}": then.figure, "verdict": verdict})
    for verdict, words in VERDICTS.items():
        names = ", ".join(str(row["variant"]) for row in rows if row["verdict"] == verdict)
        study.text(f"{words}: {names or 'nothing'}.")
    floor = runner.judge.floor
    study.table(
        "race",
        rows,
        f"The last round of each; {study.setup.num_samples} samples; standard errors over {BLOCKS} blocks of samples, "
        f"or over seeds where that is more; real images {'were too few' if floor is None else f'get {floor[0]:.3g}'}.",
    )
    study.figure("race", drawing(history, metric), "More time for fewer variants from round to round.")
    for kind, one in {"winner": best, "config": base}.items():
        study.images(f"samples_{kind}", samples_in(one.place)[GUIDED][:40], f"Samples of {one.name}.")


def write_winner(runner: Runner, best: Result) -> None:
    """Writes the winner's config, as long as it was trained."""
    steps = round(best.images / best.batch_size)
    merged = merge(runner.config, {**runner.shared, **best.options, "trainer.max_steps": steps})
    figure = f"{runner.judge.metric} {best.figure:.4g} +- {best.error:.2g}"
    head = (
        f"# {runner.study.config} with the variant {best.name!r}, the winner of\n#     {runner.study.command}\n"
        f"# {figure} after {best.minutes:.3g} minutes, {steps} steps\n"
    )
    with atomic(runner.study.folder / "winner.yaml") as file:
        file.write((head + yaml.safe_dump(merged, sort_keys=False)).encode())


def drawing(history: list[dict[str, Result]], metric: str) -> plt.Figure:
    """The figure of each variant in each round."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for name in dict.fromkeys(name for results in history for name in results):
        took = [results[name] for results in history if name in results]
        values, errors = [one.figure for one in took], [one.error for one in took]
        style: dict[str, Any] = {"color": "black", "linewidth": 2.5} if name == BASE else {}
        axes.errorbar([one.minutes for one in took], values, errors, marker="o", capsize=3, label=name, **style)
    axes.set(xlabel="minutes of training", ylabel=metric, xscale="log", yscale="symlog")
    axes.legend(fontsize=7)
    axes.grid(True, alpha=0.3)
    return figure


if __name__ == "__main__":
    main(race, "configs/edm_digits.yaml", num_samples=600)
