"""Digits, MNIST, FashionMNIST, CIFAR-10, CelebA, single images: what they hold, and where it comes from."""

import hashlib
import http.server
import pickle
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.data_fixtures import CIFAR_NAMES, write_celeba, write_cifar10, write_class_folders, write_mnist
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from torchvision import datasets
from torchvision.transforms.functional import center_crop

from datamodules import CIFAR10, MNIST, CelebA, Digits, FashionMNIST, SingleImage
from datamodules.idx import read_idx
from datamodules.pickles import read_pickle


def test_digits_are_scikit_learns_split_1437_to_360():
    data = Digits()
    data.setup()
    train, val = data.reference_images("train"), data.reference_images("val")
    assert train.shape == (1437, 1, 8, 8) and val.shape == (360, 1, 8, 8) and train.dtype == torch.uint8
    counts = torch.bincount(data.reference_labels("val"))
    assert counts.min() >= 35 and counts.max() <= 37
    values, labels = load_digits(return_X_y=True)
    every = sorted((row.tobytes(), label) for row, label in zip(values.astype(np.uint8), labels.tolist(), strict=True))
    images, classes = data.reference_images("train+val"), data.reference_labels("train+val")
    levels = (images.float() * 16 / 255).round().to(torch.uint8).flatten(1).numpy()
    assert sorted((row.tobytes(), label) for row, label in zip(levels, classes.tolist(), strict=True)) == every
    assert torch.equal(Digits().reference_images("val"), val)
    assert torch.equal(data.reference_images("test"), val)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", [".", "raw", "MNIST/raw"])
def test_mnist_reads_what_torchvision_reads(tmp_path, where, zipped):
    held = write_mnist(tmp_path / where, zipped=zipped)
    data = MNIST(str(tmp_path), image_size=28, download=False)
    data.prepare_data()
    data.setup()
    train, val, test = (data.reference_images(split) for split in ("train", "val", "test"))
    assert len(train) == 108 and len(val) == 12 and len(test) == 40
    assert np.array_equal(test[:, 0].numpy(), held["t10k-images-idx3-ubyte"])
    assert np.array_equal(data.reference_labels("test").numpy(), held["t10k-labels-idx1-ubyte"])
    every = held["train-images-idx3-ubyte"]
    assert sorted(map(bytes, torch.cat([train, val]).numpy())) == sorted(map(bytes, every))
    if where == "MNIST/raw" and not zipped:
        theirs = datasets.MNIST(str(tmp_path), train=False)
        assert torch.equal(theirs.data, test[:, 0]) and torch.equal(theirs.targets, data.reference_labels("test"))


def test_mnist_has_a_border_at_32_and_names(tmp_path):
    write_mnist(tmp_path)
    data = FashionMNIST(str(tmp_path), batch_size=16)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (16, 1, 32, 32) and data.image_shape == (1, 32, 32)
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:30, 2:30] = False
    assert (batch["image"][..., border] == -1).all()
    assert data.num_classes == 10 and data.class_names[9] == "Ankle boot"
    narrow = FashionMNIST(str(tmp_path), image_size=28).reference_images("train")
    assert torch.equal(data.reference_images("train")[..., 2:30, 2:30], narrow)


def test_official_sizes_split_55000_to_5000(tmp_path):
    write_mnist(tmp_path, train=60000, test=10)
    data = MNIST(str(tmp_path))
    assert len(data.reference_images("train")) == 55000 and len(data.reference_images("val")) == 5000


