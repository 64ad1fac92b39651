"""What reaches the training step: order, sharding, resumption, flips, and each image as often as it should."""

import multiprocessing
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from datamodules import Digits, ImageDataModule
from datamodules.base import READERS
from datamodules.loaders import EvalLoader, Split, TrainLoader, normalise
from diffusion_lit.runtime.mounts import network_mount


class Numbered(ImageDataModule):
    """Images whose pixels are their number, so that what was fed can be read off."""

    def __init__(self, count: int = 50, batch_size: int = 8, on_disk: str | None = None, **options) -> None:
        super().__init__(batch_size, **options)
        self.count = count
        self.on_disk = on_disk

    image_shape = (1, 4, 4)
    class_names = ("even", "odd")

    def read(self, split: str) -> Split:
        count = self.count if split == "train" else 21
        images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 1, 4, 4)).copy()
        images[..., 0] = 255  # the left column is white
        labels = torch.arange(count) % 2
        if self.on_disk is None:
            return Split(torch.from_numpy(images), labels)
        path = f"{self.on_disk}/{split}.u8"
        images.tofile(path)
        return Split(np.memmap(path, np.uint8, "r", shape=images.shape), labels)


class Recorder(LightningModule):
    """Writes the number of every image it is given, per rank, epoch and batch; learns nothing."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.register_buffer("a_buffer", torch.zeros(1))  # DDP would broadcast it at each forward
        self.folder = folder
        self.seen: list[tuple[str, int, int, list[int]]] = []

    def record(self, stage: str, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        images, rows = batch["image"], batch["index"]
        middle = ((images[:, 0, 0, 1] + 1) * 127.5).round().long()
        assert torch.equal(middle, rows % 256) and torch.equal(batch["label"], rows % 2)
        self.seen.append((stage, self.current_epoch, batch_idx, rows.tolist()))
        if self.folder is not None:
            with (self.folder / f"rank{self.global_rank}.txt").open("a") as file:
                file.write(repr(self.seen[-1]) + "\n")
        return (self.weight * images.mean()).sum()

    def training_step(self, batch, batch_idx):
        return self.record("train", batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.record("val", batch, batch_idx)

    def test_step(self, batch, batch_idx):
        self.record("test", batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        self.record("predict", batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def trainer(folder, **options) -> Trainer:
    defaults = dict(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, num_sanity_val_steps=0, max_epochs=2,
    )  # fmt: skip
    return Trainer(**{**defaults, **options})


def rows_of(seen, stage="train", epoch=None):
    return [row for what, when, _, rows in seen if what == stage and epoch in (None, when) for row in rows]


@pytest.fixture(autouse=True)
def seeded():
    old = os.environ.get("PL_GLOBAL_SEED")
    seed_everything(0, verbose=False)
    yield
    if old is None:
        os.environ.pop("PL_GLOBAL_SEED", None)
    else:
        os.environ["PL_GLOBAL_SEED"] = old


def global_batches(loaders, epoch=0):
    for loader in loaders:
        loader.set_epoch(epoch)
    return list(zip(*[list(loader) for loader in loaders], strict=True))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_see_each_image_at_most_once_and_all_but_part_of_a_batch(world):
    data = Numbered()
    data.setup("fit")
    loaders = [TrainLoader(data.split("train"), 8, world, rank) for rank in range(world)]
    batches = global_batches(loaders)
    rows = [row for parts in batches for part in parts for row in part["index"].tolist()]
    assert len(rows) == len(set(rows)) == 50 // 8 * 8
    assert all(len(part["index"]) == 8 // world for parts in batches for part in parts)


def test_number_of_ranks_does_not_change_the_global_batch():
    data = Numbered()
    data.setup("fit")
    alone = global_batches([TrainLoader(data.split("train"), 8)])
    pair = global_batches([TrainLoader(data.split("train"), 8, 2, rank) for rank in range(2)])
    for (whole,), (first, second) in zip(alone, pair, strict=True):
        assert torch.equal(whole["index"][0::2], first["index"])
        assert torch.equal(whole["index"][1::2], second["index"])


def test_order_is_keyed_by_seed_and_epoch():
    loader = Numbered().train_dataloader()

    def order(seed, epoch):
        seed_everything(seed, verbose=False)
        loader.set_epoch(epoch)
        return torch.cat([batch["index"] for batch in loader]).tolist()

    first = order(0, 0)
    assert first == order(0, 0)
    assert first != order(1, 0) and first != order(0, 1)
    assert first != sorted(first)
    torch.manual_seed(123)  # no hidden state
    torch.rand(7)
    assert first == order(0, 0)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [5, 15, 16, 17, 29, 30, 31, 32])
def test_evaluation_sees_each_image_once_in_equally_many_batches(world, count):
    split = Split(torch.zeros(count, 1, 2, 2, dtype=torch.uint8), None)
    loaders = [EvalLoader(split, 15 if world != 2 else 16, world, rank) for rank in range(world)]
    parts = [[batch["index"].tolist() for batch in loader] for loader in loaders]
    assert sorted(row for part in parts for rows in part for row in rows) == list(range(count))
    assert len({len(part) for part in parts} | {len(loader) for loader in loaders}) == 1
    assert all(rows for part in parts for rows in part)
    for rank, part in enumerate(parts):
        assert [row for rows in part for row in rows] == list(range(rank, count, world))


def test_normalisation_is_exact_at_both_ends():
    values = normalise(torch.arange(256, dtype=torch.uint8))
    assert values.dtype == torch.float32 and values[0] == -1 and values[255] == 1
    assert torch.equal(((values.double() + 1) * 127.5).round(), torch.arange(256).double())
    assert torch.allclose(values.double(), torch.linspace(-1, 1, 256, dtype=torch.float64), atol=1e-7)


def test_half_of_the_images_are_mirrored_keyed_and_alike_for_any_number_of_ranks():
    data = Numbered(count=2000, batch_size=1000, random_flip=True)
    mirrored, places = {}, {}
    for epoch in (0, 1):
        loader = data.train_dataloader()
        loader.set_epoch(epoch)
        flags = torch.cat([batch["image"][:, 0, 0, 0] < 1 for batch in loader])
        rows = torch.cat([batch["index"] for batch in loader])
        places[epoch] = flags
        mirrored[epoch] = torch.empty(2000, dtype=torch.bool).scatter_(0, rows, flags)
    assert 900 < mirrored[0].sum() < 1100
    assert 0.4 < (mirrored[0] == mirrored[1]).float().mean() < 0.6
    assert 0.4 < (places[0] == places[1]).float().mean() < 0.6

    whole = next(iter(data.train_dataloader()))["image"]
    parts = []
    for rank in range(2):
        loader = TrainLoader(data.split("train"), 1000, 2, rank, augment=data._augment)
        data._ranks = lambda rank=rank: (2, rank)
        parts.append(next(iter(loader))["image"])
    assert torch.equal(whole[0::2], parts[0]) and torch.equal(whole[1::2], parts[1])


def test_evaluation_and_references_are_never_mirrored():
    data = Numbered(random_flip=True)
    assert all((batch["image"][..., 0] == 1).all() for batch in data.val_dataloader())
    assert (data.reference_images("train")[..., 0] == 255).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_array_on_disk_gives_the_same_batches(tmp_path, workers):
    memory = list(Numbered().train_dataloader())
    disk = list(Numbered(on_disk=str(tmp_path), num_workers=workers).train_dataloader())
    assert len(memory) == len(disk) == 6
    for one, other in zip(memory, disk, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("image", "index", "label"))


def test_batch_that_does_not_divide_over_ranks_is_refused():
    with pytest.raises(ValueError, match="batch_size is 8, which does not divide over 3 ranks.*multiple of 3"):
        TrainLoader(Numbered().split("train"), 8, 3, 0)


def test_batch_larger_than_the_split_is_refused():
    with pytest.raises(ValueError, match="batch_size is 51, but the training split has 50 images"):
        Numbered(batch_size=51).train_dataloader()


def test_a_set_on_a_network_disk_is_read_ahead_by_eight_ranks_with_the_same_batches(tmp_path, monkeypatch, caplog):
    local = Numbered(on_disk=str(tmp_path), batch_size=16)
    assert local.train_dataloader().num_workers == 0
    table = f"/dev/sda1 / ext4 rw 0 0\nserver:/data {tmp_path} nfs4 rw 0 0\n"
    monkeypatch.setattr("datamodules.base.network_mount", lambda path: network_mount(path, table))
    there = Numbered(on_disk=str(tmp_path), batch_size=16)
    with caplog.at_level("INFO"):
        loaders = [there.train_dataloader(), there.val_dataloader()]
    assert [loader.num_workers for loader in loaders] == [READERS, READERS]
    said = [record.getMessage() for record in caplog.records if "network file system" in record.getMessage()]
    assert len(said) == 1 and f"nfs4 at {tmp_path}" in said[0] and "num_workers" in said[0]
    assert Numbered(on_disk=str(tmp_path), num_workers=0).train_dataloader().num_workers == 0
    assert Numbered().train_dataloader().num_workers == 0

    whole = list(local.train_dataloader())
    parts = []
    for rank in range(8):
        there._ranks = lambda rank=rank: (8, rank)
        parts.append(list(there.train_dataloader()))
    assert len(whole) == 3
    for number, batch in enumerate(whole):
        for key in ("image", "index", "label"):
            together = torch.stack([part[number][key] for part in parts], dim=1).flatten(0, 1)
            assert torch.equal(together, batch[key])


def test_reading_ahead_stops_with_its_reader_and_passes_errors_on(tmp_path):
    data = Numbered(on_disk=str(tmp_path), num_workers=2)
    loader = data.train_dataloader()
    before = threading.active_count()
    batches = iter(loader)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before
    loader.read = lambda rows: 1 // 0
    with pytest.raises(ZeroDivisionError):
        list(loader)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"num_workers": -1}])
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        Numbered(**options)


def test_without_labels_there_are_none():
    data = Digits(use_labels=False)
    assert data.num_classes == 0 and data.class_names == [] and data.reference_labels("train") is None
    assert "label" not in next(iter(data.train_dataloader()))


def test_trainer_feeds_epochs_and_validates_each_image_once(tmp_path):
    module = Recorder()
    trainer(tmp_path).fit(module, datamodule=Numbered())
    first, second = rows_of(module.seen, epoch=0), rows_of(module.seen, epoch=1)
    assert len(set(first)) == len(first) == len(second) == 48 and first != second
    assert rows_of(module.seen, "val", 0) == list(range(21))
    trainer(tmp_path).test(module, datamodule=Numbered(), verbose=False)
    assert rows_of(module.seen, "test") == list(range(21))
    trainer(tmp_path).predict(module, datamodule=Numbered())
    assert rows_of(module.seen, "predict") == list(range(21))


def test_overfitting_repeats_the_same_batches(tmp_path):
    module = Recorder()
    trainer(tmp_path, overfit_batches=2).fit(module, datamodule=Numbered())
    assert rows_of(module.seen, epoch=0) == rows_of(module.seen, epoch=1) != []


class Looker(Callback):
    """Goes through a fresh training loader in the middle of an epoch."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.look)

    def look(self, trainer, *_):
        self.rows = [row for batch in trainer.datamodule.train_dataloader() for row in batch["index"].tolist()]


