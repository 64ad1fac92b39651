"""A checkpoint is read and hashed once per process, and anew when the file changes."""

import hashlib
import os
import time
from collections import Counter

import pytest
import torch

from diffusion_lit.storage import hashing, pickled
from diffusion_lit.storage.checkpoints import read_checkpoint, read_training_state
from diffusion_lit.storage.hashing import file_hash


@pytest.fixture
def counted(monkeypatch):
    """How often files are loaded and hashed."""
    count = Counter()
    load, hash_ = torch.load, hashlib.sha256
    monkeypatch.setattr(
        pickled.torch, "load", lambda *args, **options: count.update(["load"]) or load(*args, **options)
    )
    monkeypatch.setattr(hashing, "sha256", lambda *args: count.update(["hash"]) or hash_(*args))
    return count


def write(path, step):
    """A checkpoint of which the last change lies behind."""
    weight = torch.full((50,), float(step))
    state = [{"state": {0: {"exp_avg": torch.zeros(50)}}, "param_groups": []}]
    content = {"state_dict": {"a": weight, "b": weight}, "optimizer_states": state, "global_step": step}
    torch.save(content, path)
    past = time.time() - 10 + step
    os.utime(path, (past, past))
    time.sleep(0.11)  # the time of a change itself cannot be set
    return path


def test_a_file_is_read_and_hashed_once_until_it_changes(tmp_path, counted):
    path = write(tmp_path / "x.ckpt", 1)
    first = read_checkpoint(path)
    first["state_dict"] = {}  # the caller's dictionary is its own
    for one in (read_checkpoint(path), read_checkpoint(str(path)), read_checkpoint(tmp_path / "." / "x.ckpt")):
        assert one["global_step"] == 1 and one["state_dict"]["a"].unique().tolist() == [1]
    assert file_hash(path) == file_hash(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert counted == {"load": 1, "hash": 1}
    write(path, 2)
    assert read_checkpoint(path)["state_dict"]["b"].unique().tolist() == [2]
    assert file_hash(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert counted == {"load": 2, "hash": 2}


def test_a_file_that_changed_just_now_is_read_again(tmp_path):
    path = tmp_path / "x.bin"
    for content in (b"one", b"two", b"six"):
        path.write_bytes(content)
        assert file_hash(path) == hashlib.sha256(content).hexdigest()


def test_the_optimizers_state_comes_to_training_alone(tmp_path, counted):
    path = write(tmp_path / "x.ckpt", 1)
    read = read_checkpoint(path)
    assert "optimizer_states" not in read
    assert read["state_dict"]["a"].data_ptr() == read["state_dict"]["b"].data_ptr()  # what is one tensor stays one
    checked, taken = read_training_state(path, keep=True), read_training_state(path)
    assert taken["optimizer_states"] is checked["optimizer_states"] and counted["load"] == 2
    assert read_training_state(path)["optimizer_states"] is not taken["optimizer_states"]  # an optimizer writes in it


def test_a_file_overwritten_in_place_does_not_reach_what_was_read(tmp_path):
    path = write(tmp_path / "x.ckpt", 3)
    read = read_checkpoint(path)
    with path.open("r+b") as file:
        file.truncate(10)
    assert read["state_dict"]["a"].unique().tolist() == [3]
