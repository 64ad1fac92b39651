"""Models as safetensors and JSON: the same samples, no pickle, and what is damaged is refused."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.marker import Marker
from helpers.runs import FIT, LAST, read
from safetensors.torch import load_file

from diffusion_lit.modules.load import load_data, load_module


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a few steps and its export."""
    from diffusion_lit.commands.main import main

    folder = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main([*FIT, "--model.init_args.sampling.num_steps=3"])
        main(["export", "--ckpt_path", str(LAST), "--out=model"])
    return folder


@pytest.fixture
def model(trained, tmp_path):
    return Path(shutil.copytree(trained / "model", tmp_path / "model"))


def test_an_export_holds_all_that_sampling_needs(trained, model):
    assert sorted(os.listdir(model)) == ["model.json", "model.safetensors"]
    checkpoint = read(trained / LAST)
    tensors = load_file(model / "model.safetensors")
    assert tensors.keys() == checkpoint["state_dict"].keys()
    assert all(torch.equal(value, checkpoint["state_dict"][name]) for name, value in tensors.items())
    record = json.loads((model / "model.json").read_text())
    assert record["module"] == "diffusion_lit.modules.edm.EDM"
    assert record["weights"] == "average (EMA)"
    assert record["image_shape"] == [1, 8, 8]
    assert record["class_names"] == [str(digit) for digit in range(10)]
    assert record["sampling"]["num_steps"] == 3
    assert record["global_step"] == 6
    assert load_data(model).batch_size == 16


def test_samples_of_the_export_are_those_of_the_checkpoint(trained, model, lightning):
    options = ["--num_samples=4", "--labels=1,2", "--device=cpu"]
    lightning("sample", "--ckpt_path", trained / LAST, "--out=a", *options)
    lightning("sample", "--ckpt_path", model, "--out=b", *options)
    assert np.array_equal(np.load("a/samples.npz")["arr_0"], np.load("b/samples.npz")["arr_0"])


def test_raw_weights_and_an_export_of_an_export(trained, lightning):
    lightning("export", "--ckpt_path", trained / LAST, "--out=raw", "--weights=raw")
    checkpoint = read(trained / LAST)
    tensors = load_file("raw/model.safetensors")
    assert all(torch.equal(value, checkpoint["current_model_state"][name]) for name, value in tensors.items())
    assert json.loads(Path("raw/model.json").read_text())["weights"] == "raw"
    lightning("export", "--ckpt_path", trained / "model", "--out=again")
    assert json.loads(Path("again/model.json").read_text())["weights"] == "average (EMA)"
    same = Path("again/model.safetensors").read_bytes() == (trained / "model/model.safetensors").read_bytes()
    assert same


@pytest.mark.medium
def test_the_receipt_of_an_export_says_what_was_exported(model, lightning):
    small = ["--num_samples=4", "--num_blocks=1", "--extractor=pixels", "--device=cpu"]
    lightning("evaluate", "--ckpt_path", model, "--out=report.json", *small)
    told = json.loads(Path("report.json").read_text())["checkpoint"]
    assert (told["step"], told["weights"]) == (6, "average (EMA), as exported")


def damage(model, how):
    weights, record = model / "model.safetensors", model / "model.json"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "json":
        record.write_text(record.read_text()[:-50])
    elif how == "another":
        record.write_text("[1, 2]")
    elif how == "class":
        values = json.loads(record.read_text())
        values["hyper_parameters"]["_class_path"] = "os.system"
        values.pop("record_crc32")  # as of an export of before, or of one who knows how it is computed
        record.write_text(json.dumps(values))
    elif how == "changed":
        record.write_text(record.read_text().replace('"global_step": ', '"global_step": 1'))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "is not the file that model.json beside it describes, or it is damaged"),
        ("json", "is damaged"),
        ("another", "is not a record of `diffusion-lit export`"),
        ("class", "os.system"),
        ("changed", "is damaged or was changed after it was written"),
    ],
)
def test_what_is_damaged_is_refused(model, how, message):
    damage(model, how)
    with pytest.raises(ValueError, match=message):
        load_module(model)


def test_a_pickle_in_place_of_the_weights_does_not_run(model, tmp_path):
    import hashlib

    bad = pickle.dumps(Marker(tmp_path / "it_ran"))
    (model / "model.safetensors").write_bytes(bad)
    values = json.loads((model / "model.json").read_text())
    before = {name: value for name, value in values.items() if "crc32" not in name}
    (model / "model.json").write_text(json.dumps({**before, "sha256": hashlib.sha256(bad).hexdigest()}))
    with pytest.raises(ValueError, match="no safetensors file"):
        load_module(model)
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["export", "--ckpt_path=nowhere.ckpt", "--out=o"], "There is no checkpoint nowhere.ckpt"),
        (["export", "--ckpt_path=MODEL", "--out=o", "--weights=both"], "weights is 'both'"),
        ([*FIT, "--ckpt_path=MODEL"], "without the training's state"),
    ],
    ids=["missing", "weights", "fit"],
)
def test_what_cannot_be_done_is_told(lightning, model, capsys, args, message):
    with pytest.raises(SystemExit):
        lightning(*[arg.replace("MODEL", str(model)) for arg in args])
    assert message in capsys.readouterr().err
