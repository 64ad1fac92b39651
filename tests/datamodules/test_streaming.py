"""Chunks feed what an array in memory would, in a keyed order, through a small cache, and run nothing."""

import json
import os
import pickle
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.chunk_tools import chunk_of, write_set
from lightning.pytorch import LightningModule, Trainer

from datamodules import Streamed
from datamodules.streaming import WindowLoader

COUNTS = {"train": 50, "val": 7}
SIZE = 4 * 6 + 4 * (8 + 20 + 48 + 8)  # bytes of a chunk of 4 images


@pytest.fixture
def images(tmp_path):
    return write_set(tmp_path / "set", COUNTS)


def streamed(tmp_path, root=None, **options):
    options = {"batch_size": 8, "window": 3, "cache_dir": str(tmp_path / "cache"), "random_flip": False, **options}
    return Streamed(str(tmp_path / "set") if root is None else root, **options)


class Copier:
    """What litdata's downloader does, for a folder; counts the files, and the most chunks at once in the cache."""

    def __init__(self):
        self.seen, self.lock, self.coming, self.most = [], threading.Lock(), 0, 0

    def download_file(self, source, place):
        chunk = place.endswith(".bin")
        with self.lock:
            self.seen.append(source.rpartition("/")[2])
            self.coming += chunk
            self.most = max(self.most, self.coming + len(list(Path(place).parent.glob("*.bin"))))
        shutil.copy(source.removeprefix("local:"), f"{place}.tmp")
        time.sleep(0.002 * chunk)  # so that several are on their way at once
        with self.lock:
            os.replace(f"{place}.tmp", place)
            self.coming -= chunk


@pytest.fixture
def copier(monkeypatch):
    copier = Copier()
    monkeypatch.setattr("datamodules.chunk_store.downloader_of", lambda root, folder: copier)
    return copier


def epoch_of(data, epoch=0, **options):
    loader = data.train_dataloader()
    loader.set_epoch(epoch)
    for name, value in options.items():
        setattr(loader, name, value)
    return list(loader)


def rows_of(batches):
    return [row for batch in batches for row in batch["index"].tolist()]


def test_it_gives_the_images_and_classes_that_were_written(tmp_path, images):
    data = streamed(tmp_path)
    data.prepare_data()
    assert data.image_shape == (3, 4, 4) and data.class_names == ["even", "odd"] and data.num_classes == 2
    for split in ("train", "val"):
        there = data.reference_images(split)
        assert there.shape == images[split].shape and there.nbytes == images[split].nbytes
        assert np.array_equal(there[:], images[split]) and np.array_equal(there[3:6], images[split][3:6])
        assert np.array_equal(there[-1], images[split][-1])
        assert data.reference_labels(split).tolist() == [row % 2 for row in range(COUNTS[split])]
    rows = np.array([41, 3, 3, 17, 0])
    assert np.array_equal(data.reference_images("train")[rows], images["train"][rows])
    both = np.concatenate([images["train"], images["val"]])
    assert np.array_equal(data.reference_images("train+val")[:], both)
    assert np.array_equal(data.reference_images("test")[:], images["val"])  # there are none to test with
    with pytest.raises(IndexError, match="50 images"):
        data.reference_images("train")[50]
    held = list(data.val_dataloader())
    assert rows_of(held) == list(range(7)) and held[0]["image"].shape == (7, 3, 4, 4)