def test_validation_split_does_not_depend_on_the_seed(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    first = MNIST(str(tmp_path)).fingerprint("val")
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    torch.manual_seed(7)
    assert MNIST(str(tmp_path)).fingerprint("val") == first
    assert MNIST(str(tmp_path)).fingerprint("train") != first
    assert MNIST(str(tmp_path), image_size=28).fingerprint("val") != first


def test_nothing_held_out_means_no_validation(tmp_path):
    write_mnist(tmp_path)
    data = MNIST(str(tmp_path), val_size=0)
    data.setup("fit")
    assert len(data.reference_images("train")) == 120 and data.val_dataloader() == []


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine over the folder "mirror"; gives its address."""
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "mirror").mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "mirror"))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}/"
        made.shutdown()


def mirror(monkeypatch, source, address: str, folder: Path) -> None:
    """Makes torchvision's class download from the server, with the checksums of what lies there."""
    monkeypatch.setattr(source, "mirrors", [address + "nowhere/", address])
    monkeypatch.setattr(source, "resources", [(name, md5(folder / name)) for name, _ in source.resources])


def test_mnist_downloads_from_the_next_mirror_and_only_once(tmp_path, monkeypatch, server):
    held = write_mnist(tmp_path / "mirror")
    mirror(monkeypatch, datasets.MNIST, server, tmp_path / "mirror")
    data = MNIST(str(tmp_path / "root"))
    data.prepare_data()
    raw = tmp_path / "root" / "MNIST" / "raw"
    assert sorted(path.name for path in raw.iterdir()) == sorted(name for name, _ in datasets.MNIST.resources)
    shutil.rmtree(tmp_path / "mirror")
    again = MNIST(str(tmp_path / "root"), image_size=28)
    again.prepare_data()
    assert np.array_equal(again.reference_images("test")[:, 0].numpy(), held["t10k-images-idx3-ubyte"])


def test_mnist_download_with_a_wrong_checksum_leaves_nothing(tmp_path, monkeypatch, server):
    write_mnist(tmp_path / "mirror")
    mirror(monkeypatch, datasets.MNIST, server, tmp_path / "mirror")
    victim = tmp_path / "mirror" / "train-labels-idx1-ubyte.gz"
    victim.write_bytes(victim.read_bytes()[:-3] + b"abc")
    with pytest.raises(FileNotFoundError, match=r"the download failed.*not found or corrupted"):
        MNIST(str(tmp_path / "root")).prepare_data()
    left = [path.name for path in (tmp_path / "root" / "MNIST" / "raw").iterdir()]
    assert left == ["train-images-idx3-ubyte.gz"]  # the one before it, whole


def test_missing_files_are_told_with_where_and_how(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError) as told:
        MNIST(str(tmp_path), download=False).prepare_data()
    message = str(told.value)
    assert "needs t10k-labels-idx1-ubyte (or with .gz)" in message
    assert str(tmp_path / "MNIST" / "raw") in message and "point root at" in message


def test_cifar10_reads_what_torchvision_reads(tmp_path, monkeypatch):
    held = write_cifar10(tmp_path)
    with pytest.warns(UserWarning, match="data_batch_1, .*data_batch_5 differ from the official"):
        data = CIFAR10(str(tmp_path), download=False)
        data.prepare_data()
        data.setup()
    test, labels = held["test_batch"]
    assert np.array_equal(data.reference_images("test").numpy(), test.reshape(-1, 3, 32, 32))
    assert data.reference_labels("test").tolist() == labels
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.CIFAR10, "_load_meta", lambda self: None)
    theirs = datasets.CIFAR10(str(tmp_path), train=True)
    mine = data.reference_images("train+val")
    assert sorted(map(bytes, mine.permute(0, 2, 3, 1).numpy())) == sorted(map(bytes, theirs.data))
    assert len(data.reference_images("train")) == 90 and len(data.reference_images("val")) == 10
    assert data.class_names == list(CIFAR_NAMES)


def test_cifar10_root_may_be_the_folder_itself(tmp_path):
    write_cifar10(tmp_path)
    with pytest.warns(UserWarning, match="differs from the official files"):
        assert len(CIFAR10(str(tmp_path / "cifar-10-batches-py")).reference_images("test")) == 20