@pytest.mark.parametrize("hook", ["on_validation_epoch_end", "on_train_batch_end"])
def test_a_callback_may_read_the_training_data_in_mid_epoch(tmp_path, hook):
    looker, module = Looker(hook), Recorder()
    trainer(tmp_path, callbacks=[looker], val_check_interval=2, max_epochs=1).fit(module, datamodule=Numbered())
    assert len(set(looker.rows)) == 48
    assert len(set(rows_of(module.seen))) == 48


class Saver(Callback):
    """Saves after a number of batches, at one of the places where checkpoints are saved."""

    def __init__(self, hook: str, at: int, path: Path) -> None:
        self.at, self.path, self.count = at, path, 0
        setattr(self, hook, self.save)

    def save(self, trainer, *_):
        if trainer.global_step == self.at and not self.path.exists():
            trainer.save_checkpoint(self.path)


PLACES = [(hook, at, 0) for hook in ("on_train_batch_end", "on_validation_end") for at in (1, 4, 6, 8, 12)]
PLACES += [("on_train_epoch_end", 6, 0), ("on_train_epoch_end", 12, 0), ("on_train_batch_end", 4, 2)]


@pytest.mark.parametrize(("hook", "at", "workers"), PLACES)
def test_resumption_goes_on_where_it_stopped(tmp_path, hook, at, workers):
    options = dict(val_check_interval=1, max_epochs=3, limit_val_batches=0 if workers else None)
    whole = Recorder()
    saver = Saver(hook, at, tmp_path / "some.ckpt")
    disk = str(tmp_path) if workers else None
    trainer(tmp_path, callbacks=[saver], **options).fit(whole, datamodule=Numbered(on_disk=disk, num_workers=workers))
    resumed = Recorder()
    trainer(tmp_path, **options).fit(
        resumed,
        datamodule=Numbered(on_disk=disk, num_workers=workers),
        ckpt_path=str(tmp_path / "some.ckpt"),
        weights_only=True,
    )
    expected = [entry for entry in whole.seen if entry[0] == "train"][at:]
    assert [entry for entry in resumed.seen if entry[0] == "train"] == expected
    assert len(expected) == 18 - at


