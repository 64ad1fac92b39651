"""Builds the sdist and from it the wheel, installs the wheel outside the tree, and runs the commands there.

    python tools/check_wheel.py [--dependencies install]

What is built is what git tracks, not what happens to lie in the folder. The wheel goes into an environment of its own
in a temporary folder: an editable install in the same environment would fill in what the wheel lacks. The dependencies
are those of the environment that this is run with, by path alone; with `--dependencies install` pip installs them.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAST = "runs/edm_digits/version_0/checkpoints/last.ckpt"
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
ORIGIN = """
import datamodules, diffusion_lit, importlib.util, sys
for module in (datamodules, diffusion_lit):
    assert module.__file__.startswith(sys.prefix), module.__file__
assert importlib.util.find_spec("experiments") is None
from diffusion_lit import SAMPLERS, Sampling, load_model
"""


def tracked(folder: Path) -> list[Path]:
    """The files that git tracks, relative to the repository's folder."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=folder, capture_output=True, check=True, text=True).stdout
    return [Path(name) for name in listed.split("\0") if name and (folder / name).is_file()]


def build(out: Path) -> tuple[Path, Path]:
    """Builds the sdist of the tracked files, and the wheel of the sdist.

    Args:
        out: Folder for both, and for what is unpacked on the way.

    Returns:
        Paths of the sdist and the wheel.
    """
    tree = out / "tree"
    for path in tracked(ROOT):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, tree / path)
    sdist = out / _built("build_sdist", tree, out)
    shutil.unpack_archive(sdist, out / "unpacked", filter="data")
    (source,) = (out / "unpacked").iterdir()
    return sdist, out / _built("build_wheel", source, out)


def _built(what: str, source: Path, out: Path) -> str:
    done = subprocess.run([sys.executable, "-c", BUILD, what, str(out)], cwd=source, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{what} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout.split()[-1]


def install(wheel: Path, folder: Path, dependencies: str) -> Path:
    """Installs the wheel into a new environment.

    Args:
        wheel: The file.
        folder: Where the environment is made.
        dependencies: `share` takes this environment's, `install` has pip install them.
    """
    venv.create(folder, with_pip=dependencies == "install")
    python = folder / "bin" / "python"
    if dependencies == "install":
        subprocess.run([python, "-m", "pip", "install", "--quiet", wheel], check=True)
        return python.parent
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--ignore-installed", str(wheel)], check=True)
    return python.parent


def commands(scripts: Path) -> list[list[str]]:
    """What a stranger does first, as command lines."""
    lit, python = str(scripts / "diffusion-lit"), str(scripts / "python")
    fit = ["fit", "--config", "edm_digits", "--trainer.max_steps=2", "--trainer.accelerator=cpu"]
    return [
        [python, "-c", ORIGIN],
        [lit, "--version"],
        [lit, "configs"],
        [lit, "configs", "--copy", "edm_cifar10"],
        [lit, "doctor"],
        [lit, *fit],
        [lit, "sample", "--ckpt_path", LAST, "--num_samples", "20", "--labels", "all", "--num_steps", "4"],
        [lit, "evaluate", "--ckpt_path", LAST, "--num_samples", "100", "--num_steps", "4"],
        [lit, "report", "--run", "runs/edm_digits"],
        [str(scripts / "lightning"), "--help"],
        [python, "-m", "diffusion_lit", "fit", "--config", "configs/ddpm_digits.yaml", "--print_config"],
    ]


def main() -> None:
    """Builds, installs and runs; the exit status is 1 where a command fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dependencies", choices=("share", "install"), default="share")
    parser.add_argument("--out", type=Path, help="folder that sdist and wheel are kept in")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sdist, wheel = build(folder)
        print(f"built {sdist.name} and {wheel.name}", flush=True)
        for built in (sdist, wheel) if options.out else ():
            options.out.mkdir(parents=True, exist_ok=True)
            shutil.copy(built, options.out)
        scripts = install(wheel, folder / "environment", options.dependencies)
        empty = folder / "empty"
        empty.mkdir()
        outside = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        for command in commands(scripts):
            start = time.perf_counter()
            done = subprocess.run(command, cwd=empty, env=outside, capture_output=True, text=True)
            shown = " ".join(word if len(word) < 80 else "..." for word in [Path(command[0]).name, *command[1:]])
            print(
                f"{'ok' if done.returncode == 0 else 'FAILED'}  {time.perf_counter() - start:5.1f} s  {shown}",
                flush=True,
            )
            if done.returncode:
                raise SystemExit(f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


if __name__ == "__main__":
    main()
