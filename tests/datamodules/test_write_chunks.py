"""Chunks of a folder, as litdata writes them, are what `ImageFolder` makes of it."""

import json
import sys

import numpy as np
import pytest
import torch
from helpers.configs_tools import write_images

from datamodules import ImageFolder, Streamed
from datamodules.write_chunks import encode, write_chunks


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"val_fraction": 0.5}, "val_fraction"),
        ({"chunk_mb": 0}, "chunk_mb"),
        ({"processes": 0}, "processes"),
        ({"image_size": 0}, "image_size"),
        ({"output": "ftp://host/set"}, "ftp://host/set"),
        ({"output": "."}, "not empty"),
        ({"root": "nothing"}, "nothing"),
        ({"root": "first"}, "1 image, .*val_fraction"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(tmp_path, monkeypatch, options, word):
    monkeypatch.chdir(write_images(tmp_path / "photos", count=2))
    with pytest.raises((ValueError, FileNotFoundError), match=word):
        write_chunks(**{"root": str(tmp_path / "photos"), "output": str(tmp_path / "set"), "image_size": 8, **options})
    assert not (tmp_path / "set").exists()


def test_without_litdata_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "litdata", None)
    with pytest.raises(ModuleNotFoundError, match=r"diffusion-lit\[streaming\]"):
        write_chunks(str(write_images(tmp_path / "photos", count=9)), str(tmp_path / "set"), 8)


@pytest.mark.medium
def test_chunks_hold_what_an_image_folder_has_and_litdata_reads_them(tmp_path, capsys):
    litdata = pytest.importorskip("litdata")
    photos = write_images(tmp_path / "photos", count=60, size=20)
    (photos / "first" / "broken.png").write_bytes(b"\x89PNG but no image")
    options = {"val_fraction": 0.2, "test_fraction": 0.1}
    write_chunks(str(photos), str(tmp_path / "set"), 16, chunk_mb=0.01, processes=2, **options)
    told = capsys.readouterr()
    assert "0 = first, 1 = second" in told.out and "broken.png is" in told.err and "1 image was left out" in told.err
    folder = ImageFolder(str(photos), image_size=16, cache_dir=str(tmp_path / "cache"), **options)
    folder.prepare_data()
    for root in (str(tmp_path / "set"), f"local:{tmp_path}/set"):  # in place, and by litdata's downloader
        data = Streamed(root, batch_size=8, cache_dir=str(tmp_path / "cache"))
        assert data.image_shape == folder.image_shape and data.class_names == folder.class_names
        for split in ("train", "val", "test"):
            assert len(folder.reference_images(split)) > 2
            assert np.array_equal(data.reference_images(split)[:], np.asarray(folder.reference_images(split)))
            assert torch.equal(data.reference_labels(split), folder.reference_labels(split))
    assert len(data.reference_images("train").chunks) > 3
    index = json.loads((tmp_path / "set/train/index.json").read_text())
    sizes = [(tmp_path / "set/train" / chunk["filename"]).stat().st_size for chunk in index["chunks"]]
    assert sizes == [data.reference_images("train").size(chunk) for chunk in range(len(sizes))]
    theirs = litdata.StreamingDataset(str(tmp_path / "set/train"))
    for row, image in enumerate(folder.reference_images("train")):
        assert np.array_equal(theirs[row]["image"], image)
        assert theirs[row]["label"] == folder.reference_labels("train")[row]


@pytest.mark.medium
def test_an_index_of_pickles_by_litdata_is_refused(tmp_path):
    litdata = pytest.importorskip("litdata")
    write_chunks(
        str(write_images(tmp_path / "photos", count=30)), str(tmp_path / "set"), 8, val_fraction=0, test_fraction=0
    )
    for path in (tmp_path / "set/train").glob("chunk*"):
        path.unlink()
    (tmp_path / "set/train/index.json").unlink()
    writer = litdata.streaming.writer.BinaryWriter(str(tmp_path / "set/train"), chunk_size=10)
    for row in range(30):
        writer[row] = {"image": {1, 2}, "label": row}  # a set is none of litdata's kinds
    writer.done()
    writer.merge()
    assert "pickle" in (tmp_path / "set/train/index.json").read_text()
    with pytest.raises(ValueError, match="pickle.*may run code"):
        Streamed(str(tmp_path / "set")).split("train")


def test_an_image_is_written_once_with_its_note(tmp_path):
    from datamodules.decode import Transform
    from datamodules.sources import list_images

    listing = list_images(str(write_images(tmp_path / "photos", count=2, size=10)))
    (tmp_path / "notes").mkdir()
    notes = str(tmp_path / "notes")
    item = encode(listing, Transform(8), notes, (5, listing.images[0].name, 1))
    assert item["image"].shape == (3, 8, 8) and item["image"].dtype == np.uint8 and item["label"] == 1
    assert encode(listing, Transform(8), notes, (6, "absent.png", 0)) is None
    names = sorted(path.name.partition(".")[0] for path in (tmp_path / "notes").iterdir())
    assert names == ["skipped", "written"]
