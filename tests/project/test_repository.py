"""What stands around the code says what is so: versions, the lock file, the workflows, the image."""

import json
import re
import shlex
import shutil
import tomllib
import zipfile
from pathlib import Path

import check_wheel
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import diffusion_lit
from diffusion_lit.commands.main import COMMANDS

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


def jobs_of_ci():
    return yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]


def test_ci_tries_every_python_that_is_claimed_and_the_wheel_and_continuous_integration_here_too():
    claimed = {one.rsplit(" ", 1)[1] for one in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d", one)}
    jobs = jobs_of_ci()
    matrix = jobs["test"]["strategy"]["matrix"]
    assert set(matrix["python"]) == claimed and matrix["include"][0]["dependencies"] == "lowest-direct"
    runs = "\n".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    assert "tools/check_wheel.py --dependencies install" in runs and "--cov" in runs
    assert "\nmake wheel\n" in (ROOT / ".ci/run").read_text()
    release = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
    assert release["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text()


def test_what_the_workflows_run_is_there():
    """Every line that a workflow runs: a target of the Makefile, a file of the repository, a module of a dependency."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    files = {"python", ".venv/bin/python", "uv", "touch", "test", "OMP_NUM_THREADS=1", "make"}
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        for name, job in yaml.safe_load(path.read_text())["jobs"].items():
            assert job["runs-on"] == "ubuntu-latest" and (job.get("timeout-minutes") or name == "publish")
            for step in job["steps"]:
                assert "run" in step or re.fullmatch(r"[\w-]+/[\w-]+@(?:v\d+|release/v\d+)", step["uses"])
                for line in step.get("run", "").splitlines():
                    words = shlex.split(re.sub(r"\$\{\{.*?\}\}", "X", line))
                    assert words[0] in files, line
                    if "--resolution" in words:  # the lowest version of what has no bound is the first that ever was
                        wanted = words[words.index("--editable") + 1 :]
                        assert all(word.startswith(".[") or ">=" in word for word in wanted), line
                    if words[0] == "make":
                        assert set(words[1:]) <= targets, line
                    for word in words:
                        assert not word.startswith("tools/") or (ROOT / word).is_file(), line


def test_every_yaml_of_the_repository_is_one():
    for path in [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]:
        assert isinstance(yaml.safe_load(path.read_text()), dict), path


def kept_for_the_image():
    """What docker is given of the repository's folder, by .dockerignore: it leaves out all but some."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[0] == "*"
    return [line[1:] for line in lines if line.startswith("!")]


def test_the_image_is_made_of_what_is_there():
    """It was not built: there is no docker here."""
    text = (ROOT / "Dockerfile").read_text()
    steps = [line.split(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
    assert [name for name, _ in steps] == ["FROM", "WORKDIR", "COPY", "RUN", "WORKDIR", "ENV", "ENTRYPOINT", "CMD"]
    step = dict(steps)
    assert step["COPY"] == ". ." and all((ROOT / name).exists() for name in kept_for_the_image())
    python = re.fullmatch(r"python:(3\.\d+)-slim", step["FROM"])[1]
    assert python in jobs_of_ci()["test"]["strategy"]["matrix"]["python"]
    install, version = step["RUN"].split(" && ")
    words = shlex.split(install)
    assert words[words.index("--constraint") + 1] == "requirements.lock"
    assert set(words[-1].removeprefix(".[").removesuffix("]").split(",")) <= set(PROJECT["optional-dependencies"])
    (command,) = json.loads(step["ENTRYPOINT"])
    assert version.split()[0] == command and command in PROJECT["scripts"]
    assert json.loads(step["CMD"])[0] in COMMANDS
    (config,) = re.findall(r"diffusion-lit fit --config (\w+)", text)
    assert (ROOT / f"configs/{config}.yaml").is_file()


def test_the_image_holds_the_whole_package(tmp_path):
    """What docker is given builds into a wheel with every file of the package."""
    given = [path for path in check_wheel.tracked(ROOT) if path.parts[0] in kept_for_the_image()]
    for path in given:
        (tmp_path / "tree" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, tmp_path / "tree" / path)
    wheel = tmp_path / check_wheel._built("build_wheel", tmp_path / "tree", tmp_path)
    wanted = {path.as_posix() for path in given if path.parts[0] in ("diffusion_lit", "datamodules")}
    wanted |= {f"diffusion_lit/{path.as_posix()}" for path in given if path.parts[0] == "configs"}
    with zipfile.ZipFile(wheel) as file:
        assert wanted == {name for name in file.namelist() if ".dist-info/" not in name}
