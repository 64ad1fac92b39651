"""References: a cache that serves only what was asked for, files of others, and the real-against-real floor."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.evaluation_tools import Source, Tiny, make_images, tiny_weights

from diffusion_lit.evaluation.external import is_file, reference_from_file
from diffusion_lit.evaluation.features import Features, Pixels
from diffusion_lit.evaluation.measure import Evaluation, other_split
from diffusion_lit.evaluation.metrics import Reference, Statistics
from diffusion_lit.evaluation.reference import real_against_real, real_pairs, reference_of
from diffusion_lit.storage.hashing import key_of
from diffusion_lit.storage.tensors import read_tensors, write_tensors


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_LIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/references"


class Counting(Pixels):
    """Counts the images that it is asked for."""

    asked = 0

    def compute(self, images):
        self.asked += len(images)
        return super().compute(images)


def test_a_reference_is_computed_once(cache):
    source, extractor = Source(), Counting()
    first = reference_of(source, "train", extractor)
    second = reference_of(source, "train", extractor, batch_size=7)
    assert extractor.asked == 60
    assert torch.equal(first.features.features, second.features.features)
    assert first.record["split"] == "train"
    assert first.record["extractor"] == extractor.identity()
    assert torch.equal(first.labels, source.labels["train"])
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]


def test_whatever_changes_the_reference_misses_the_cache(tmp_path):
    source, extractor = Source(), Counting()
    reference_of(source, "train", extractor)
    for change in ("split", "transform", "size", "extractor"):
        extractor.asked = 0
        if change == "split":
            reference_of(source, "train+val", extractor)
        elif change == "transform":
            other = Source()
            other.images["train"] = other.images["train"].flip(-1)
            reference_of(other, "train", extractor)
        elif change == "size":
            reference_of(source, "train", extractor, limit=50)
        else:
            extractor = Counting()
            extractor.transform = "uint8 / 255, flattened, gamma"
            reference_of(source, "train", extractor)
        assert extractor.asked > 0, change


def test_a_stale_or_damaged_file_in_the_cache_is_not_used(cache):
    source, extractor = Source(), Counting()
    expected = reference_of(source, "train", extractor).features.features
    (path,) = cache.iterdir()
    other = {"features": torch.zeros(60, 192)}
    for spoil in (
        lambda: write_tensors(path, other, {"extractor": "another"}),
        lambda: path.write_bytes(path.read_bytes()[:-100]),
        lambda: path.write_bytes(b"no safetensors"),
    ):
        spoil()
        extractor.asked = 0
        assert torch.equal(reference_of(source, "train", extractor).features.features, expected)
        assert extractor.asked == 60


def test_a_record_is_kept_with_its_tensors_and_asked_for(tmp_path):
    record = {"a": [1, 2], "b": "x"}
    write_tensors(tmp_path / "file.safetensors", {"t": torch.arange(3)}, record)
    assert read_tensors(tmp_path / "file.safetensors", {"b": "x", "a": [1, 2]})["t"].tolist() == [0, 1, 2]
    assert read_tensors(tmp_path / "file.safetensors", {"a": [1, 2], "b": "y"}) is None
    assert key_of(record) == key_of(dict(reversed(record.items())))
    assert [path.name for path in tmp_path.iterdir()] == ["file.safetensors"]


def test_images_of_another_shape_than_the_data_says_are_refused():
    source = Source()
    source.image_shape = (3, 16, 16)
    with pytest.raises(ValueError, match="must be resized"):
        reference_of(source, "train", Pixels())


@pytest.fixture
def inception_like(tmp_path):
    """The small network under Inception's name."""
    extractor = Tiny(str(tiny_weights(tmp_path / "tiny.pth")))
    extractor.name = "inception"
    extractor.load()
    return extractor


def test_images_in_a_file(tmp_path):
    images, _ = make_images(20)
    np.savez(tmp_path / "batch.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    reference = reference_from_file(tmp_path / "batch.npz", Pixels(), (3, 8, 8))
    torch.testing.assert_close(reference.features.features, Pixels().features(images).features)
    assert reference.record["used"] == "arr_0"
    assert reference.record["file"] == "batch.npz"
    assert len(reference.record["sha256"]) == 64
    for shape, message in (((3, 16, 16), "same size"), ((1, 8, 8), "1.*resize on one side")):
        with pytest.raises(ValueError, match=message):
            reference_from_file(tmp_path / "batch.npz", Pixels(), shape)
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((4, 8, 8, 3)))
    with pytest.raises(ValueError, match="must be uint8"):
        reference_from_file(tmp_path / "floats.npz", Pixels(), (3, 8, 8))


