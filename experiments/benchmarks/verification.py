"""Verifies receipts of the speedrun by repeating as much of them as is needed."""

import json
import math
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from types import NoneType
from typing import Any

from diffusion_lit.storage.hashing import key_of
from diffusion_lit.storage.trust import check, naming
from diffusion_lit.words import article
from experiments.benchmarks.entries import Entry, check_entry, read_entry
from experiments.benchmarks.fit_training import own_part
from experiments.benchmarks.seeds import figures_of, machine_of, summary_of, train
from experiments.benchmarks.tracks import TRACKS, Judge, Track
from experiments.benchmarks.trainings import BEFORE, Training

ELSEWHERE = 0.02  # of a figure, on other hardware
ROUNDING = 1e-6
NUMBER = (int, float)
RECEIPT: dict[str, Any] = {
    **dict.fromkeys(("track", "entry", "versions", "hardware", "extractor", "summary"), dict),
    **{"images": str, "real_against_real": (dict, NoneType), "runs": list, "sha256": str},
}
RUN: dict[str, Any] = {
    **dict.fromkeys(("seed", "steps", "images", "batch_size", "planned"), int),
    **{"seconds": NUMBER, "before": (int, NoneType), "hashes": dict, "evaluations": dict, "figures": dict},
}
HASHES: dict[str, Any] = {"first": (str, NoneType), "end": str}
ENTRY: dict[str, Any] = {
    **dict.fromkeys(("name", "contender", "module"), str),
    **{"config": (dict, NoneType), "options": dict, "width": int, "batch_size": int, "code": (str, NoneType)},
}


def verify_receipt(
    path: Path,
    root: str | None,
    weights: str | None,
    entry: str | None = None,
    retrain: bool = False,
    trust: bool = False,
) -> dict[str, Any]:
    """Repeats as much of a receipt as is needed to verify it.

    Args:
        path: The receipt.
        root: Folder of the track's data.
        weights: File of the extractor's weights, where it needs one.
        entry: The entry that it is said to be of.
        retrain: Whether trainings whose states are missing are done again as a whole.
        trust: Whether code and foreign classes in it are run.

    Raises:
        ValueError: If it does not hold, with all that differs.
    """
    receipt = read_receipt(path)
    name, track, told = receipt["track"].get("name"), known_track(receipt), Entry(**receipt["entry"])
    if track is None:
        raise ValueError(f"{path} is of a track {name} other than this version's, so that its figures do not compare.")
    if entry is not None and read_entry(entry, name).key != told.key:
        raise ValueError(f"{path} is the receipt of another config than {entry}.")
    if not trust:
        check_code(path, told)
    check_entry(told, path)
    seeds = [one["seed"] for one in receipt["runs"]]
    if seeds != list(track.seeds):
        raise ValueError(f"{path} has the seeds {seeds}, and the track {name} has {list(track.seeds)}.")
    alike = machine_of(track) == receipt["hardware"]
    if not alike:
        print(f"{path} is of other hardware or another torch: figures may differ by {ELSEWHERE:.0%}, bits do.")
    data = track.make_data(root, 1)
    found = Verification(path.parent, Judge(track, data, weights), alike)
    found.conditions(receipt, data.fingerprint("train"))
    for one in receipt["runs"]:
        found.seed(one, Training(told, track, one["seed"], root), retrain)
    found.summary(receipt)
    if found.wrong:
        raise ValueError(f"{path} does not hold: {'; '.join(found.wrong)}.")
    print(f"{path} holds{'' if alike else ', as far as other hardware can tell'}.")
    return dict(receipt)


def seal(receipt: dict[str, Any]) -> str:
    """The hash that a receipt holds of all else in it."""
    return key_of({key: value for key, value in receipt.items() if key != "sha256"})


def read_receipt(path: Path) -> dict[str, Any]:
    """Reads a receipt, whose values have the right types then.

    Args:
        path: The receipt.

    Raises:
        ValueError: If it cannot be read, is not JSON, or a value is missing or of another type.
    """
    try:
        receipt: dict[str, Any] = json.loads(path.read_text())
        _check_receipt(receipt)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no receipt of a speedrun of this version: {error}.") from error
    return receipt


def _check_receipt(receipt: Any) -> None:
    """Refuses values that are missing or of another type."""
    _check_types(receipt, RECEIPT, "it")
    entry, summary = receipt["entry"], receipt["summary"]
    _check_types(entry, ENTRY, "its entry")
    if odd := entry.keys() - ENTRY.keys():
        raise ValueError(f"its entry has a {min(odd)!r}")
    if not receipt["runs"]:
        raise ValueError("it has no runs")
    for one in receipt["runs"]:
        _check_types(one, RUN, "a run")
        _check_types(one["hashes"], HASHES, "the hashes of a run")
        _check_types(one["figures"], dict.fromkeys(one["figures"], NUMBER), "the figures of a run")
    _check_types(summary, dict.fromkeys(summary, dict), "its summary")
    for kind, values in (*summary.items(), ("real_against_real", receipt["real_against_real"] or {})):
        _check_types(values, dict.fromkeys(values, (*NUMBER, NoneType)), f"its {kind}")


