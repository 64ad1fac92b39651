"""The script that checks a GPU: what it prints, writes and ends with, whatever its checks say."""

import json
import re

import check_gpu
import pytest
import torch


def test_a_check_passes_fails_or_is_skipped_and_the_figures_are_there_when_it_is_cut_short(
    tmp_path, monkeypatch, capsys
):
    def measure(check):
        check.figures["pace"] = 3.0
        return "3 images/s"

    def fail(check):
        assert json.loads(out.read_text())["pace"] == 3.0
        raise RuntimeError("no such kernel")

    def skip(check):
        raise check_gpu.Skip("pip install it")

    def late(check):
        raise AssertionError("there was no time left")

    def wait(check):
        check.until = 0.0
        return ""

    out = tmp_path / "found.json"
    checks = {"fit": measure, "bad": fail, "none": skip, "wait": wait, "late": late}
    monkeypatch.setattr(check_gpu, "CHECKS", checks)
    with pytest.raises(SystemExit) as ended:
        check_gpu.main("cpu", str(out))
    assert ended.value.code == 1
    said = capsys.readouterr().out
    words = ["PASS fit", "FAIL bad", "SKIP none", "PASS wait", "SKIP late"]
    assert [" ".join(line.split()[:2]) for line in said.splitlines()[:5]] == words
    assert "no such kernel" in said and "2 of 5 passed" in said
    found = json.loads(out.read_text())
    assert found["torch"] == torch.__version__ and found["device"] == "cpu" and found["pace"] == 3.0
    assert {name: one["result"] for name, one in found["checks"].items()} == dict(line.split()[::-1] for line in words)
    with pytest.raises(SystemExit) as ended:
        check_gpu.main("cpu", str(out), only="wait")
    assert ended.value.code == 0 and list(json.loads(out.read_text())["checks"]) == ["fit", "wait"]
    with pytest.raises(SystemExit, match="no check 'sped'"):
        check_gpu.main("cpu", str(out), only="sped")


def test_packages_that_are_lacking_are_named_at_once(monkeypatch):
    assert check_gpu.lacking() == [] and check_gpu.lacking("no-such-package>=2") == ["no-such-package>=2"]

    def version(name):
        if name in ("jsonargparse", "einops"):
            raise check_gpu.PackageNotFoundError(name)

    monkeypatch.setattr(check_gpu, "version", version)
    assert [re.split(r"\W", one)[0] for one in check_gpu.lacking()] == ["einops", "jsonargparse"]


def test_its_first_lines_name_what_a_bare_machine_lacks(monkeypatch):
    monkeypatch.setattr(check_gpu, "version", lambda name: (_ for _ in ()).throw(check_gpu.PackageNotFoundError(name)))
    needed = {re.split(r"[^\w-]", one)[0] for one in check_gpu.lacking("diffusers")} - {"torch"}
    assert all(name in check_gpu.__doc__ for name in needed)