def test_statistics_in_a_file(tmp_path, inception_like, monkeypatch):
    monkeypatch.setattr("diffusion_lit.evaluation.external.INCEPTION_DIMENSION", 12)
    images, _ = make_images(40)
    real = Statistics.of(inception_like.features(images).features)
    np.savez(tmp_path / "edm.npz", mu=real.mu, sigma=real.sigma)
    reference = reference_from_file(tmp_path / "edm.npz", inception_like, (3, 8, 8))
    assert reference.features is None
    assert reference.record["used"] == "mu and sigma for fid_inception"
    np.testing.assert_array_equal(reference.statistics.sigma, real.sigma)
    with pytest.raises(ValueError, match="Inception's features, and the extractor is pixels"):
        reference_from_file(tmp_path / "edm.npz", Pixels(), (3, 8, 8))

    np.savez(tmp_path / "both.npz", mu=real.mu + 1, sigma=real.sigma, arr_0=images.permute(0, 2, 3, 1).numpy())
    both = reference_from_file(tmp_path / "both.npz", inception_like, (3, 8, 8))
    assert len(both.features) == 40
    np.testing.assert_array_equal(both.statistics.mu, real.mu + 1)

    crooked = real.sigma.copy()
    crooked[0, 1] += 1
    for name, mu, sigma, message in (
        ("shape", real.mu[:5], real.sigma, "have shapes"),
        ("nan", real.mu * np.nan, real.sigma, "not finite"),
        ("crooked", real.mu, crooked, "no covariance"),
    ):
        np.savez(tmp_path / f"{name}.npz", mu=mu, sigma=sigma)
        with pytest.raises(ValueError, match=message):
            reference_from_file(tmp_path / f"{name}.npz", inception_like, (3, 8, 8))


def test_files_that_need_unpickling_or_hold_nothing_are_refused(tmp_path):
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{"a": 1}], dtype=object))
    (tmp_path / "stats.pkl").write_bytes(b"\x80\x04N.")
    np.savez(tmp_path / "other.npz", something=np.zeros(3))
    for name, message in (
        ("objects.npz", "no .npz file of plain arrays"),
        ("stats.pkl", "not opened"),
        ("other.npz", "neither mu and sigma nor arr_0"),
        ("missing.npz", "There is no reference file"),
    ):
        with pytest.raises(ValueError, match=message):
            reference_from_file(tmp_path / name, Pixels(), (3, 8, 8))
    assert is_file("x.npz")
    assert not is_file("train+val")


def test_a_file_of_this_project_is_refused_where_it_belongs_to_something_else(cache):
    source, extractor = Source(), Pixels()
    expected = reference_of(source, "train", extractor)
    (path,) = cache.iterdir()
    read = reference_from_file(path, extractor, (3, 8, 8))
    assert torch.equal(read.features.features, expected.features.features)
    assert read.record["split"] == "train"
    with pytest.raises(ValueError, match="another shape of images"):
        reference_from_file(path, extractor, (3, 16, 16))
    other = Pixels()
    other.transform = "other"
    with pytest.raises(ValueError, match="another extractor"):
        reference_from_file(path, other, (3, 8, 8))


def reference(count, seed=0):
    features = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return Reference(Features(features))


def test_the_floor_is_of_disjoint_real_images_at_the_same_number():
    real = reference(500)
    held_out = reference(300, seed=1).features
    pairs = real_pairs(real, held_out, 100, blocks=3)
    drawn = torch.cat([some.features for some, _ in pairs])
    assert len(pairs) == 3
    assert len(drawn.unique(dim=0)) == 300  # the blocks are disjoint, and all held out
    assert all(rest is real for _, rest in pairs)

    pairs = real_pairs(real, held_out, 400, blocks=3)  # more than are held out: some of both against all others
    assert len(pairs) == 2
    for some, rest in pairs:
        both = torch.cat([some.features, rest.features.features])
        assert (len(some), rest.count) == (400, 400)
        assert len(both.unique(dim=0)) == 800

    ((some, _),) = real_pairs(real, held_out, 700, blocks=3)  # too many for either: what there is
    assert len(some) == 300
    assert real_pairs(Reference(None, real.statistics), None, 10) == []


def test_the_floor_falls_with_the_number_and_is_far_below_another_distribution():
    real, held_out = reference(20_000), reference(5000, seed=1).features
    (low, low_count), (high, high_count) = (real_against_real(real, held_out, count) for count in (5000, 50))
    assert (low_count, high_count) == (5000, 50)
    assert 0 < low < 0.01 < high


def test_a_split_of_one_image_has_features_and_no_statistics():
    source = Source(train=60, test=1)
    alone = reference_of(source, "test", Pixels())
    assert alone.count == 1
    with pytest.raises(ValueError, match=r"split test has 1 image.*another split"):
        _ = alone.statistics
    extractor, plan = Counting(), SimpleNamespace(reference="test", batch_size=64, total=60)
    evaluation = Evaluation(plan, SimpleNamespace(image_shape=source.image_shape), source, extractor, None)
    with pytest.raises(ValueError, match=r"split test has 1 image.*another split"):
        evaluation.references()
    assert extractor.asked == 0  # the one image is in the cache, and the held-out ones were not read
    source.images["test"] = source.images["test"][:0]
    with pytest.raises(ValueError, match=r"split test has 0 images"):
        reference_of(source, "test", Pixels())
    assert other_split(source, "train") is None
    assert other_split(Source(train=60, test=1), "train") == "test"
    assert other_split(Source(train=60, test=1), "val") == "train"  # rather than a single image
