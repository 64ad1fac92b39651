"""Pairs of images from two folders: who belongs to whom, what a batch holds, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import ImageFolder, PairedFolder


def write(folder, count=24, ending="png", channels=3, offset=0):
    """Images of one colour each, whose first byte is their number and what is added to it."""
    folder.mkdir(parents=True)
    for index in range(count):
        pixels = np.full((8, 8, 3), 10, np.uint8)
        pixels[:, :4] = index + offset  # lopsided, so that a mirrored one is known
        image = Image.fromarray(pixels)
        (image if channels == 3 else image.convert("L")).save(folder / f"{index:03d}.{ending}")
    return folder


@pytest.fixture
def data(tmp_path):
    write(tmp_path / "photos", 24)
    write(tmp_path / "sketches", 25, "bmp", channels=1, offset=100)  # one more, which nobody asks for
    made = PairedFolder(
        str(tmp_path / "photos"),
        str(tmp_path / "sketches"),
        given_channels=1,
        batch_size=8,
        image_size=8,
        val_fraction=0.2,
        test_fraction=0.2,
        cache_dir=str(tmp_path / "cache"),
        cache_processes=1,
    )
    made.prepare_data()
    return made


def test_each_image_comes_with_the_one_of_its_name(data, tmp_path):
    seen, mirrored = [], 0
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            image, given = (((batch[name] + 1) * 127.5).round() for name in ("image", "given"))
            assert image.shape[1:] == (3, 8, 8) and given.shape[1:] == (1, 8, 8) and "label" not in batch
            turned = given[:, 0, 0, 0] == 10
            number, other = (torch.where(turned, x[:, 0, 0, -1], x[:, 0, 0, 0]) for x in (image, given))
            assert torch.equal(other - number, torch.full((len(image),), 100.0)), "mirrored alike"
            mirrored += int(turned.sum())
            seen += number.int().tolist()
    assert len(seen) == len(set(seen)) and mirrored > 0
    assert data.image_shape == (3, 8, 8)
    for split in ("train", "val", "test"):
        images, pairs = data.reference_images(split), data.reference_pairs(split)
        assert images.shape[1:] == (3, 8, 8) and pairs.shape[1:] == (1, 8, 8) and len(images) == len(pairs)
    plain = ImageFolder(str(tmp_path / "photos"), image_size=8, val_fraction=0.2, test_fraction=0.2, use_labels=False)
    plain.cache_dir = tmp_path / "cache"
    assert np.array_equal(plain.reference_images("val"), data.reference_images("val")), "the splits of the first folder"
    assert plain.fingerprint("train") != data.fingerprint("train")


def test_an_image_without_a_partner_is_named(tmp_path):
    write(tmp_path / "photos", 24)
    write(tmp_path / "sketches", 20)
    lonely = PairedFolder(
        str(tmp_path / "photos"), str(tmp_path / "sketches"), image_size=8, cache_dir=str(tmp_path / "cache")
    )
    with pytest.raises(ValueError, match=r"The image 02\d has no partner in .*sketches"):
        lonely.split("train"), lonely.split("val"), lonely.split("test")
    with pytest.raises(ValueError, match="given_channels is 0"):
        PairedFolder("a", "b", given_channels=0)


def test_a_smaller_partner_is_enlarged_and_a_broken_one_named(tmp_path):
    write(tmp_path / "photos", 24)
    (tmp_path / "small").mkdir()
    for index in range(24):
        Image.new("RGB", (4, 4), (index + 100,) * 3).save(tmp_path / "small" / f"{index:03d}.png")
    options = {"image_size": 8, "cache_dir": str(tmp_path / "cache"), "cache_processes": 1}
    given = PairedFolder(str(tmp_path / "photos"), str(tmp_path / "small"), **options)
    images, pairs = (torch.as_tensor(made("train")).int() for made in (given.reference_images, given.reference_pairs))
    assert pairs.shape[2:] == (8, 8) and bool((pairs[..., 0] - images[..., 0] == 100).all())
    (tmp_path / "small" / "007.png").write_bytes(b"none")
    broken = PairedFolder(str(tmp_path / "photos"), str(tmp_path / "small"), **options)
    with (
        pytest.warns(UserWarning, match="007"),
        pytest.raises(ValueError, match=r"image 007 has no partner .*\(007\.png "),
    ):
        broken.split("train"), broken.split("val"), broken.split("test")
