"""The script that plants wrong coefficients: what it plants, what it reports, and a handful planted for real."""

import subprocess
import sys
from pathlib import Path

import mutation
import pytest

SCRIPT = Path(mutation.__file__)


def test_it_changes_arithmetic_one_place_at_a_time():
    planted = list(mutation.mutants(f"{mutation.CORE}/samplers/common.py"))
    changes = {(mutant.function, mutant.before, mutant.after) for mutant in planted}
    assert ("euler_step", "x0_hat + ratio * (x - x0_hat)", "x0_hat - ratio * (x - x0_hat)") in changes
    assert ("euler_step", "ratio * (x - x0_hat)", "ratio / (x - x0_hat)") in changes
    assert ("ancestral_split", "(sigma_next / sigma) ** 2", "(sigma_next / sigma) ** 2.1") in changes
    assert len({mutant.source for mutant in planted}) == len(planted)
    for mutant in planted:
        compile(mutant.source, mutant.path, "exec")


@pytest.mark.medium
def test_every_sampler_and_every_prediction_type_is_covered():
    functions = {mutant.function.split(".")[0] for path in mutation.TESTS for mutant in mutation.mutants(path)}
    assert {"ddpm", "_first_order", "euler", "heun", "dpmpp_2s_ancestral", "dpmpp_2m", "dpmpp_2m_sde"} <= functions
    assert {"unipc", "_unified_step", "_unified_weights", "STAGES", "rk45", "ancestral_split"} <= functions
    assert {
        "EDMPreconditioning",
        "EpsPreconditioning",
        "VPreconditioning",
        "X0Preconditioning",
        "FlowPreconditioning",
    } <= functions


def test_a_survivor_is_reported(capsys):
    mutant = mutation.Mutant(
        f"{mutation.CORE}/preconditioning.py", "VPreconditioning.coefficients", 3, "a + b", "a - b", ""
    )
    assert mutation.report([(mutant, "caught"), (mutant, "hangs")])
    assert not mutation.report([(mutant, "caught"), (mutant, "survived")])
    assert (
        "survived: diffusion_lit/diffusion/preconditioning.py:3 VPreconditioning.coefficients: a + b  ->  a - b"
        in capsys.readouterr().out
    )


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_wrong_coefficients_are_caught():
    done = run("--only", "euler_step")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "survived" not in done.stdout


@pytest.mark.medium
def test_a_name_without_arithmetic_is_refused():
    done = run("--only", "no_such_function")
    assert done.returncode == 1
    assert "No arithmetic to change in no_such_function" in done.stderr


@pytest.mark.slow
def test_all_wrong_coefficients_are_caught():
    done = run("--jobs", "2")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
