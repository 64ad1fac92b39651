"""Files of results: archives that grow, folders that hold one run, locks that die with their process, full disks."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffusion_lit.runtime.lock import Busy, Lock
from diffusion_lit.storage import tensors as store
from diffusion_lit.storage.folders import scratch_of
from diffusion_lit.storage.own_files import RECORD, own_files
from diffusion_lit.storage.room import try_folder
from diffusion_lit.storage.sample_archive import SampleArchive
from diffusion_lit.storage.verified import decode, encode


def pixels(count=100):
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def test_an_archive_is_on_the_disk_as_it_grows_and_takes_its_name_when_it_is_whole(tmp_path):
    images, labels = pixels(), np.arange(100)
    with SampleArchive(tmp_path / "samples.npz", images.shape, labels) as archive:
        (temporary,) = tmp_path.iterdir()
        assert temporary.stat().st_size >= images.nbytes  # its room is claimed
        for start in range(0, 100, 30):
            archive.add(images[start : start + 30])
            assert not (tmp_path / "samples.npz").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]
    assert (tmp_path / "samples.npz").stat().st_size < 1.1 * images.nbytes + 2000
    found = np.load(tmp_path / "samples.npz")
    assert (found["arr_0"] == images).all() and (found["labels"] == labels).all()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_what_was_drawn_before_an_end_is_kept_beside_the_old_samples(tmp_path, error):
    images, labels = pixels(), np.arange(100)
    np.savez(tmp_path / "samples.npz", arr_0=images)
    with pytest.raises(error), SampleArchive(tmp_path / "samples.npz", images.shape, labels) as archive:
        archive.add(images[:30])
        raise error
    assert archive.partial == tmp_path / "samples.partial.npz"
    found = np.load(archive.partial)
    assert (found["arr_0"] == images[:30]).all() and (found["labels"] == labels[:30]).all()
    assert (np.load(tmp_path / "samples.npz")["arr_0"] == images).all()
    with pytest.raises(error), SampleArchive(tmp_path / "other.npz", images.shape, None) as archive:
        raise error
    assert sorted(os.listdir(tmp_path)) == ["samples.npz", "samples.partial.npz"]


def test_a_disk_without_room_is_told_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10_000}))
    with (
        pytest.raises(OSError, match=r"samples\.npz.*are free"),
        SampleArchive(tmp_path / "samples.npz", (99, 8, 8, 3), None),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_is_tried_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=rf"Nothing can be written to {folder}.*give a folder"):
            try_folder(folder)
    try_folder(tmp_path / "new" / "folder")
    assert os.listdir(tmp_path / "new" / "folder") == []


def write(folder, *names, fail=False):
    with own_files(folder) as fresh:
        for name in names:
            (fresh / name).write_text(name)
        (fresh / RECORD).write_text(json.dumps({"files": [*names, RECORD]}))
        if fail:
            raise OSError("a full disk")


def test_a_folder_holds_the_files_of_the_last_run_and_what_is_not_ours(tmp_path):
    (tmp_path / "mine.png").write_text("mine")
    write(tmp_path, "result_0.png", "result_1.png", "figure.png")
    write(tmp_path, "result.png", "figure.png")
    assert sorted(os.listdir(tmp_path)) == ["figure.png", "mine.png", RECORD, "result.png"]
    with pytest.raises(OSError):
        write(tmp_path, "another.png", fail=True)
    assert sorted(os.listdir(tmp_path)) == ["figure.png", "mine.png", RECORD, "result.png"]


def test_a_record_names_no_file_of_another_folder(tmp_path):
    (tmp_path / "keep").write_text("")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / RECORD).write_text(json.dumps({"files": ["../keep", str(tmp_path / "keep"), 3]}))
    write(tmp_path / "out", "figure.png")
    assert (tmp_path / "keep").exists()


def test_what_a_killed_run_left_is_swept_away(tmp_path):
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    alive = scratch_of(tmp_path / RECORD)
    alive.mkdir()
    alive.with_name(alive.name.replace(f".{os.getpid()}.", f".{int(done.stdout)}.")).mkdir()
    write(tmp_path, "figure.png")
    assert sorted(os.listdir(tmp_path)) == [alive.name, "figure.png", RECORD]


def hold(path, seconds):
    with Lock(path):
        time.sleep(seconds)


def test_a_lock_is_held_while_its_process_lives(tmp_path):
    path = tmp_path / "parts" / "lock"
    child = multiprocessing.get_context("fork").Process(target=hold, args=(path, 60))
    child.start()
    try:
        while not (path.is_file() and path.read_text()):
            time.sleep(0.05)
        with pytest.raises(Busy, match=rf"process {child.pid} on "):
            Lock(path)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        with Lock(path):
            assert path.read_text().startswith(f"process {os.getpid()} on ")
    finally:
        child.kill()


def test_a_lock_is_not_kept_by_the_children_of_its_process(tmp_path):
    path, context = tmp_path / "lock", multiprocessing.get_context("fork")
    lock = Lock(path)
    child = context.Process(target=time.sleep, args=(60,))
    child.start()
    try:
        with pytest.raises(Busy):
            Lock(path)
        lock.release()
        Lock(path).release()
    finally:
        child.kill()


def test_a_lock_that_is_waited_for_leaves_the_contents_alone(tmp_path):
    path, told = tmp_path / "data", []
    path.write_text("rows")
    lock = Lock(path, nullcontext)

    def waiting():
        told.append(path.read_text())
        lock.release()

    Lock(path, waiting).release()
    assert told == ["rows"] and path.read_text() == "rows"


def test_the_same_tensors_and_texts_are_the_same_bytes(tmp_path):
    """safetensors orders metadata by chance, anew in each call."""
    tensors = {"b": torch.arange(5.0), "a": torch.ones(2, 3, dtype=torch.bfloat16)}
    texts = {"class_names": "cat\nKätzchen", "more": "x", "other": "y"}
    files = {encode(tensors, texts) for _ in range(20)}
    assert len(files) == 1
    (tmp_path / "file").write_bytes(files.pop())
    read, told = decode(tmp_path / "file")
    assert told == texts
    assert all(torch.equal(value, tensors[name]) for name, value in read.items())
    assert load_file(tmp_path / "file").keys() == tensors.keys()


def test_tensors_that_the_cache_cannot_take_stay_in_memory_and_are_the_same(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    made = []

    def make():
        made.append(1)
        return {"x": torch.arange(3.0)}

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setenv("DIFFUSION_LIT_CACHE", str(tmp_path))
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(store, "_IN_MEMORY", store._IN_MEMORY)
            found = store.kept_tensors("cache", {"test": str(tmp_path)}, make)
        assert torch.equal(found["x"], torch.arange(3.0))
    assert len(made) == 1
    assert not list((tmp_path / "cache").iterdir())
    with pytest.raises(OSError, match="a.safetensors cannot be written: .*No space left"):
        store.write_tensors(tmp_path / "cache" / "a.safetensors", {"x": torch.zeros(1)}, {})
