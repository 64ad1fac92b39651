"""What is split, numbered, cached and fed is what is said: splits by content, classes by name, checked caches."""

import hashlib
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import CIFAR10, ImageFolder, Subset
from datamodules.cache import prepare
from datamodules.decode import Transform
from datamodules.sources import list_images
from diffusion_lit.modules.batches import check_batch
from diffusion_lit.storage.folders import publish, scratch_of, sweep

SIDE = 12
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def write(path, seed):
    """A random PNG, whose bytes are a function of the seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def folder(root, cache, **options):
    data = ImageFolder(str(root), image_size=SIDE, batch_size=2, cache_dir=str(cache), **options)
    data.prepare_data()
    return data


def held(data):
    """The images of each split, by their pixels."""
    return {split: {row.tobytes() for row in np.asarray(data.reference_images(split))} for split in ("val", "test")}


# --- splits


def test_an_added_a_removed_and_a_renamed_image_move_no_other(tmp_path):
    for number in range(300):
        write(tmp_path / "pets" / "cats" / f"{number}.png", number)
    options = {"val_fraction": 0.1, "test_fraction": 0.1}
    before = held(folder(tmp_path / "pets", tmp_path / "cache", **options))
    assert all(12 <= len(images) <= 50 for images in before.values())  # 30 are expected
    for number in range(300, 340):  # beside the folder that all shared, too
        write(tmp_path / "pets" / ("cats" if number % 2 else "dogs/deep") / f"{number}.png", number)
    (tmp_path / "pets" / "cats" / "7.png").unlink()
    for number in range(20, 40):
        (tmp_path / "pets" / "cats" / f"{number}.png").rename(tmp_path / "pets" / "dogs" / f"renamed{number}.png")
    data = folder(tmp_path / "pets", tmp_path / "cache", use_labels=False, **options)
    gone = np.asarray(Image.open(write(tmp_path / "gone.png", 7))).transpose(2, 0, 1).tobytes()
    added = {np.asarray(Image.open(write(tmp_path / "x.png", n))).transpose(2, 0, 1).tobytes() for n in range(300, 340)}
    for split, images in held(data).items():
        assert images - added == before[split] - {gone}
    wider = held(folder(tmp_path / "pets", tmp_path / "cache", use_labels=False, val_fraction=0.3, test_fraction=0.1))
    assert wider["test"] == held(data)["test"] and wider["val"] > held(data)["val"]


def test_class_folders_of_cifar_hold_out_by_content_too_and_as_before_by_order(tmp_path):
    from datamodules.cifar10 import CLASSES

    for number in range(120):
        write(tmp_path / "c" / "train" / CLASSES[number % 10] / f"{number}.png", number)
        write(tmp_path / "c" / "test" / CLASSES[number % 10] / f"{number}.png", 1000 + number)

    def validation(**options):
        data = CIFAR10(str(tmp_path / "c"), cache_dir=str(tmp_path / "cache"), **options)
        monkey = ImageFolder(str(tmp_path / "c"), image_size=SIDE, cache_dir=str(tmp_path / "cache"))
        monkey.split_by = data.split_by
        data.__dict__["_folder"] = monkey
        data.prepare_data()
        return {row.numpy().tobytes() for row in data.split("val").images}

    before, old = validation(), validation(split_by="order")
    assert len(old) == 12 and 2 <= len(before) <= 30
    fresh = {write(tmp_path / "c" / "train" / CLASSES[0] / f"{n}.png", n) for n in range(5000, 5010)}
    pixels = {np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes() for path in fresh}
    assert validation() - pixels == before
    assert validation(split_by="order") - pixels != old


def test_a_checkpoint_of_before_keeps_its_split(tmp_path):
    for number in range(60):
        write(tmp_path / "d" / f"{number}.png", number)
    old = held(folder(tmp_path / "d", tmp_path / "cache", split_by="order"))
    data = folder(tmp_path / "d", tmp_path / "cache")
    assert held(data) != old
    data.continue_from({}, [])  # what such a checkpoint records of its data
    assert held(data) == old and data.identity()["split_by"] == "order"
    again = folder(tmp_path / "d", tmp_path / "cache")
    again.continue_from(data.identity(), [])  # and the next checkpoint of that run
    assert held(again) == old
    part = Subset(folder(tmp_path / "d", tmp_path / "cache"), 8)
    part.continue_from({}, [])
    assert held(part) == old


def test_other_data_than_the_checkpoints_is_told(tmp_path):
    for number in range(60):
        write(tmp_path / "d" / f"{number}.png", number)
    data = folder(tmp_path / "d", tmp_path / "cache")
    data.setup("fit")
    recorded = json.loads(json.dumps(data.identity()))
    data.compare_identity(recorded)  # the same: no warning, which would fail this test
    assert set(recorded) == {"class", "split_by", "bits", "train", "val"}
    write(tmp_path / "d" / "another.png", 4000)
    other = folder(tmp_path / "d", tmp_path / "cache")
    other.setup("fit")
    with pytest.warns(UserWarning, match=rf"trained on: {recorded['train']['count']} images .* then") as told:
        other.compare_identity(recorded)
    assert len(told) == 1  # what is held out is the same


# --- classes


def test_classes_sort_as_numbers_and_are_told_with_their_counts(tmp_path, caplog):
    for label in range(11):
        for number in range(label + 1):
            write(tmp_path / "d" / str(label) / f"{number}.png", 100 * label + number)
    with caplog.at_level("INFO"):
        data = folder(tmp_path / "d", tmp_path / "cache")
    assert data.class_names == [str(label) for label in range(11)]
    assert "66 images" in caplog.text and "10 = 10 (11)" in caplog.text and "0 = 0 (1)" in caplog.text
    assert len(caplog.text.splitlines()) <= 5


def test_classes_are_matched_by_name_and_a_renaming_is_refused(tmp_path):
    for label, name in enumerate(["cat", "dog", "eel"]):
        for number in range(8):
            write(tmp_path / "d" / name / f"{number}.png", 100 * label + number)
    data = folder(tmp_path / "d", tmp_path / "cache")
    images, labels = data.reference_images("train"), data.reference_labels("train")
    by_pixels = {row.tobytes(): data.class_names[label] for row, label in zip(images, labels, strict=True)}
    data.continue_from(data.identity(), ["eel", "cat", "dog"])  # the same names in another order
    assert data.class_names == ["eel", "cat", "dog"]
    for row, label in zip(data.reference_images("train"), data.reference_labels("train"), strict=True):
        assert by_pixels[row.tobytes()] == data.class_names[label]
    (tmp_path / "d" / "dog").rename(tmp_path / "d" / "animal")
    renamed = folder(tmp_path / "d", tmp_path / "cache")
    with pytest.raises(ValueError, match=r"without dog, and with animal instead"):
        renamed.continue_from({}, ["cat", "dog", "eel"])
    part = Subset(folder(tmp_path / "d", tmp_path / "cache"), 4)
    part.continue_from(part.identity(), ["eel", "cat", "animal"])
    assert part.class_names == ["eel", "cat", "animal"]


def test_a_stray_image_beside_classes_is_left_out_and_told(tmp_path, caplog):
    for name in "ab":
        for number in range(4):
            write(tmp_path / "d" / name / f"{number}.png", ord(name) * 10 + number)
    write(tmp_path / "d" / "stray.png", 1)
    with pytest.warns(UserWarning, match=r"stray.png lies beside the folders of the classes"):
        data = folder(tmp_path / "d", tmp_path / "cache")
    assert data.class_names == ["a", "b"] and len(data.cache.names) == 8
    for number in range(30):  # most lie beside: then folders are none
        write(tmp_path / "d" / f"{number}.png", 500 + number)
    with caplog.at_level("INFO"):
        data = folder(tmp_path / "d", tmp_path / "cache")
    assert data.class_names == [] and "31 images lie beside the 2 folders" in caplog.text


def test_a_class_of_gifs_is_read_and_one_of_files_that_are_not_is_told(tmp_path):
    for number in range(6):
        write(tmp_path / "d" / "png" / f"{number}.png", number)
        image = Image.open(tmp_path / "d" / "png" / f"{number}.png")
        (tmp_path / "d" / "gif").mkdir(exist_ok=True)
        image.convert("P").save(tmp_path / "d" / "gif" / f"{number}.gif")
        (tmp_path / "d" / "phone").mkdir(exist_ok=True)
        (tmp_path / "d" / "phone" / f"{number}.HEIC").write_bytes(b"heic")
    with pytest.warns(UserWarning, match=r"phone/ holds 6 .heic files, which are not read"):
        data = folder(tmp_path / "d", tmp_path / "cache")
    assert data.class_names == ["gif", "png"] and len(data.cache.names) == 12


# --- 16 bits


def deep_png(path, values):
    """A PNG of 16 bits per channel, grey or colour, written by hand: Pillow writes none in colour."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if values.ndim == 3 else 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(content))


