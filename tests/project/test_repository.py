"""What stands around the code says what is so: versions, the lock file, the workflows, the image."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import diffusion_lit

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements():
    """Everything that pyproject.toml names, extras included."""
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    return [one for one in map(Requirement, [*PROJECT["dependencies"], *extras]) if one.name != "diffusion-lit"]


def test_the_version_is_the_same_everywhere():
    version = diffusion_lit.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
    assert PROJECT["dynamic"] == ["version"]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_file_has_a_version_that_suits_of_every_dependency(python):
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text and "-index" not in text
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    locked = {}
    for line in filter(None, text.splitlines()):
        one = Requirement(line)
        if one.marker is None or one.marker.evaluate(environment):
            locked[canonicalize_name(one.name)] = next(iter(one.specifier)).version
    for one in requirements():
        if one.marker is None or one.marker.evaluate({**environment, "extra": ""}):
            assert one.specifier.contains(locked[canonicalize_name(one.name)]), one


def test_ci_tries_every_python_that_is_claimed_and_the_wheel_and_continuous_integration_here_too():
    claimed = {one.rsplit(" ", 1)[1] for one in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d", one)}
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    matrix = jobs["test"]["strategy"]["matrix"]
    assert set(matrix["python"]) == claimed and matrix["include"][0]["dependencies"] == "lowest-direct"
    runs = "\n".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    assert "tools/check_wheel.py --dependencies install" in runs and "--cov" in runs
    assert "\nmake wheel\n" in (ROOT / ".ci/run").read_text()
    release = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
    assert release["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text()


def test_every_yaml_of_the_repository_is_one():
    for path in [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]:
        assert isinstance(yaml.safe_load(path.read_text()), dict), path


def test_the_image_is_given_every_file_that_the_installation_needs():
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((ROOT / name).exists() for name in kept)
    needed = {"pyproject.toml", "setup.py", PROJECT["readme"], *PROJECT["license-files"], "requirements.lock"}
    assert needed | {"configs", "datamodules", "diffusion_lit"} <= set(kept)
    install = next(line for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("RUN"))
    (wanted,) = [word for word in shlex.split(install) if word.startswith(".[")]
    assert set(wanted[2:-1].split(",")) <= set(PROJECT["optional-dependencies"])
