"""`fit --init_from`: a run that starts from another's weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers.runs import FIT, LAST, NO_IMAGES, read, same_training, stopped

from diffusion_lit.report.run_page import RunPage

SIX = [*FIT, *NO_IMAGES, "--model.init_args.sampling.num_steps=1"]
FIRST = [*SIX, "--name=first", "--model.init_args.optimizer.init_args.lr=0.01"]
SOURCE = Path("runs/first/version_0/checkpoints/last.ckpt")
FROM = f"--init_from={SOURCE}"
STILL = "--model.init_args.optimizer.init_args.lr=0.0"  # so that the weights stay those that it started with


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of six steps with snapshots, and its export."""
    from diffusion_lit.commands.main import main

    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main([*FIRST, "--ema.half_life=null", "--ema.sigma_rel=[0.1]", "--ema.snapshot_every=6"])
        main(["export", "--ckpt_path", str(SOURCE), "--out=model"])
    return folder


@pytest.fixture
def here(first, lightning, tmp_path):
    shutil.copytree(first, tmp_path, dirs_exist_ok=True)
    return lightning


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.medium
def test_a_run_starts_from_another_and_everything_but_the_weights_begins_anew(here, capsys):
    before = read(SOURCE)
    assert not same(before["state_dict"], before["current_model_state"])
    here(*SIX, "--init_from=runs/first", STILL)
    said = capsys.readouterr().out
    run = read(LAST)
    assert same(run["current_model_state"], before["state_dict"]) and same(run["state_dict"], before["state_dict"])
    assert run["global_step"] == 6 and run["optimizer_states"][0]["state"][0]["step"] == 6
    record = run["diffusion_lit"]["init_from"]
    assert record["file"] == str(SOURCE) and record["step"] == 6 and record["weights"] == "average (EMA)"
    assert record["values"][0] == record["values"][1] == sum(p.numel() for p in before["state_dict"].values())
    assert f"Started from {SOURCE} (EDM, step 6, average (EMA), {record['sha256'][:12]})" in said and "anew" in said
    assert yaml.safe_load((LAST.parent.parent / "config.yaml").read_text())["init_from"] == str(SOURCE)
    here(*SIX, FROM, "--init_weights=raw", STILL, "--trainer.max_steps=1", "--name=raw")
    raw = read("runs/raw/version_0/checkpoints/last.ckpt")
    assert same(raw["current_model_state"], before["current_model_state"])
    assert "first weights" in RunPage(LAST.parent.parent).build().html()


@pytest.mark.medium
def test_it_goes_on_without_the_first_file_and_its_receipt_names_it(here, capsys):
    here(*SIX, FROM, "--name=unbroken", "--trainer.max_steps=4")
    here(*SIX, FROM, "--trainer.max_steps=2")
    digest = read(LAST)["diffusion_lit"]["init_from"]["sha256"]
    shutil.rmtree("runs/first")
    recipe = LAST.parent.parent / "config.yaml"
    here("fit", "--config", recipe, "--ckpt_path=last", "--trainer.max_steps=4")  # the recipe names the file
    assert same_training(read(LAST), read("runs/unbroken/version_0/checkpoints/last.ckpt"))
    assert read(LAST)["diffusion_lit"]["init_from"]["sha256"] == digest
    here("export", "--ckpt_path", LAST, "--out=again")
    assert json.loads(Path("again/model.json").read_text())["diffusion_lit"]["init_from"]["sha256"] == digest
    here(
        *["evaluate", "--ckpt_path", LAST, "--num_samples=20", "--num_blocks=1", "--extractor=pixels", "--device=cpu"],
        *["--num_steps=1", "--out=receipt.json"],
    )
    assert json.loads(Path("receipt.json").read_text())["checkpoint"]["init_from"]["sha256"] == digest
    assert f"Started from {SOURCE}" in Path("receipt.md").read_text()


@pytest.mark.medium
def test_exports_and_snapshots_are_sources_too(here):
    before = read(SOURCE)["state_dict"]
    snapshot = next(Path("runs/first/version_0/averages").glob("*.safetensors"))
    for number, path in enumerate(("model", "model/model.safetensors", snapshot)):
        here(*SIX, f"--init_from={path}", STILL, "--trainer.max_steps=1")
        run = read(f"runs/run/version_{number}/checkpoints/last.ckpt")
        assert same(run["current_model_state"], before), path


@pytest.mark.slow
def test_two_ranks_start_from_the_same_weights(here):
    torch.set_num_threads(1)
    here(*SIX, FROM, STILL, "--trainer.max_steps=2", "--trainer.devices=2", "--trainer.strategy=ddp_fork")
    run = read(LAST)
    assert same(run["current_model_state"], read(SOURCE)["state_dict"])
    assert run["diffusion_lit"]["init_from"]["file"] == str(SOURCE)


@pytest.mark.medium
def test_what_contradicts_or_cannot_be_used_is_told_in_a_sentence(here, capsys):
    def told(*args):
        return stopped(capsys, here, *args)

    assert "--ckpt_path" in told(*SIX, FROM, f"--ckpt_path={SOURCE}")
    assert "none.ckpt" in told(*SIX, "--init_from=none.ckpt")
    assert "runs/none" in told(*SIX, "--init_from=runs/none")
    assert "raw" in told(*SIX, "--init_weights=raw")
    assert "'middle'" in told(*SIX, FROM, "--init_weights=middle")
    assert "no raw" in told(*SIX, "--init_from=model", "--init_weights=raw")
    assert "does not train" in told("validate", *SIX[1:], FROM, f"--ckpt_path={SOURCE}")
    torch.save({"state_dict": {"a": Path("x")}}, "code.ckpt")
    assert "code.ckpt holds objects" in told(*SIX, "--init_from=code.ckpt")
    torch.save({"state_dict": {"net.encoder.weight": torch.zeros(2, 2)}}, "family.ckpt")
    assert "family.ckpt" in (said := told(*SIX, "--init_from=family.ckpt")) and "fits this run's EDM" in said
    assert not Path("runs/run").exists()  # nothing was left of them