def _check_types(value: Any, types: dict[str, Any], what: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {article(value)}, where names and values are needed")
    for name, kind in types.items():
        if name not in value:
            raise ValueError(f"{what} has no {name!r}")
        if not isinstance(value[name], kind) or isinstance(value[name], bool):
            raise ValueError(f"{what} has a {name!r} that is {value[name]!r:.40}")


def known_track(receipt: dict[str, Any]) -> Track | None:
    """The track of a receipt, None where this version has no such one."""
    told = receipt["track"]
    track = TRACKS.get(str(told.get("name")))
    same = track is not None and json.loads(json.dumps({**asdict(track), "key": track.key}))
    return track if same == {key: value for key, value in told.items() if key != "name"} else None


def check_code(path: Path, entry: Entry) -> None:
    """Refuses a receipt that would run code of others.

    Raises:
        ValueError: If it holds a Python file, or its config names a class that is not of this project or torch.
    """
    if entry.code is not None:
        raise ValueError(f"{path} holds the Python file {entry.module}.py; read it, and give --trust true to run it.")
    with naming(f"The receipt {path}"):
        check([own_part(entry), entry.options])


class Verification:
    """The findings on a receipt.

    Args:
        folder: Where it lies.
        judge: Measures samples.
        alike: Whether this machine has the same hardware as the receipt's.

    Attributes:
        wrong: A phrase on each thing that differs.
    """

    def __init__(self, folder: Path, judge: Judge, alike: bool) -> None:
        self.folder = folder
        self.judge = judge
        self.alike = alike
        self.wrong: list[str] = []

    def same(self, what: str, told: Any, found: Any) -> None:
        """Compares two values."""
        if told != found:
            self.wrong.append(f"{what} is {told} in the receipt and {found} when done again")

    def same_figure(self, what: str, told: float | None, found: float | None) -> None:
        """Compares two figures: up to the rounding of a sum, or on other hardware up to `ELSEWHERE`."""
        if told is None or found is None:
            self.same(what, told, found)
        elif not math.isclose(told, found, rel_tol=ROUNDING if self.alike else ELSEWHERE, abs_tol=ROUNDING):
            self.wrong.append(f"the figure of {what} is {told:.6g} in the receipt and {found:.6g} when measured again")

    def conditions(self, receipt: dict[str, Any], images: str) -> None:
        """Compares what needs no training.

        Args:
            receipt: The receipt.
            images: Hash of the training images.
        """
        if receipt["sha256"] != seal(receipt):
            self.wrong.append("it was changed after it was written, as its own hash says")
        self.same("the hash of the training images", receipt["images"], images)
        self.same("the extractor", receipt["extractor"], self.judge.extractor.identity())
        floor = None if self.judge.floor is None else self.judge.floor[0]
        self.same_figure("real images", (receipt["real_against_real"] or {}).get("figure"), floor)

    def summary(self, receipt: dict[str, Any]) -> None:
        """Compares the means and deviations with the figures that they are of."""
        for kind, values in summary_of(receipt["runs"]).items():
            for what, value in values.items():
                self.same_figure(f"{what} {kind}", receipt["summary"].get(kind, {}).get(what), value)

    def seed(self, told: dict[str, Any], training: Training, retrain: bool) -> None:
        """Repeats a training's first and last steps, and its samples.

        Args:
            told: What the receipt says of it.
            training: The training.
            retrain: Whether it is done as a whole where its states are missing.
        """
        seed, place = training.seed, self.folder / f"seed_{training.seed}"
        whole = replace(training, planned=told["planned"], stop=told["steps"])
        before = training.state(place, BEFORE)
        with tempfile.TemporaryDirectory() as scratch:
            if told["before"] is None or (retrain and not before.exists()):
                self.part(told, "all", whole, Path(scratch))
            else:
                first = replace(whole, stop=training.track.replayed, draws=False)
                self.part(told, "first", first, Path(scratch) / "first")
                if before.exists():
                    self.part(told, "last", replace(whole, resume=before), Path(scratch) / "last")
                else:
                    self.wrong.append(f"{before} is missing, so that no figure can be checked; --retrain makes it")
        if training.track.minutes * 60 * 1.02 + 1 < told["seconds"]:
            self.wrong.append(f"seed {seed} trained for {told['seconds']:.0f} s, and the track has less")

    def part(self, told: dict[str, Any], which: str, training: Training, place: Path) -> None:
        """Repeats a part of a training.

        Args:
            told: What the receipt says of the training.
            which: `first`, `last` or `all` of its steps.
            training: The part.
            place: Folder for it.
        """
        found, seed = train(place, training), training.seed
        print(f"seed {seed}: {which} steps are done again, {found['seconds']:.0f} s")
        if which != "last" and self.alike:
            what = f"the hash of seed {seed}'s weights after the first steps"
            self.same(what, told["hashes"]["first"], found["hashes"]["first"])
        if which != "first":
            if self.alike:
                self.same(f"the hash of seed {seed}'s last state", told["hashes"]["end"], found["hashes"]["end"])
            for key in ("steps", "images", "batch_size", "evaluations"):
                self.same(f"seed {seed}'s {key}", told[key], found[key])
            again = figures_of(place, self.judge)
            for kind in told["figures"] | again:
                self.same_figure(f"seed {seed} {kind}", told["figures"].get(kind), again.get(kind))
