"""Old command lines of the benchmarks run what lies in their folder now."""

import subprocess
import sys
from pathlib import Path

import pytest

import experiments

FOLDER = Path(experiments.__file__).parent
BENCHMARKS = sorted(path.stem for path in (FOLDER / "benchmarks").glob("*.py"))
COMMANDS = [name for name in BENCHMARKS if "__main__" in (FOLDER / "benchmarks" / f"{name}.py").read_text()]


def test_every_benchmark_is_known():
    wanted = {"data_throughput", "plan", "profile_step", "throughput", "time_to_quality", "torture"}
    assert wanted <= set(COMMANDS)


@pytest.mark.medium
@pytest.mark.parametrize("name", ["experiments.torture", "experiments.benchmarks.torture"])
def test_a_benchmark_runs_by_its_old_and_its_new_name(name):
    words = [sys.executable, "-m", name, "--help"]
    done = subprocess.run(words, cwd=FOLDER.parent, capture_output=True, text=True, check=True)
    assert "--kills" in done.stdout


def test_a_study_of_ones_own_finds_the_harness_by_its_old_name():
    from experiments.study import QUIET, Study, main

    assert Study.__module__ == "experiments.study"
    assert callable(main)
    assert QUIET["trainer.callbacks"] == []