@pytest.mark.parametrize("shape", [(SIDE, SIDE), (SIDE, SIDE, 3)])
def test_twelve_bits_in_sixteen_fill_the_range(tmp_path, caplog, shape):
    images = np.random.default_rng(0).integers(0, 4096, (6, *shape))
    for number, values in enumerate(images):
        deep_png(tmp_path / "d" / f"{number}.png", values)
    channels = 1 if len(shape) == 2 else 3
    with caplog.at_level("INFO"):
        data = folder(tmp_path / "d", tmp_path / "cache", channels=channels)
    made = {row.tobytes() for row in np.asarray(data.cache.images)}
    wanted = (images >> 4).astype(np.uint8).reshape(6, SIDE, SIDE, channels).transpose(0, 3, 1, 2)
    assert made == {np.ascontiguousarray(row).tobytes() for row in wanted}
    assert "of 16 bits per channel 12 are used" in caplog.text
    full = folder(tmp_path / "d", tmp_path / "cache", channels=channels, bits=16)
    assert int(np.asarray(full.cache.images).max()) == 15
    with pytest.raises(ValueError, match="holds the value .* set bits to 12"):
        folder(tmp_path / "d", tmp_path / "cache", channels=channels, bits=8)


# --- caches


def cached(root, cache):
    listing = list_images(str(root))
    return prepare(listing, {"train": listing.images}, Transform(SIDE), cache)


