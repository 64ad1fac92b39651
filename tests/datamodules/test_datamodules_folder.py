"""Folders, zips and globs of images: what their layout means, and the cache that is written once and whole."""

import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.data_fixtures import make_image, write_class_folders, zip_folder
from PIL import Image

from datamodules import ImageFolder, Landscapes, decode_pool
from datamodules.cache import prepare
from datamodules.decode import Transform, decode
from datamodules.sources import list_images


def make(root, tmp_path, **options) -> ImageFolder:
    defaults = dict(batch_size=2, image_size=16, cache_dir=str(tmp_path / "cache"))
    data = ImageFolder(str(root) if isinstance(root, Path) else root, **{**defaults, **options})
    data.prepare_data()
    data.setup()
    return data


def write_flat(folder: Path, count: int, size=(24, 20)) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:05d}.png" for number in range(count)]
    for number, path in enumerate(paths):
        make_image(size, seed=number).save(path)
    return paths


def expected(path: Path, **options) -> bytes:
    with path.open("rb") as file:
        return decode(file, Transform(16, **options)).tobytes()


def contents(data: ImageFolder, split: str) -> list[bytes]:
    return sorted(image.tobytes() for image in np.asarray(data.reference_images(split)))


def test_flat_folder_is_split_and_has_no_classes(tmp_path):
    paths = write_flat(tmp_path / "data", 60)
    data = make(tmp_path / "data", tmp_path, split_by="order")
    assert data.num_classes == 0 and data.reference_labels("train") is None and data.image_shape == (3, 16, 16)
    assert [len(data.reference_images(split)) for split in ("train", "val", "test")] == [54, 3, 3]
    together = [image for split in ("train", "val", "test") for image in contents(data, split)]
    assert sorted(together) == sorted(map(expected, paths))
    images = data.reference_images("train")
    assert isinstance(images, np.memmap) and images.flags.writeable  # of others torch warns
    before = images[0].copy()
    images[0] = 0  # in this process alone
    assert (make(tmp_path / "data", tmp_path, split_by="order").reference_images("train")[0] == before).all()
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 16, 16) and "label" not in batch


def test_split_by_order_is_as_it_was_before_the_split_by_content(tmp_path):
    write_flat(tmp_path / "data", 100)
    before = make(tmp_path / "data", tmp_path, split_by="order")
    held = set(contents(before, "val") + contents(before, "test"))
    make_image((24, 20), seed=5000).save(tmp_path / "data" / "another.png")
    after = make(tmp_path / "data", tmp_path, split_by="order")
    assert len(held & set(contents(after, "val") + contents(after, "test"))) >= 9
    again = make(tmp_path / "data", tmp_path, val_fraction=0.2, test_fraction=0, split_by="order")
    assert len(again.reference_images("val")) == 20 and contents(again, "test") == contents(again, "val")


def test_class_folders_make_labels(tmp_path):
    write_class_folders(tmp_path / "data", ["dog", "cat", "ape"], per_class=6, size=(20, 20), parts=())
    data = make(tmp_path / "data", tmp_path)
    assert data.class_names == ["ape", "cat", "dog"] and data.num_classes == 3
    for split in ("train", "val"):
        for image, label in zip(data.reference_images(split), data.reference_labels(split), strict=True):
            folder = tmp_path / "data" / data.class_names[label]
            assert image.tobytes() in [expected(path) for path in folder.iterdir()]
    assert make(tmp_path / "data", tmp_path, use_labels=False).class_names == []


def test_splits_on_disk_are_used(tmp_path):
    write_class_folders(tmp_path / "data", ["a", "b"], per_class=4, size=(20, 20), parts=("train", "valid", "test"))
    data = make(tmp_path / "data", tmp_path)
    assert [len(data.reference_images(split)) for split in ("train", "val", "test")] == [8, 8, 8]
    for part, split in (("train", "train"), ("valid", "val"), ("test", "test")):
        assert contents(data, split) == sorted(map(expected, (tmp_path / "data" / part).rglob("*.png")))