@pytest.mark.parametrize("workers", [None, 0, 3])
def test_an_epoch_is_keyed_and_has_each_image_once(tmp_path, images, workers):
    data = streamed(tmp_path, num_workers=workers)
    first, second = epoch_of(data), epoch_of(data, 1)
    assert len(first) == 6 and len(set(rows_of(first))) == 48 and rows_of(first) != rows_of(second)
    assert rows_of(first) == rows_of(epoch_of(streamed(tmp_path, num_workers=0)))
    for batch in first:
        expected = torch.from_numpy(images["train"][batch["index"].numpy()])
        assert torch.equal(((batch["image"] + 1) * 127.5).round().to(torch.uint8), expected)
        assert torch.equal(batch["label"], batch["index"] % 2)
    windows = [sorted({row // 4 for row in rows_of(first)[start : start + 12]}) for start in (0, 12, 24)]
    assert all(len(chunks) <= 4 for chunks in windows)  # of 3 chunks each, the last of which may be the short one
    assert rows_of(first)[:12] != sorted(rows_of(first)[:12])


def test_the_images_of_a_window_come_in_another_order_at_each_epoch(tmp_path):
    write_set(tmp_path / "set", {"train": 24}, per_chunk=24)  # one chunk, so that the order of chunks is no help
    orders = [rows_of(epoch_of(streamed(tmp_path), epoch)) for epoch in range(3)]
    assert all(sorted(order) == list(range(24)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_ranks_and_resumption_are_exact(tmp_path, images):
    data = streamed(tmp_path)
    whole = epoch_of(data, 2)
    for world in (2, 4, 8):
        parts = []
        for rank in range(world):
            data._ranks = lambda rank=rank, world=world: (world, rank)
            parts.append(epoch_of(data, 2))
        for number, batch in enumerate(whole):
            for key in ("image", "index", "label"):
                assert torch.equal(torch.stack([part[number][key] for part in parts], 1).flatten(0, 1), batch[key])
    data._ranks = lambda: (1, 0)
    for seen in range(7):
        rest = epoch_of(data, 2, position=lambda seen=seen: (2, seen))
        assert rows_of(rest) == rows_of(whole[seen:])


class Recorder(LightningModule):
    def __init__(self, place=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen, self.place = [], place

    def on_train_batch_end(self, *_):
        if self.place is not None and self.trainer.global_step == 9:
            self.trainer.save_checkpoint(self.place)

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["index"].tolist())
        return (self.weight * batch["image"].mean()).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def test_a_run_stopped_in_mid_epoch_goes_on_with_the_next_batch(tmp_path, images, copier):
    quiet = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    quiet |= dict(default_root_dir=tmp_path, enable_checkpointing=False, limit_val_batches=0, num_sanity_val_steps=0)
    path = str(tmp_path / "some.ckpt")
    whole, resumed = Recorder(path), Recorder()
    Trainer(max_steps=15, **quiet).fit(whole, datamodule=streamed(tmp_path, f"local:{tmp_path}/set"))
    Trainer(max_steps=15, **quiet).fit(resumed, datamodule=streamed(tmp_path), ckpt_path=path, weights_only=True)
    assert len(whole.seen) == 15 and resumed.seen == whole.seen[9:]


def test_a_url_is_read_through_a_cache_that_stays_small(tmp_path, images, copier):
    chunks = 9  # three windows
    data = streamed(tmp_path, f"local:{tmp_path}/set", cache_gb=chunks * SIZE / 2**30, num_workers=0)
    plain = streamed(tmp_path)
    for epoch in range(8):
        copier.seen.clear()
        there = {path.name for path in (tmp_path / "cache").glob("*/train/*.bin")}
        batches = epoch_of(data, epoch)
        for thread in [one for one in threading.enumerate() if one.name.startswith("fetch")]:
            thread.join()  # a fetch that was under way when the epoch ended
        for batch, expected in zip(batches, epoch_of(plain, epoch), strict=True):
            assert torch.equal(batch["image"], expected["image"]) and torch.equal(batch["index"], expected["index"])
        first = {f"chunk-0-{row // 4}.bin" for row in rows_of(batches[:1])}
        assert not first & there & set(copier.seen)  # what is there of the first window does not make room for the rest
        files = [name for name in copier.seen if name.endswith(".bin")]
        assert (4 if epoch else 12) <= len(set(files)) <= 13  # 13 there are
        assert len(files) <= len(set(files)) + 1  # a fetch that waits for another of the same chunk may come too late
        assert copier.most <= chunks  # with those on their way
    held = list((tmp_path / "cache").glob("*/train/*.bin"))
    held[0].unlink()  # another process made room
    assert rows_of(epoch_of(data)) == rows_of(epoch_of(plain))


def test_a_chunk_is_fetched_once_for_all_that_wait_for_it(tmp_path, images, copier):
    there = streamed(tmp_path, f"local:{tmp_path}/set").reference_images("train")
    threads = [threading.Thread(target=there.__getitem__, args=(slice(0, 4),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert copier.seen.count("chunk-0-0.bin") == 1


def test_a_set_that_was_written_anew_is_not_mixed_with_the_old(tmp_path, images, copier):
    root = f"local:{tmp_path}/set"
    old = streamed(tmp_path, root)
    prints = old.fingerprint("train"), old.fingerprint("val")
    assert np.array_equal(old.reference_images("train")[:], images["train"])
    shutil.rmtree(tmp_path / "set")
    newer = write_set(tmp_path / "set", COUNTS, seed=1)
    new = streamed(tmp_path, root)
    assert np.array_equal(new.reference_images("train")[:], newer["train"])
    assert new.fingerprint("train") != prints[0] != prints[1]
    assert streamed(tmp_path).fingerprint("train") == new.fingerprint("train")


def test_classes_follow_the_model_and_may_be_left_out(tmp_path, images):
    data = streamed(tmp_path)
    data.match_classes(["odd", "even"])
    assert data.reference_labels("train")[:4].tolist() == [1, 0, 1, 0]
    with pytest.raises(ValueError, match="trained on the classes"):
        data.match_classes(["cat", "dog"])
    without = streamed(tmp_path, use_labels=False)
    assert without.num_classes == 0 and "label" not in next(iter(without.train_dataloader()))


# --- what is refused


class Bomb:
    def __reduce__(self):
        return os.mkdir, (self.place,)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


HOSTILE = {
    "pickle": lambda index: index["config"].update(data_format=["pickle"]),
    "graph:pickle": lambda index: index["config"].update(data_format=["graph:pickle", "int"]),
    "packed": lambda index: index["config"].update(compression="zstd"),
    "../../evil.bin": lambda index: index["chunks"][0].update(filename="../../evil.bin"),
    "/etc/passwd": lambda index: index["chunks"][0].update(filename="/etc/passwd"),
    "-3 images": lambda index: index["chunks"][0].update(chunk_size=-3),
    "items.dat": lambda index: index["chunks"].pop(),
    "no index": lambda index: index.pop("config"),
}


@pytest.mark.parametrize("word", HOSTILE)
def test_a_hostile_index_is_refused(tmp_path, images, copier, word):
    edit(tmp_path / "set/train/index.json", HOSTILE[word])
    for root in (None, f"local:{tmp_path}/set"):
        with pytest.raises(ValueError, match=word) as error:
            streamed(tmp_path, root).reference_images("train")
        assert "write_chunks" in str(error.value) and len(str(error.value)) < 600


def test_a_pickle_in_a_chunk_is_never_loaded(tmp_path, images):
    bomb = Bomb()
    bomb.place = str(tmp_path / "exploded")
    payload = pickle.dumps(bomb)
    chunk = tmp_path / "set/train/chunk-0-0.bin"
    content = bytearray(chunk.read_bytes())
    start = 4 * 6 + 8
    content[start : start + len(payload)] = payload
    chunk.write_bytes(content)
    with pytest.raises(ValueError, match=r"Image 0 of .*chunk-0-0.bin is not as it was written"):
        streamed(tmp_path).reference_images("train")[0:1]
    assert not (tmp_path / "exploded").exists()
    pickle.loads(payload)
    assert (tmp_path / "exploded").exists()  # it would have


@pytest.mark.parametrize("damage", ["pixel", "short", "other"])
def test_a_damaged_chunk_is_told_in_a_sentence(tmp_path, images, damage):
    path = tmp_path / "set/train/chunk-0-2.bin"
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    other = chunk_of(images["train"][0:4], [0, 1, 0, 1])
    path.write_bytes({"pixel": content, "short": content[: SIZE // 2], "other": other}[damage])
    with pytest.raises(ValueError, match=r"chunk-0-2.bin is not as it was written.*write_chunks"):
        streamed(tmp_path).reference_images("train")[8:12]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"chunk-0-2.bin is gone"):
        streamed(tmp_path).reference_images("train")[8:12]


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.update(format=2),
        lambda found: found.update(shape=[3, 10**9, 10**9]),
        lambda found: found.update(shape=[3, 4]),
        lambda found: found.update(counts={"train": -1}),
        lambda found: found.update(counts={"../train": 50}),
        lambda found: found.pop("hashes"),
    ],
)
def test_a_hostile_catalogue_is_refused(tmp_path, images, change):
    edit(tmp_path / "set/catalogue.json", change)
    with pytest.raises(ValueError, match=r"catalogue.json is no catalogue of this version.*write_chunks"):
        streamed(tmp_path).prepare_data()


def test_items_that_do_not_belong_to_the_catalogue_are_refused(tmp_path, images):
    path = tmp_path / "set/train/items.dat"
    content = bytearray(path.read_bytes())
    content[8] ^= 1  # a class
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"items.dat is not as it was written"):
        streamed(tmp_path).split("train")


def test_bad_arguments_and_missing_sets_are_told(tmp_path, images, copier):
    for options in ({"window": 0}, {"cache_gb": 0}, {"root": "ftp://host/set"}):
        with pytest.raises(ValueError, match=str(next(iter(options.values())))):
            streamed(tmp_path, **options)
    with pytest.raises(FileNotFoundError, match="write_chunks"):
        streamed(tmp_path, str(tmp_path / "nothing")).prepare_data()
    with pytest.raises(OSError, match=r"local:/nothing/catalogue.json cannot be fetched"):
        streamed(tmp_path, "local:/nothing").prepare_data()
    with pytest.raises(ValueError, match=r"cache_gb is .* three windows of 3 chunks"):
        streamed(tmp_path, f"local:{tmp_path}/set", cache_gb=3 * SIZE / 2**30).split("train")


def test_a_checkpoint_cannot_have_a_url_opened(tmp_path, images, copier):
    data = streamed(tmp_path, f"local:{tmp_path}/set")
    data.write_nowhere(but_root=False)
    with pytest.raises(PermissionError, match=rf"--data_root local:{tmp_path}"):
        data.prepare_data()
    assert copier.seen == []
    data.write_nowhere(but_root=True)
    data.cache_dir = tmp_path / "cache"
    data.prepare_data()


def test_without_litdata_a_url_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "litdata.streaming.downloader", None)
    with pytest.raises(ModuleNotFoundError, match=r"diffusion-lit\[streaming\]"):
        streamed(tmp_path, "s3://bucket/set").prepare_data()


def test_the_loader_is_that_of_windows(tmp_path, images):
    loader = streamed(tmp_path, window=5).train_dataloader()
    assert isinstance(loader, WindowLoader) and loader.window == 5
