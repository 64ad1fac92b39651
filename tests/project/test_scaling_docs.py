"""Each command of docs/scaling.md, run on CPU ranks as it is printed, with small limits added."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.configs_tools import DATA
from helpers.project_files import ROOT

BLOCKS = re.findall(r"```\n(.*?)```", Path(ROOT, "docs/scaling.md").read_text(), re.DOTALL)
COMMANDS = [line for block in BLOCKS if "#!" not in block for line in block.replace("\\\n", "").splitlines()]
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
    verb = next(word for word in given if word in ("fit", *MORE))
    more = [*FIT, *data] if verb == "fit" else MORE[verb]
    if given[0] == "torchrun":
        given = [sys.executable, "-m", "torch.distributed.run", *given[1:]]
    else:
        given[0] = str(folder / ".venv/bin/diffusion-lit")
    return [word.replace("NODE0", "localhost") for word in given] + more


@pytest.mark.slow
def test_every_command_runs_as_it_is_printed(tmp_path):
    (tmp_path / ".venv/bin").mkdir(parents=True)
    script = tmp_path / ".venv/bin/diffusion-lit"
    script.write_text(f"#!{sys.executable}\nfrom diffusion_lit.commands.main import main\nmain()\n")
    script.chmod(0o755)
    env = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
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
