"""Each command of docs/scaling.md, run on CPU ranks as it is printed, with small limits added."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.configs_tools import DATA, write_images
from helpers.project_files import ROOT

BLOCKS = re.findall(r"```\n(.*?)```", Path(ROOT, "docs/scaling.md").read_text(), re.DOTALL)
LINES = [line for block in BLOCKS if "#!" not in block for line in block.replace("\\\n", "").splitlines()]
STREAMED = [line for line in LINES if "chunks" in line]
COMMANDS = [line for line in LINES if line not in STREAMED]
FIT = [
    *["--trainer.accelerator=cpu", "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.callbacks=[]"],
    *["--data.init_args.batch_size=8", "--model.init_args.net.init_args.model_channels=16", "--sample_grid.columns=1"],
    *["--model.init_args.net.init_args.num_blocks=1", "--model.init_args.sampling.num_steps=2"],
]
MORE = {
    "sample": ["--device=cpu", "--num_samples=8", "--num_steps=2"],
    "evaluate": ["--accelerator=cpu", "--num_samples=8", "--num_blocks=1", "--extractor=pixels", "--num_steps=2"],
}


def words(command, folder, data):
    """The command line: as printed, then the limits."""
    given = shlex.split(command)
    if given[0] == "python":
        return [sys.executable, *given[1:]]
    verb = next(word for word in given if word in ("fit", *MORE))
    more = [*FIT, *data] if verb == "fit" else MORE[verb]
    if given[0] == "torchrun":
        given = [sys.executable, "-m", "torch.distributed.run", *given[1:]]
    else:
        given[0] = str(folder / ".venv/bin/diffusion-lit")
    return [word.replace("NODE0", "localhost") for word in given] + more


def environment(folder):
    """Variables of a process, and the installed command in the folder."""
    (folder / ".venv/bin").mkdir(parents=True)
    script = folder / ".venv/bin/diffusion-lit"
    script.write_text(f"#!{sys.executable}\nfrom diffusion_lit.commands.main import main\nmain()\n")
    script.chmod(0o755)
    return {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}


@pytest.mark.slow
def test_every_command_runs_as_it_is_printed(tmp_path):
    env = environment(tmp_path)
    data = DATA["CIFAR10"](tmp_path / "data")
    assert len(COMMANDS) == 7
    for command in COMMANDS:
        nodes = 2 if "--nnodes 2" in command else 1
        line = words(command, tmp_path, data)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running = [subprocess.Popen(line, cwd=tmp_path, env=env, **pipes) for _ in range(nodes)]
        try:
            for process in running:
                said = process.communicate(timeout=300)[0]
                assert process.returncode == 0, (command, said[-3000:])
        finally:
            for process in running:
                process.kill()
    folders = sorted(path.name for path in (tmp_path / "runs/edm_cifar10").iterdir())
    assert folders == ["version_0", "version_1", "version_2"]
    assert all(list((tmp_path / "runs/edm_cifar10" / name / "samples").glob("*.png")) for name in folders)
    assert (tmp_path / "runs/samples/grid.png").exists() and (tmp_path / "runs/evaluations/report.json").exists()


@pytest.mark.slow
def test_chunks_are_written_trained_with_and_measured_as_it_is_printed(tmp_path):
    pytest.importorskip("litdata")
    env = environment(tmp_path)
    write_images(tmp_path / "photos", count=120)
    assert len(STREAMED) == 3
    for command in STREAMED:
        line = words(command, tmp_path, [])  # at 64x64 the pixels are too many for a covariance
        line = [word.replace("=pixels", "=efficientnet_lite0") for word in line]
        run = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, (command, run.stderr[-3000:])
    assert len(list((tmp_path / "chunks").glob("*/items.dat"))) == 3
    assert list((tmp_path / "runs/edm_folder/version_0/samples").glob("*.png"))
    assert (tmp_path / "runs/evaluations/report.json").exists()
