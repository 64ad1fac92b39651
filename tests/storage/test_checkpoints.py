"""Checkpoint files: what cannot be read is told in one sentence, and nothing in a file is executed."""

import pickle

import pytest
import torch
from helpers.marker import Marker

from diffusion_lit.modules.load import load_module
from diffusion_lit.storage.checkpoints import read_checkpoint
from diffusion_lit.storage.runs import find_last


def refused(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_module(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_checkpoints(tmp_path):
    refused(tmp_path / "missing.ckpt", "There is no checkpoint")
    refused(tmp_path, "is a folder")
    (tmp_path / "text.ckpt").write_text("hello, I am a text file and not a checkpoint at all\n" * 10)
    refused(tmp_path / "text.ckpt", "not a readable checkpoint")
    (tmp_path / "empty.ckpt").touch()
    refused(tmp_path / "empty.ckpt", "not a readable checkpoint")
    torch.save({"state_dict": {"w": torch.zeros(1000)}}, tmp_path / "whole.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "whole.ckpt").read_bytes()[:-2000])
    refused(tmp_path / "cut.ckpt", "not a readable checkpoint")
    torch.save([1, 2], tmp_path / "list.ckpt")
    refused(tmp_path / "list.ckpt", "no `state_dict`")
    refused(tmp_path / "whole.ckpt", "does not say which module class")


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_malicious_file_is_refused_and_does_not_run(tmp_path, how):
    marker = tmp_path / "it_ran"
    if how == "torch":
        torch.save({"state_dict": {}, "hyper_parameters": Marker(marker)}, tmp_path / "bad.ckpt")
    else:
        (tmp_path / "bad.ckpt").write_bytes(pickle.dumps(Marker(marker)))
    with pytest.raises(ValueError, match=r"bad.ckpt holds objects .*run code"):
        read_checkpoint(tmp_path / "bad.ckpt")
    assert not marker.exists()
    if how == "torch":
        torch.load(tmp_path / "bad.ckpt", weights_only=False)
    else:
        pickle.loads((tmp_path / "bad.ckpt").read_bytes())
    assert marker.exists()  # the file is as dangerous as the test means it to be


def test_classes_that_do_not_exist_or_are_no_modules(tmp_path):
    for name in ("diffusion_lit.modules.Nothing", "os.system", "diffusion_lit.nets.UNet"):
        torch.save(
            {
                "state_dict": {"w": torch.zeros(1)},
                "pytorch-lightning_version": "2.6.4",
                "hyper_parameters": {"_class_path": name, "_instantiator": "lightning.pytorch.cli.instantiate_module"},
            },
            tmp_path / "odd.ckpt",
        )
        with pytest.raises(ValueError, match=rf"odd\.ckpt.*{name}"):
            load_module(tmp_path / "odd.ckpt")


def test_the_newest_version_with_a_last_checkpoint_is_found(tmp_path):
    with pytest.raises(ValueError, match="nothing to continue"):
        find_last(tmp_path / "run")
    for version in (0, 2, 9, 10, 11):
        (tmp_path / "run" / f"version_{version}" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="nothing to continue"):
        find_last(tmp_path / "run")
    for version in (2, 9, 10):
        (tmp_path / "run" / f"version_{version}" / "checkpoints" / "last.ckpt").touch()
    assert find_last(tmp_path / "run").parts[-3] == "version_10"
