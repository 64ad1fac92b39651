"""A file with a flipped bit is refused, or gives what was written: in every reader; and what the check costs."""

import json
import random
import time

import pytest
import torch
from checkpoint_files import autoencoder, checkpoint, classifier, combined, latent, model, write
from safetensors.torch import save_file

from diffusion_lit.commands.export import export
from diffusion_lit.storage import pickled
from diffusion_lit.storage.checkpoints import read_checkpoint
from diffusion_lit.storage.snapshots import Snapshots
from diffusion_lit.storage.tensors import read_tensors, write_tensors


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def same(one, other):
    """Whether two contents are alike to the bit."""
    if isinstance(one, torch.Tensor):
        alike = isinstance(other, torch.Tensor) and (one.dtype, one.shape) == (other.dtype, other.shape)
        return alike and one.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(one, dict):
        return isinstance(other, dict) and set(one) == set(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def flips(path, count, read):
    """Reads a file with one bit flipped, many times; the number of times that it was read, always the same."""
    whole, draw, loaded = path.read_bytes(), random.Random(0), 0
    expected = read(path)
    for _ in range(count):
        place = draw.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = read(path)
        except ValueError:
            continue
        assert same(found, expected), place
        loaded += 1
    path.write_bytes(whole)
    return loaded


def test_300_flipped_bits_of_a_checkpoint_change_nothing_that_is_read(here):
    path = write(here / "a.ckpt", checkpoint())
    assert flips(path, 300, read_checkpoint) < 60  # what loads has its bit where nothing is read

    def bare(path):
        try:
            return torch.load(path, weights_only=True)
        except Exception as error:
            raise ValueError from error

    with pytest.raises(AssertionError):
        flips(path, 300, bare)
    (here / "pad.ckpt").write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        read_checkpoint(here / "pad.ckpt")


def test_flipped_bits_of_the_other_files_change_nothing(here):
    for name, content in (("vae", autoencoder()), ("latent", latent()), ("classifier", classifier())):
        flips(write(here / f"{name}.ckpt", content), 50, read_checkpoint)
    export(str(write(here / "a.ckpt", checkpoint())), str(here / "model"))
    for name in ("model.json", "model.safetensors"):
        flips(here / "model" / name, 200, lambda _: read_checkpoint(here / "model"))
    weights = model().state_dict()
    Snapshots.write(here / "averages", 1, 0.05, weights)
    (snapshot,) = (here / "averages").iterdir()
    assert same(combined(here / "averages"), dict(weights))
    flips(snapshot, 200, lambda _: combined(here / "averages"))
    record = {"recipe": "x", "n": 3}
    write_tensors(here / "kept.safetensors", weights, record)

    def kept(path):
        found = read_tensors(path, record)
        if found is None:
            raise ValueError
        return found

    flips(here / "kept.safetensors", 200, kept)


def test_files_of_before_are_read(here):
    torch.save(checkpoint(), here / "old.ckpt")
    assert read_checkpoint(here / "old.ckpt")["global_step"] == 3
    folder = here / "averages"
    folder.mkdir()
    save_file({"w": torch.ones(3)}, folder / "step_0000001_sigma_0.05.safetensors")
    assert same(combined(folder), {"w": torch.ones(3)})
    export(str(here / "old.ckpt"), str(here / "model"))
    record = json.loads((here / "model/model.json").read_text())
    (here / "model/model.json").write_text(json.dumps({k: v for k, v in record.items() if "crc32" not in k}))
    assert read_checkpoint(here / "model")["global_step"] == 3


@pytest.mark.slow
def test_the_check_takes_a_fifth_of_a_second_per_100_mb_at_the_most(here):
    torch.save({f"w{index}": torch.randn(2**17) for index in range(200)}, here / "large.ckpt")  # 100 MiB
    with (here / "large.ckpt").open("rb") as file:
        took = []
        for _ in range(5):
            start = time.perf_counter()
            assert pickled.is_whole(file)
            took.append(time.perf_counter() - start)
    print(f"{min(took):.3f} s per 100 MiB")
    assert min(took) < 0.2