def test_official_checksum_is_not_announced(tmp_path, monkeypatch, recwarn):
    write_cifar10(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    sums = [["test_batch", md5(folder / "test_batch")]]
    monkeypatch.setitem(__import__("datamodules.cifar10").cifar10.FILES, "test", sums)
    CIFAR10(str(tmp_path)).reference_images("test")
    assert not [warning for warning in recwarn if "official" in str(warning.message)]


def test_cifar10_downloads_and_unpacks(tmp_path, monkeypatch, server):
    held = write_cifar10(tmp_path / "made")
    archive = tmp_path / "mirror" / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "made" / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(datasets.CIFAR10, "url", server + archive.name)
    with pytest.raises(FileNotFoundError, match="the download failed"):  # not the official archive
        CIFAR10(str(tmp_path / "root")).prepare_data()
    assert not list((tmp_path / "root").iterdir())
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(archive))
    data = CIFAR10(str(tmp_path / "root"))
    data.prepare_data()
    with pytest.warns(UserWarning, match="differs from the official files"):
        assert np.array_equal(data.reference_images("test").numpy().reshape(-1, 3072), held["test_batch"][0])


def test_cifar10_from_class_folders(tmp_path):
    write_class_folders(tmp_path / "data", per_class=3)
    data = CIFAR10(str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"), download=False)
    data.prepare_data()
    data.setup()
    assert len(data.reference_images("train+val")) == 30 and len(data.reference_images("test")) == 30
    assert torch.equal(torch.bincount(data.reference_labels("test")), torch.full((10,), 3))
    for image, label in zip(data.reference_images("test"), data.reference_labels("test"), strict=True):
        folder = tmp_path / "data" / "test" / CIFAR_NAMES[label]
        images = [np.asarray(Image.open(path)).transpose(2, 0, 1) for path in folder.iterdir()]
        assert any(np.array_equal(image.numpy(), candidate) for candidate in images)


def test_cifar10_says_what_it_looked_for(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"data_batch_1 to data_batch_5.*class folders.*download is off.*point root"
    ):
        CIFAR10(str(tmp_path), download=False).prepare_data()
    write_class_folders(tmp_path, names=["airplane", "zebra"])
    with pytest.raises(ValueError, match="class folders airplane, zebra, not CIFAR-10's"):
        CIFAR10(str(tmp_path), download=False).prepare_data()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_restricted_pickles_hold_arrays_of_every_protocol(tmp_path, protocol):
    path = tmp_path / "batch"
    held = {"a": np.arange(12, dtype=np.uint8).reshape(3, 4), "b": np.arange(6.0).reshape(2, 3).T, "c": [1, (2, {3})]}
    held["d"] = np.arange(3, dtype=">i4")
    path.write_bytes(pickle.dumps(held, protocol))
    found = read_pickle(path)
    found = {key.decode() if isinstance(key, bytes) else key: value for key, value in found.items()}
    assert found["c"] == held["c"]
    for key in "abd":
        assert np.array_equal(found[key], held[key]) and found[key].dtype == held[key].dtype


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("lists", ["txt", "csv"])
def test_celeba_follows_the_partition_and_the_attributes(tmp_path, zipped, lists):
    rows = write_celeba(tmp_path / "celeba", zipped=zipped, lists=lists)
    data = CelebA(
        str(tmp_path / "celeba"), batch_size=4, image_size=128, attributes=["Smiling", "Male"],
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    assert data.class_names == ["not Smiling, not Male", "Smiling, not Male", "not Smiling, Male", "Smiling, Male"]
    data.prepare_data()
    data.setup()
    for number, split in enumerate(("train", "val", "test")):
        expected = [smiling + 2 * male for part, (male, smiling, _) in rows if part == number]
        assert data.reference_labels(split).tolist() == expected
        assert data.reference_images(split).shape == (len(expected), 3, 128, 128)


@pytest.mark.parametrize("crop", [140, 178])
def test_celeba_crops_the_centre(tmp_path, crop):
    write_celeba(tmp_path / "celeba")
    data = CelebA(str(tmp_path / "celeba"), crop=crop, cache_dir=str(tmp_path / "cache"))
    assert data.num_classes == 0 and data.image_shape == (3, 64, 64)
    image = data.reference_images("train")[0]
    with Image.open(tmp_path / "celeba" / "img_align_celeba" / "000001.jpg") as picture:
        expected = center_crop(picture.convert("RGB"), crop).resize((64, 64), Image.Resampling.LANCZOS)
    assert np.abs(image.astype(int) - np.asarray(expected).transpose(2, 0, 1)).max() <= 1


def test_celeba_leaves_out_what_the_folder_does_not_have(tmp_path):
    write_celeba(tmp_path / "celeba")
    (tmp_path / "celeba" / "img_align_celeba" / "000002.jpg").unlink()
    data = CelebA(str(tmp_path / "celeba"), cache_dir=str(tmp_path / "cache"), attributes=["Young"])
    with pytest.warns(UserWarning, match=r"1 image was skipped: 000002.jpg is in the partition but not in"):
        data.prepare_data()
    assert sum(len(data.reference_images(split)) for split in ("train", "val", "test")) == 11
    with pytest.raises(ValueError, match=r"000002.jpg .* strict is true"):
        CelebA(str(tmp_path / "celeba"), cache_dir=str(tmp_path / "cache"), strict=True).prepare_data()


@pytest.mark.parametrize("image", ["flower", "china"])
def test_single_image_is_the_photograph(image):
    data = SingleImage(image, image_size=64, copies=96)
    data.setup("fit")
    assert len(data.train_dataloader()) == 3
    batch = next(iter(data.train_dataloader()))["image"]
    assert batch.shape == (32, 3, 64, 64) and (batch == batch[0]).all()
    whole = Image.fromarray(load_sample_image(f"{image}.jpg"))
    expected = center_crop(whole, 427).resize((64, 64), Image.Resampling.LANCZOS)
    shown = ((batch[0] + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(shown - np.asarray(expected)).mean() < 2
    assert len(data.reference_images("val")) == 64 and data.num_classes == 0


def test_single_image_patches_are_parts_of_the_image_and_change(tmp_path):
    Image.fromarray(np.arange(48 * 48, dtype=np.uint16).reshape(48, 48) % 251).convert("L").save(tmp_path / "a.png")
    data = SingleImage(str(tmp_path / "a.png"), 8, 16, copies=16, patches=48, channels=1)
    data.setup("fit")
    windows = data.pixels().unfold(1, 16, 1).unfold(2, 16, 1).reshape(-1, 16, 16)
    known = set(map(bytes, windows.numpy()))
    loader, seen = data.train_dataloader(), []
    for epoch in range(2):
        loader.set_epoch(epoch)
        seen += [bytes(image) for batch in loader for image in ((batch["image"] + 1) * 127.5).round().byte().numpy()]
    assert set(seen) <= known and len(set(seen)) > 25


def test_single_image_refuses_what_it_cannot_use(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match=r"small.png is 20x20 pixels, smaller than 32x32; set upscale to true"):
        SingleImage(str(tmp_path / "small.png")).prepare_data()
    SingleImage(str(tmp_path / "small.png"), upscale=True).prepare_data()
    with pytest.raises(FileNotFoundError, match=r"There is no image nowhere.png.*flower or china"):
        SingleImage("nowhere.png").prepare_data()
    with pytest.raises(ValueError, match="copies is 5"):
        SingleImage(copies=5)
    with pytest.raises(ValueError, match="patches is 32"):
        SingleImage(patches=32)


def test_values_out_of_range_are_refused():
    for make, match in (
        (lambda: MNIST(image_size=64), "image_size is 64"),
        (lambda: MNIST(val_size=-1), "val_size is -1"),
        (lambda: CIFAR10(val_size=-1), "val_size is -1"),
        (lambda: CelebA(image_size=48), "image_size is 48"),
        (lambda: CelebA(crop=150), "crop is 150"),
        (lambda: CelebA(attributes=["a", "a"]), "attributes is"),
        (lambda: Digits().split("dev"), "no split 'dev'"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


def test_big_endian_and_other_types_of_idx_are_told_apart(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 1, 2]) + bytes(258))
    assert len(read_idx(path, 1)) == 258