def test_missing_split_is_taken_from_training(tmp_path):
    write_class_folders(tmp_path / "data", ["a", "b"], per_class=10, size=(20, 20))
    data = make(tmp_path / "data", tmp_path, val_fraction=1e-9)  # one at the least
    assert [len(data.reference_images(split)) for split in ("train", "val", "test")] == [19, 1, 20]


def test_images_outside_the_layout_are_counted_out(tmp_path):
    write_class_folders(tmp_path / "data", ["a", "b"], per_class=4, size=(20, 20))
    make_image((20, 20)).save(tmp_path / "data" / "stray.png")
    (tmp_path / "data" / "test" / "zebra").mkdir()
    make_image((20, 20)).save(tmp_path / "data" / "test" / "zebra" / "1.png")
    with pytest.warns(
        UserWarning, match=r"2 images were skipped: stray.png lies beside.*zebra/1.png lies in the folder of"
    ):
        data = make(tmp_path / "data", tmp_path)
    assert len(data.reference_images("test")) == 8


@pytest.mark.parametrize("depth", ["", "only/one/way/"])
def test_folders_around_everything_mean_nothing(tmp_path, depth):
    write_class_folders(tmp_path / "data" / depth, ["a", "b"], per_class=4, size=(20, 20), parts=())
    assert make(tmp_path / "data", tmp_path).class_names == ["a", "b"]
    one = tmp_path / "one" / depth / "breed"
    write_flat(one, 5)
    assert make(tmp_path / "one", tmp_path).class_names == []


def test_zip_is_as_its_folder(tmp_path):
    write_class_folders(tmp_path / "data", ["a", "b"], per_class=6, size=(20, 20), parts=())
    folder = make(tmp_path / "data", tmp_path)
    before = {split: np.array(folder.reference_images(split)) for split in ("train", "val")}
    zip_folder(tmp_path / "data", tmp_path / "data.zip")
    data = make(tmp_path / "data.zip", tmp_path, cache_dir=str(tmp_path / "other"))
    assert data.class_names == ["a", "b"] and data.fingerprint("train") == folder.fingerprint("train")
    for split, images in before.items():
        assert np.array_equal(images, data.reference_images(split))


def test_globs_choose(tmp_path):
    for breed in ("n1-Terrier", "n2-Beagle", "n3-Fox_terrier"):
        write_flat(tmp_path / "dogs" / breed / "deep", 6)
    one = make(f"{tmp_path}/dogs/*Beagle", tmp_path)
    assert len(one.cache.names) == 6
    both = make([f"{tmp_path}/dogs/n1*/**", f"{tmp_path}/dogs/n3*/deep/0000[0-2].png"], tmp_path)
    assert len(both.cache.names) == 9 and both.class_names == ["n1-Terrier", "n3-Fox_terrier"]
    deep = make(f"{tmp_path}/**/0000[12].png", tmp_path)
    assert len(deep.cache.names) == 6
    with pytest.raises(FileNotFoundError, match=r"No image matches '.*cats.*'"):
        make([f"{tmp_path}/dogs/n1*", f"{tmp_path}/cats/*"], tmp_path)


def test_links_are_followed_once(tmp_path):
    write_flat(tmp_path / "elsewhere", 4)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere" / "self").symlink_to(tmp_path / "elsewhere" / "self")
    assert len(list_images(str(tmp_path / "data")).images) == 4
    assert len(list_images(f"{tmp_path}/data/**").images) == 4


def test_hidden_files_are_passed_over(tmp_path):
    write_flat(tmp_path / "data", 3)
    write_flat(tmp_path / "data" / ".hidden", 3)
    write_flat(tmp_path / "data" / "__MACOSX", 3)
    (tmp_path / "data" / "._00001.png").write_bytes(b"resource fork")
    assert len(list_images(str(tmp_path / "data")).images) == 3