class Kill(Callback):
    """Ends the process without a word before the tenth step."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 9:
            os._exit(9)


def train_until_killed(folder: Path) -> None:
    saver = ModelCheckpoint(folder, "last", every_n_train_steps=4, enable_version_counter=False)
    trainer(folder, callbacks=[Kill(), saver], enable_checkpointing=True).fit(Recorder(folder), datamodule=Numbered())


def test_killed_run_resumes_in_mid_epoch(tmp_path):
    child = multiprocessing.get_context("fork").Process(target=train_until_killed, args=(tmp_path,))
    child.start()
    child.join(60)
    assert child.exitcode == 9
    before = [eval(line) for line in (tmp_path / "rank0.txt").read_text().splitlines()]
    resumed = Recorder()
    trainer(tmp_path).fit(resumed, datamodule=Numbered(), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)
    whole = Recorder()
    trainer(tmp_path).fit(whole, datamodule=Numbered())
    train = [[entry for entry in seen if entry[0] == "train"] for seen in (before, resumed.seen, whole.seen)]
    assert train[0] + [entry for entry in train[1] if entry not in train[0]] == train[2]
    assert train[1] == train[2][8:]


@pytest.mark.parametrize("replace", [True, False])
def test_two_ranks_share_the_data_without_a_duplicate(tmp_path, replace):
    module = Recorder(tmp_path)
    options = dict(devices=2, strategy="ddp_fork", use_distributed_sampler=replace)
    trainer(tmp_path, **options).fit(module, datamodule=Numbered(batch_size=4))
    seen = [[eval(line) for line in (tmp_path / f"rank{rank}.txt").read_text().splitlines()] for rank in range(2)]
    alone = Recorder()
    trainer(tmp_path).fit(alone, datamodule=Numbered(batch_size=4))
    for epoch in range(2):
        ranks = [rows_of(entries, epoch=epoch) for entries in seen]
        together = [row for pair in zip(*ranks, strict=True) for row in pair]
        assert together == rows_of(alone.seen, epoch=epoch) and len(set(together)) == 48
        checked = sorted(row for entries in seen for row in rows_of(entries, "val", epoch))
        assert checked == list(range(21))  # 11 and 10: uneven, and neither waits for the other


def test_loader_on_a_device_serves_from_there(monkeypatch):
    data = Numbered(on_device=True)
    moved = []
    monkeypatch.setattr("datamodules.base._to_device", lambda images, device: moved.append(device) or images)

    class Strategy:
        root_device = torch.device("meta")

    class Fake:
        world_size, global_rank, strategy, overfit_batches = 1, 0, Strategy(), 0

    data.trainer = Fake()
    batch_images = data.train_dataloader().images
    assert moved == [torch.device("meta")] and isinstance(batch_images, Tensor)
    data.on_device = False
    data.val_dataloader()
    assert len(moved) == 1


@pytest.mark.parametrize(("free", "moved"), [(50 * 16 * 4 - 1, 0), (50 * 16 * 4, 1)])
def test_images_live_on_a_gpu_where_they_take_a_quarter_of_its_memory_at_most(monkeypatch, free, moved):
    calls = []
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free, 10 * free))
    monkeypatch.setattr("datamodules.base._to_device", lambda images, device: calls.append(device) or images)

    class Strategy:
        root_device = torch.device("cuda")

    class Fake:
        world_size, global_rank, strategy, overfit_batches = 1, 0, Strategy(), 0

    data = Numbered(use_labels=False)
    data.trainer = Fake()
    loader = data.train_dataloader()
    assert len(calls) == moved and loader.device.type == "cuda"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_images_live_on_the_gpu_by_default(tmp_path):
    module = Recorder()
    data = Numbered()
    trainer(tmp_path, accelerator="gpu").fit(module, datamodule=data)
    cpu = Recorder()
    trainer(tmp_path).fit(cpu, datamodule=Numbered())
    assert module.seen == cpu.seen