def test_damaged_pixels_and_a_damaged_index_are_told_and_made_anew(tmp_path):
    for number in range(20):
        write(tmp_path / "d" / f"{number}.png", number)
    before = cached(tmp_path / "d", tmp_path / "cache")
    wanted = np.array(before.images)
    (pixels,) = (tmp_path / "cache").glob("*/images.u8")
    (index,) = (tmp_path / "cache").glob("*/index.json")
    whole = {path: path.read_bytes() for path in (pixels, index)}
    generator = np.random.default_rng(0)
    for path in [pixels] * 4 + [index] * 12:
        content = bytearray(whole[path])
        content[generator.integers(len(content))] ^= 1 << generator.integers(8)
        path.write_bytes(content)
        with pytest.warns(UserWarning, match="are damaged; they are prepared anew"):
            after = cached(tmp_path / "d", tmp_path / "cache")
        assert np.array_equal(after.images, wanted) and after.checksum == before.checksum
        assert after.names == before.names
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")] == []


def test_two_hosts_without_locks_leave_each_other_alone(tmp_path, monkeypatch):
    """Another host writes the same cache, and finishes while this one decodes; no lock is honoured."""
    for number in range(20):
        write(tmp_path / "d" / f"{number}.png", number)
    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    first = cached(tmp_path / "d", tmp_path / "elsewhere")
    (place,) = [path for path in (tmp_path / "elsewhere").iterdir() if path.is_dir()]
    (tmp_path / "cache").mkdir()
    half = tmp_path / "cache" / f".{place.name}.0123abcd.1.89abcdef"  # what the other host is at
    half.mkdir()
    (half / "images.u8").write_bytes(b"half")
    from datamodules import cache as module

    decode_all = module.decode_all

    def while_the_other_finishes(*args, **options):
        (tmp_path / "elsewhere" / place.name).rename(tmp_path / "cache" / place.name)
        return decode_all(*args, **options)

    monkeypatch.setattr(module, "decode_all", while_the_other_finishes)
    second = cached(tmp_path / "d", tmp_path / "cache")
    assert np.array_equal(first.images, second.images) and second.checksum == first.checksum
    assert (half / "images.u8").read_bytes() == b"half"
    assert len(list((tmp_path / "cache").glob(f".{place.name}.*"))) == 1


