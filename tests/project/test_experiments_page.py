"""docs/experiments-by-command.md: every command runs in its smallest form (test_docs.py parses them all)."""

import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
from helpers.configs_tools import write_celeba, write_cifar_folders, write_images
from helpers.pretrained_models import save_if
from helpers.project_files import ROOT, write_idx
from jsonargparse import ArgumentParser
from PIL import Image

from diffusion_lit.commands import main as cli
from diffusion_lit.commands.options import SamplingOptions
from experiments.harness import runs

PAGE = Path(ROOT, "docs/experiments-by-command.md").read_text()
COMMANDS = re.findall(r"^\| [^|]+ \| `([^`]+)` \|", PAGE, re.MULTILINE)
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
ONE = ["--sample_grid.rows=1", "--sample_grid.columns=1", "--trajectory.count=1", "--loss_by_noise_level.batches=0"]
SHORT = [*QUIET, *ONE, "--data.init_args.batch_size=4", "--trainer.limit_val_batches=1"]
LENGTH = ["--trainer.max_steps=2", "--trainer.val_check_interval=2"]
FEW = ["--model.init_args.sampling.num_steps=2"]
ROOTS = {"mnist": "idx", "cifar": "cifar", "celeba": "celeba", "landscapes": "images", "folder": "images"}
NEEDED = ("edm_digits", "edm_fashion_mnist")  # runs that other rows use and no row trains
SMALLEST = {  # options of a command that stand in the place of the page's, or beside them
    "sample": ["--num_samples=2", "--num_steps=2", "--device=cpu"],
    "edit": ["--device=cpu", "--num_steps=2"],
    "img2img": ["--starts=[0,1]"],
    "denoise": ["--shown_steps=[1]"],
    "guidance": ["--cfg_scales=[1,7]"],
    "learning_rates": ["--rates=[0.001]", "--data.init_args.batch_size=4", "--data.init_args.image_size=16"],
    "noise_cutoff": ["--num_steps=4", "--until=[0,4]"],
    "single_step_denoiser": ["--epochs=[1,2]", "--ddpm_epochs=[1,2]", "--held_out=16"],
    "capacity": ["--widths=[8,16]", "--seconds=0.1", "--data.init_args.batch_size=4"],
    "attention_ablation": ["--seconds=0.1"],
    "schedules": ["--num_steps=[24]", "--few=3"],
    "variance": ["--num_steps=4", "--scales=[0.5]"],
    "memorization": ["--counts=[1,16]"],
    "metrics": ["--counts=[10,20]", "--draws=2"],
}


def data(config):
    """The kind of tiny data that stands in for that of a config."""
    return next((kind for word, kind in ROOTS.items() if word in config), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiments")
    (folder / "configs").symlink_to(f"{ROOT}/configs")
    write_idx(folder / "idx")
    write_cifar_folders(folder / "cifar")
    write_celeba(folder / "celeba")
    write_images(folder / "images", count=120)  # so that several are held out
    Image.effect_noise((80, 96), 80).save(folder / "web.jpg")
    Image.new("L", (32, 32), 255).save(folder / "drawing.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 24))
    mask.save(folder / "mask.png")
    save_if(folder / "text_model")
    return folder


def smallest(command):
    """A command of the page as words, on tiny data, with few samples and steps."""
    words = [word.replace("DeepFloyd/IF-I-M-v1.0", "text_model") for word in shlex.split(command)]
    kind = next((data(word) for word in words if data(word)), None) if "--config" in words else None
    if "--data.init_args.root" in words:
        words[words.index("--data.init_args.root") + 1] = kind
    elif kind:
        words.append(f"--data.init_args.root={kind}")
    if words[1] == "fit":
        if "--trainer.max_epochs" in words:
            words[words.index("--trainer.max_epochs") + 1] = "1"
        words += SHORT + ([] if "--trainer.max_epochs" in words else LENGTH)
        words += [] if "vae" in command else FEW
        words += ["--data.init_args.val_size=8"] if kind in ("idx", "cifar") else []
        words += ["--trainer.callbacks=[]"] if "report" not in command else []
    elif words[0] == "python":
        words += [*QUIET, "--num_samples=20", "--extractor=pixels", "--device=cpu", "--batch_size=20"]
        words += [] if "single_step" in command else [*FEW, "--trainer.max_steps=2"]
    for name, options in SMALLEST.items():
        if name in (words[1], words[2].removeprefix("experiments.")):
            taken = {option.split("=")[0] for option in options}
            kept = [word for at, word in enumerate(words) if word not in taken and words[at - 1] not in taken]
            words = kept + options
    steps = {"forward", "interpolate"} & set(words[2:3])
    return [word for word in words if not (steps and word.startswith("--num_steps"))]


@pytest.mark.slow
def test_every_command_of_the_page_runs(folder, monkeypatch):
    """In the page's order, in this process; each run that a row needs is trained by the row of its config."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DIFFUSION_LIT_CACHE", str(folder / "cache"))
    here = runs.Children
    monkeypatch.setattr(here, "run", lambda self, command, stdout, **_: cli.main(command[len(runs.COMMAND) :]) or 0)
    failed = {}
    for command in [*(f"diffusion-lit fit --config {name}" for name in NEEDED), *COMMANDS]:
        words = smallest(command)
        try:
            if words[0] == "python":
                monkeypatch.setattr(sys, "argv", words[2:])
                runpy.run_module(words[2], run_name="__main__")
            else:
                cli.main(words[1:])
        except (Exception, SystemExit) as error:  # told together, each with its command
            if not isinstance(error, SystemExit) or error.code:
                failed[command] = error
    assert not failed, "\n".join(f"{command}: {error!r}" for command, error in failed.items())
    for made in ("runs/samples/grid.png", "runs/edits/guidance/figure.png", "runs/ddpm_mnist/version_1/report.html"):
        assert (folder / made).is_file(), made


def test_the_page_has_a_row_for_each_experiment():
    assert len(COMMANDS) == len(set(COMMANDS)) > 35
    assert PAGE.count("\n| ") == len(COMMANDS) + 2 * 4  # but for the heads of its four tables
    tasks = {words[2] for words in map(shlex.split, COMMANDS) if words[1] == "edit"}
    assert tasks == {"forward", "denoise", "img2img", "inpaint", "anagram", "hybrid", "guidance"}


def test_whole_numbers_of_options_stay_whole():
    """`noise_until` counts steps, and refuses 90.0."""
    parser = ArgumentParser()
    for name in ("sampler_options", "grid_options"):
        parser.add_argument(f"--{name}", type=get_type_hints(SamplingOptions)[name])
        read = getattr(parser.parse_args([f"--{name}", '{"noise_until": 90, "S_churn": 1.5, "on": true}']), name)
        assert [type(value) for value in read.values()] == [int, float, bool]
