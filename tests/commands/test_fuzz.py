"""Mistakes by the hundred: whatever stands in a configuration or a command line gives a result or a sentence.

`FUZZ` is the number of cases of each kind, `FUZZ_SEED` what they are drawn from.
"""

import json
import os
import subprocess
import sys

import pytest
from helpers import fuzz
from helpers.project_files import ROOT
from helpers.runs import FIT, LAST

LONGEST = 400  # characters of a sentence
SEED, COUNT = int(os.environ.get("FUZZ_SEED", "0")), int(os.environ.get("FUZZ", "200"))


def outcomes(cases, folder):
    """What became of each case, tried in processes of its own kind: one that dies costs its case alone."""
    listed, told = folder / "cases.json", folder / "outcomes.jsonl"
    listed.write_text(json.dumps(cases))
    told.touch()
    while (done := len(told.read_text().splitlines())) < len(cases):
        env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/tests", "CUDA_VISIBLE_DEVICES": ""}
        words = ["-c", "from helpers.fuzz import run; run('cases.json', 'outcomes.jsonl')"]
        ended = subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True)
        if len(told.read_text().splitlines()) < len(cases):
            at = len(told.read_text().splitlines())
            with told.open("a") as file:
                died = {"line": cases[at], "status": f"died: {ended.returncode}", "said": "", "peak": 0.0}
                file.write(json.dumps(died) + "\n")
        assert len(told.read_text().splitlines()) > done
    return [json.loads(line) for line in told.read_text().splitlines()]


def check(tried, folder):
    wrong = [
        (case["line"], case["status"], case["said"][-600:])
        for case in tried
        if not (case["status"] in (0, 130) or (case["status"] == 2 and 0 < len(fuzz.told(case["said"])) <= LONGEST))
        or "Traceback" in case["said"]
    ]
    assert tried[0]["status"] == 0, tried[0]  # the case without a mistake
    assert not wrong, json.dumps(wrong[:10], indent=1)
    assert max(case["peak"] for case in tried) < 4
    assert not list(folder.rglob("PWNED"))
    assert sum(case["status"] == 2 for case in tried) > len(tried) // 4  # they were mistakes


@pytest.mark.slow
def test_200_configurations_with_mistakes_give_a_result_or_a_sentence(tmp_path):
    check(outcomes(list(fuzz.config_cases(SEED, COUNT, tmp_path)), tmp_path), tmp_path)


@pytest.mark.slow
def test_200_command_lines_with_mistakes_give_a_result_or_a_sentence(lightning, tmp_path):
    lightning(*FIT, "--trainer.max_steps=1")
    cases = fuzz.line_cases(SEED, COUNT, tmp_path, tmp_path / LAST)
    check(outcomes(list(cases), tmp_path), tmp_path)


def test_what_a_command_told_is_all_from_its_own_line_on():
    """Warnings before it are left out, and nothing after it, so that a page is seen as one."""
    assert fuzz.told("a warning: diffusion-lit: x\ndiffusion-lit: lr is x. Choose diffusion-lit: one.\n") == (
        "lr is x. Choose diffusion-lit: one."
    )
    page = "x" * 300
    assert len(fuzz.told(f"diffusion-lit: first {page}\ndiffusion-lit: second {page}")) > LONGEST
    assert fuzz.told("warning\nTraceback (most recent call last):\n") == ""