def test_what_dead_processes_left_is_removed_and_what_living_write_is_not(tmp_path):
    place = tmp_path / "key"
    dead = subprocess.run(
        [sys.executable, "-c", f"from pathlib import Path; from diffusion_lit.storage.folders import scratch_of; "
         f"p = scratch_of(Path({str(place)!r})); p.mkdir(); print(p)"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    mine, foreign = scratch_of(place), tmp_path / ".key.00000000.77.00000000"
    old = tmp_path / ".key.00000001.77.00000000"
    for path in (mine, foreign, old):
        path.mkdir()
    os.utime(old, (1, 1))
    sweep(place)
    assert not os.path.exists(dead) and not old.exists() and mine.is_dir() and foreign.is_dir()
    publish(mine, place, lambda: False)
    assert place.is_dir() and not mine.exists()
    damaged = scratch_of(place)
    damaged.mkdir()
    (place / "x").write_text("damaged")
    publish(damaged, place, lambda: False)
    assert list(place.iterdir()) == []


# --- the first batch


def batch(images, label=None):
    return {"image": images} if label is None else {"image": images, "label": label}


GOOD = torch.rand(4, 3, 8, 8) * 2 - 1


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ((GOOD, torch.zeros(4)), "a tuple"),
        ({"pixels": GOOD}, "dict with pixels"),
        (batch(((GOOD + 1) * 127.5).byte()), "torch.uint8"),
        (batch((GOOD + 1) * 127.5), r"to 25\d.* x / 127.5 - 1"),
        (batch(GOOD[:, :1]), r"\(4, 1, 8, 8\); it must be \(B, 3, 8, 8\)"),
        (batch(GOOD[0]), r"\(3, 8, 8\)"),
        (batch(GOOD.masked_fill(GOOD > 0.9, float("nan"))), "nan"),
        (batch(GOOD), "10 classes, and a batch of the data no label"),
        (batch(GOOD, torch.zeros(4)), "torch.float32"),
        (batch(GOOD, torch.zeros(4, 1, dtype=torch.int64)), r"torch.int64 \(4, 1\)"),
        (batch(GOOD, torch.tensor([0, 1, 2, 10])), "label 10"),
        (batch(GOOD, torch.tensor([0, -1, 2, 9])), "label -1"),
    ],
)
def test_the_first_batch_is_checked(made, told):
    with pytest.raises(ValueError, match=told):
        check_batch(made, (3, 8, 8), 10)


def test_a_batch_in_another_range_is_told_and_a_right_one_is_not(recwarn):
    check_batch(batch(GOOD, torch.tensor([0, 1, 2, 9])), (3, 8, 8), 10)
    check_batch(batch(GOOD), (3, 8, 8), 0)
    assert len(recwarn) == 0
    for images, told in (((GOOD + 1) / 2, r"in \[0, 1\]"), (GOOD * 3, r"models expect \[-1, 1\]")):
        with pytest.warns(UserWarning, match=told):
            check_batch(batch(images), (3, 8, 8))