def test_landscapes_is_a_preset_without_classes(tmp_path):
    write_class_folders(tmp_path / "data", ["a", "b"], per_class=6, size=(70, 90), parts=())
    data = Landscapes(str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"), batch_size=4)
    data.prepare_data()
    assert data.num_classes == 0 and data.image_shape == (3, 64, 64) and data.random_flip


def test_a_image_is_decoded_once(tmp_path, monkeypatch):
    paths = write_flat(tmp_path / "data", 10)
    make(tmp_path / "data", tmp_path)
    monkeypatch.setattr("datamodules.decode_pool.decode", lambda *_: pytest.fail("decoded again"))
    make(tmp_path / "data", tmp_path, val_fraction=0.1, batch_size=3, random_flip=False)
    monkeypatch.undo()
    caches = set((tmp_path / "cache").glob("*/images.u8"))
    make(tmp_path / "data", tmp_path, resize="area")  # another transform
    make_image((24, 20), seed=77).save(paths[0])
    os.utime(paths[0], ns=(1, 1))  # another image
    assert contents(make(tmp_path / "data", tmp_path), "train") != []
    assert len(set((tmp_path / "cache").glob("*/images.u8")) - caches) == 2


def test_several_processes_do_what_one_does(tmp_path):
    write_flat(tmp_path / "data", 150)
    (tmp_path / "data" / "00077.png").write_bytes(b"no image")
    listing = list_images(str(tmp_path / "data"))
    caches = []
    for processes in (1, 3):
        with pytest.warns(UserWarning, match="1 image was skipped: 00077.png is not an image"):
            caches.append(
                prepare(listing, {"train": listing.images}, Transform(16), tmp_path / str(processes), False, processes)
            )
    assert caches[0].checksum == caches[1].checksum and caches[0].names == caches[1].names
    assert np.array_equal(caches[0].images, caches[1].images) and len(caches[0].names) == 149
    for row in (0, 76, 77, 148):
        assert caches[1].images[row].tobytes() == expected(tmp_path / "data" / caches[1].names[row])


def test_a_process_that_dies_costs_one_image(tmp_path, monkeypatch):
    paths = write_flat(tmp_path / "data", 100)
    victim = paths[40].stat().st_size
    original = decode

    def fatal(file, *rest):
        if os.fstat(file.fileno()).st_size == victim and file.name.endswith("00040.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(file, *rest)

    monkeypatch.setattr("datamodules.decode_pool.decode", fatal)
    with pytest.warns(UserWarning, match=r"1 image was skipped: 00040.png ended the process that decoded it"):
        data = make(tmp_path / "data", tmp_path, cache_processes=3)
    assert len(data.cache.names) == 99
    for name, image in zip(data.cache.names, data.cache.images, strict=True):
        assert image.tobytes() == expected(tmp_path / "data" / name)


def test_strict_stops_at_the_first_bad_image_and_caches_nothing(tmp_path):
    for count in (10, 100):
        folder = tmp_path / str(count)
        write_flat(folder, count)
        (folder / "00003.png").write_bytes(b"")
        for _ in range(2):
            with pytest.raises(ValueError, match=r"00003.png is not an image.*strict is true"):
                make(folder, tmp_path, strict=True, cache_processes=2)
            assert not list((tmp_path / "cache").glob("*/index.json"))
    with pytest.warns(UserWarning, match="1 image was skipped"):
        make(tmp_path / "10", tmp_path)
    with pytest.raises(ValueError, match=r"00003.png is not an image.*strict is true"):  # from the cache
        make(tmp_path / "10", tmp_path, strict=True)


def test_small_images_are_left_out_or_enlarged(tmp_path):
    write_flat(tmp_path / "data", 20)
    make_image((8, 8)).save(tmp_path / "data" / "tiny.png")
    with pytest.warns(UserWarning, match=r"1 image was skipped: tiny.png is 8x8 pixels, smaller than 16x16"):
        assert len(make(tmp_path / "data", tmp_path).cache.names) == 20
    assert len(make(tmp_path / "data", tmp_path, upscale=True).cache.names) == 21
    for size, options, way in (
        (64, {}, "24x20 pixels, smaller than 64x64.* are taken in by upscale true or a smaller image_size"),
        (20, {"crops": 1}, "smallest crop 10, less than 20.* or a larger smallest_crop"),
        (16, {"crop": 40}, "smaller than the crop of 40.* by a smaller crop"),
    ):
        with pytest.raises(ValueError, match=rf"No image of .*{way}"):
            _ = make(tmp_path / "data", tmp_path, image_size=size, **options).cache


def test_too_few_images_to_hold_some_out(tmp_path):
    write_flat(tmp_path / "data", 2)
    with pytest.raises(ValueError, match="has 2 images to train on, too few to hold 2 out"):
        make(tmp_path / "data", tmp_path)
    data = make(tmp_path / "data", tmp_path, val_fraction=0, test_fraction=0)
    assert len(data.reference_images("train")) == 2 and data.val_dataloader() == []


def test_damaged_cache_is_written_anew(tmp_path):
    write_flat(tmp_path / "data", 10)
    first = make(tmp_path / "data", tmp_path).fingerprint("train")
    (images,) = (tmp_path / "cache").glob("*/images.u8")
    images.write_bytes(images.read_bytes()[:-1])
    assert make(tmp_path / "data", tmp_path).fingerprint("train") == first
    (images,) = (tmp_path / "cache").glob("*/images.u8")
    images.with_name("index.json").write_text("{")
    assert make(tmp_path / "data", tmp_path).fingerprint("train") == first


@pytest.mark.parametrize("count", [10, 80])  # in this process, and in several
def test_on_a_full_disk_the_work_goes_on_from_memory_with_the_same_pixels(tmp_path, monkeypatch, count):
    write_flat(tmp_path / "data", count)
    (tmp_path / "data" / "broken.png").write_bytes(b"no image")
    kept = make(tmp_path / "data", tmp_path)
    pixels, fingerprint = np.array(kept.split("train").images), kept.fingerprint("train")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    data = ImageFolder(str(tmp_path / "data"), 2, 16, cache_dir=str(tmp_path / "full"))
    with pytest.warns(UserWarning, match=r"cannot be prepared in .*full.*GiB are free.*into its memory"):
        assert (data.split("train").images == pixels).all()
    assert data.fingerprint("train") == fingerprint
    assert [skip.name for skip in data.cache.skipped] == ["broken.png"]
    assert not list((tmp_path / "full").glob(".*"))

    monkeypatch.setattr("datamodules.cache.fits_in_memory", lambda size: False)
    with pytest.raises(ValueError, match=r"cannot be prepared in .*full.*set cache_dir"):
        _ = ImageFolder(str(tmp_path / "data"), 2, 16, cache_dir=str(tmp_path / "full")).cache


def test_it_can_be_sent_to_another_process(tmp_path):
    write_class_folders(tmp_path / "data", ["a", "b"], per_class=6, size=(20, 20), parts=())
    zip_folder(tmp_path / "data", tmp_path / "data.zip")
    data = make(tmp_path / "data.zip", tmp_path)
    sent = pickle.dumps(data)
    assert len(sent) < 10_000
    assert torch.equal(pickle.loads(sent).split("train").labels, data.split("train").labels)


def cache_slowly(root: Path, cache: Path, processes: int, log: Path) -> None:
    """Prepares a folder, slowly, and logs each image that is decoded."""
    original = decode_pool.decode

    def slow(file, *rest):
        with log.open("a") as lines:
            lines.write(f"{os.path.basename(file.name)}\n")
        time.sleep(0.01)
        return original(file, *rest)

    decode_pool.decode = slow
    ImageFolder(str(root), 2, 16, cache_dir=str(cache), cache_processes=processes).prepare_data()


def start(*arguments) -> multiprocessing.Process:
    child = multiprocessing.get_context("fork").Process(target=cache_slowly, args=arguments)
    child.start()
    return child


def wait_for(condition, seconds=60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("processes", [1, 3])
def test_killed_while_caching_leaves_nothing_that_counts(tmp_path, processes):
    write_flat(tmp_path / "data", 150)
    cache, log = tmp_path / "cache", tmp_path / "log"
    child = start(tmp_path / "data", cache, processes, log)
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 40)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert list(cache.glob(".*/images.u8")) and not list(cache.glob("*/index.json"))
    assert not [path for path in cache.iterdir() if path.is_dir() and not path.name.startswith(".")]
    data = make(tmp_path / "data", tmp_path)  # waits until the last orphan has let go of the lock, and sweeps
    done = len(log.read_text().splitlines())
    assert done < 150
    assert not list(cache.glob(".*")) and len(data.cache.names) == 150
    every = [image for split in ("train", "val", "test") for image in contents(data, split)]
    assert sorted(every) == sorted(expected(path) for path in (tmp_path / "data").iterdir())
    time.sleep(0.1)
    assert len(log.read_text().splitlines()) == done  # no orphan works on


def test_two_runs_at_once_do_the_work_once(tmp_path):
    write_flat(tmp_path / "data", 80)
    log = tmp_path / "log"
    children = [start(tmp_path / "data", tmp_path / "cache", processes, log) for processes in (1, 2)]
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert sorted(log.read_text().split()) == [f"{number:05d}.png" for number in range(80)]
    assert len(list((tmp_path / "cache").glob("*/index.json"))) == 1


def peak_memory_of(function, *arguments) -> float:
    """The highest resident memory, in MiB, of a child process that calls a function."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def run() -> None:
        function(*arguments)
        theirs.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

    child = context.Process(target=run)
    child.start()
    theirs.close()
    child.join(300)
    assert child.exitcode == 0
    return ours.recv()


def write_huge(folder: Path, mode: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stripe = make_image((12000, 100), mode=mode)
    image = Image.new(mode, (12000, 9000))
    for top in range(0, 9000, 100):
        image.paste(stripe, (0, top))
    image.save(folder / "huge.jpg" if mode == "RGB" else folder / "huge.png", compress_level=1)


def read_huge(folder: Path, cache: Path) -> None:
    listing = list_images(str(folder))
    done = prepare(listing, {"train": listing.images}, Transform(64), cache)
    assert len(done.names) == len(listing.images)


def test_huge_jpeg_stays_within_two_gigabytes(tmp_path):
    child = multiprocessing.get_context("fork").Process(target=write_huge, args=(tmp_path / "data", "RGB"))
    child.start()
    child.join()
    assert peak_memory_of(read_huge, tmp_path / "data", tmp_path / "cache") < 2048


@pytest.mark.slow
def test_huge_png_with_alpha_stays_within_two_gigabytes(tmp_path):
    child = multiprocessing.get_context("fork").Process(target=write_huge, args=(tmp_path / "data", "RGBA"))
    child.start()
    child.join()
    assert peak_memory_of(read_huge, tmp_path / "data", tmp_path / "cache") < 2048


def read_many(folder: Path, cache: Path) -> None:
    data = ImageFolder(str(folder), 256, 32, cache_dir=str(cache))
    data.prepare_data()
    data.setup("fit")
    for _ in data.train_dataloader():
        pass


@pytest.mark.slow
def test_hundred_thousand_images_stay_within_two_gigabytes(tmp_path):
    for number in range(100):
        folder = tmp_path / "data" / f"{number:03d}"
        folder.mkdir(parents=True)
        make_image((40, 36), seed=number).save(folder / "0000.jpg")
        for link in range(1, 1000):
            os.link(folder / "0000.jpg", folder / f"{link:04d}.jpg")
    assert peak_memory_of(read_many, tmp_path / "data", tmp_path / "cache") < 2048
    (index,) = (tmp_path / "cache").glob("*/index.json")
    assert json.loads(index.read_text())["shape"] == [100_000, 3, 32, 32]
    shutil.rmtree(tmp_path / "data")


def test_a_class_without_a_training_image_is_told(tmp_path):
    write_class_folders(tmp_path / "data", ("a", "b", "c"), per_class=1, size=(20, 20), parts=())
    data = make(tmp_path / "data", tmp_path, batch_size=1)  # one image each to train on, validate and test
    with pytest.warns(UserWarning, match=r"2 classes have no training image: ., .\..*use_labels to false"):
        data.train_dataloader()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(tmp_path / "data", tmp_path, batch_size=1, use_labels=False).train_dataloader()
