"""README.md and the site's first page: two screens, and every command in them runs as printed, with limits added."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from helpers.configs_tools import write_images
from helpers.project_files import ROOT

from diffusion_lit.commands.main import COMMANDS, TRAINING, main

README = Path(ROOT, "README.md").read_text()
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LIMITS = {
    "fit": [
        *["--trainer.accelerator=cpu", "--trainer.max_steps=4", "--trainer.val_check_interval=2"],
        *["--data.init_args.batch_size=8", "--model.init_args.net.init_args.model_channels=8"],
        *["--model.init_args.sampling.num_steps=2", "--sample_grid.rows=1", "--trajectory.count=1"],
        *["--trainer.callbacks=[]", "--trainer.limit_val_batches=1"],
    ],
    "sample": ["--device=cpu", "--num_steps=2", "--num_samples=20"],
    "evaluate": ["--accelerator=cpu", "--num_steps=2", "--num_samples=80", "--num_blocks=2", "--extractor=pixels"],
}


def printed(text):
    """The command lines of a page, without comments."""
    lines = [line for kind, block in BLOCK.findall(text) if not kind for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines]


def test_the_readme_has_two_screens_with_what_a_reader_looks_for():
    assert len(README.splitlines()) <= 105
    titles = re.findall(r"^## (.*)", README, re.MULTILINE)
    for title in ("Install", "First run", "Your own images in five minutes", "Commands", "Three definitions"):
        assert title in titles
    table = README.partition("\n## Commands\n")[2].partition("\n## ")[0]
    for command in (*TRAINING, *COMMANDS):
        assert f"`{command}`" in table, command


def test_what_installs_and_makes_is_there():
    extras = tomllib.loads(Path(ROOT, "pyproject.toml").read_text())["project"]["optional-dependencies"]
    targets = re.findall(r"^([a-z-]+):", Path(ROOT, "Makefile").read_text(), re.MULTILINE)
    seen = set()
    for program, *words in printed(README):
        seen.add(program)
        if program == "pip":
            assert words[0] == "install"
            for word in words[1:]:
                asked = re.fullmatch(r"\.(?:\[(.*)\])?", word)
                assert asked or word == "-c" or Path(ROOT, word).is_file(), word
                assert asked is None or set((asked[1] or "dev").split(",")) <= extras.keys()
        elif program == "make":
            assert words[0] in targets
    assert seen == {"pip", "make", "diffusion-lit"}


@pytest.mark.medium
def test_every_command_of_the_readme_and_of_the_first_page_runs(lightning, tmp_path):
    write_images(tmp_path / "my_images", count=40)
    ran = []
    for page in (README, Path(ROOT, "docs/index.md").read_text()):
        for program, *words in printed(page):
            if program == "diffusion-lit":
                more = [
                    word.replace("=4", "=6") if "--ckpt_path" in words else word for word in LIMITS.get(words[0], [])
                ]
                main([*words, *more])
                ran.append(words[0])
    assert [ran.count(name) for name in ("fit", "sample", "evaluate", "report", "configs")] == [4, 2, 2, 2, 1]
    (code,) = (block for kind, block in BLOCK.findall(README) if kind == "python")
    exec(compile(code, "README.md", "exec"), {})
    versions = [f"runs/{name}" for name in ("edm_digits/version_0", "edm_digits/version_1", "edm_folder/version_0")]
    made = [*(f"{version}/checkpoints/last.ckpt" for version in versions), "runs/edm_digits/version_0/report.html"]
    made += ["runs/samples/grid.png", "runs/evaluations/report.json", "edm_folder.yaml", "digits.png"]
    assert [name for name in made if not (tmp_path / name).is_file()] == []