# --- from the command line


@pytest.fixture
def run(lightning, tmp_path):
    """A model of two class folders, trained for two steps; trains it on for one more."""
    for label, name in enumerate(["cat", "dog"]):
        for number in range(30):
            write(tmp_path / "pets" / name / f"{number}.png", 100 * label + number)

    def fit(steps, *args):
        lightning(
            *["fit", "--config", CONFIGS / "edm_digits.yaml", "--trainer.accelerator=cpu", "--trainer.callbacks=[]"],
            *["--data.class_path=datamodules.ImageFolder", f"--data.init_args.root={tmp_path / 'pets'}"],
            *["--data.init_args.image_size=8", "--data.init_args.batch_size=8", "--data.init_args.cache_processes=1"],
            *["--model.init_args.net.init_args.model_channels=16", "--model.init_args.sampling.num_steps=2"],
            *[f"--trainer.max_steps={steps}", "--trainer.enable_progress_bar=false", *args],
        )

    fit(2)
    return fit


def refusal(capsys, call):
    with pytest.raises(SystemExit) as stopped:
        call()
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_run_goes_on_with_its_own_classes_and_its_own_split(run, tmp_path, capsys, lightning):
    last = tmp_path / "runs/edm_digits/version_0/checkpoints/last.ckpt"
    content = torch.load(last, weights_only=True)
    recorded = content["diffusion_lit"]
    assert recorded["class_names"] == ["cat", "dog"] and len(recorded["data"]["train"]["sha256"]) == 64
    (tmp_path / "pets" / "dog").rename(tmp_path / "pets" / "animal")
    assert "without dog, and with animal instead" in refusal(capsys, lambda: run(3, "--ckpt_path=last"))
    evaluate = ["evaluate", "--ckpt_path", last, "--num_samples=4", "--extractor=pixels", "--per_class", "--out=e.json"]
    assert "without dog, and with animal instead" in refusal(capsys, lambda: lightning(*evaluate))
    (tmp_path / "pets" / "animal").rename(tmp_path / "pets" / "dog")
    recorded["class_names"] = ["dog", "cat"]  # as of a run that had numbered them so
    torch.save(content, last)
    contents = [path.read_bytes() for path in sorted((tmp_path / "pets" / "cat").iterdir())]
    trained_on = next(one for one in contents if 0x20 < hashlib.sha256(one).digest()[0] < 0xE0)
    (tmp_path / "pets" / "cat" / "another.png").write_bytes(trained_on)  # a copy, in the same split
    train = recorded["data"]["train"]["count"]
    with pytest.warns(UserWarning, match=rf"trained on: {train} images of ImageFolder .* then, {train + 1} of"):
        run(3, "--ckpt_path=last")
    again = torch.load(last, weights_only=True)["diffusion_lit"]
    assert again["class_names"] == ["dog", "cat"] and again["data"]["val"] == recorded["data"]["val"]


def test_a_checkpoint_of_before_goes_on_with_its_own_split(run, tmp_path):
    from diffusion_lit.modules.load import load_data

    last = tmp_path / "runs/edm_digits/version_0/checkpoints/last.ckpt"
    content = torch.load(last, weights_only=True)
    for name in ("data", "conditional"):
        content["diffusion_lit"].pop(name)
    for name in ("split_by", "bits"):
        content["datamodule_hyper_parameters"].pop(name)
    torch.save(content, last)
    old = held(folder(tmp_path / "pets", tmp_path / "cache2", split_by="order"))["val"]
    wide = {Image.open(path).resize((8, 8)).tobytes() for path in (tmp_path / "pets").rglob("*.png")}
    assert len(wide) == 60
    run(3, "--ckpt_path=last")
    assert torch.load(last, weights_only=True)["diffusion_lit"]["data"]["split_by"] == "order"
    data = load_data(last)
    data.prepare_data()
    assert len(data.split("val").images) == len(old) == 3
