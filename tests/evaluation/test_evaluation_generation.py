"""Samples by index: the same for any number of ranks and batch size, each once, and found again after a kill."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.evaluation_tools import Source
from PIL import Image
from torch import nn

from diffusion_lit.diffusion import Sampling
from diffusion_lit.evaluation.features import Pixels
from diffusion_lit.evaluation.generation import (
    GenerationJob,
    class_frequencies,
    draw_labels,
    gather_shards,
    generate_shards,
)
from diffusion_lit.evaluation.measure import overshooting
from diffusion_lit.storage.tensors import write_tensors


class Net(nn.Module):
    """Counts its forwards."""

    def forward(self, x):
        return x


class Model:
    """A module whose sample i is a function of its seed and class; `net` is called twice per sample."""

    def __init__(self):
        self.net = Net()
        self.drawn = []

    def generate(self, seeds, labels, sampling):
        self.drawn += list(seeds)
        rows = [torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 0.5 for seed in seeds]
        x = torch.stack(rows)
        self.net(x)
        self.net(x)
        return x if labels is None else x + labels[:, None, None, None] / 10


@pytest.fixture
def job(tmp_path):
    labels = torch.arange(150) % 3
    return GenerationJob(
        Sampling(), 150, 1000, labels, {"checkpoint": "a"}, tmp_path / "parts", batch_size=64, keep_images=True
    )


def made_by(job, world=1):
    models = [Model() for _ in range(world)]
    for rank, model in enumerate(models):
        generate_shards(job, model, Pixels(), rank, world)
    return gather_shards(job), models


def test_samples_are_the_same_by_index_for_any_ranks_and_batch_size(job, tmp_path):
    expected, _ = made_by(job)
    assert expected.forwards == 2
    assert expected.images.shape == (150, 3, 4, 4)
    assert 0 < expected.clipped < 0.1
    direct = Model().generate(range(1000, 1150), job.labels, None)
    assert torch.equal(expected.images, ((direct.clamp(-1, 1) + 1) * 127.5).round().byte())
    for world, batch_size in ((2, 64), (4, 7), (1, 1), (3, 150)):
        other = replace(job, folder=tmp_path / f"{world}_{batch_size}", batch_size=batch_size)
        samples, models = made_by(other, world)
        assert torch.equal(samples.images, expected.images)
        assert torch.equal(samples.features.features, expected.features.features)
        drawn = [seed for model in models for seed in model.drawn]
        assert sorted(drawn) == list(range(1000, 1150))  # none twice
        assert world == 3 or all(model.drawn for model in models)


def test_what_is_there_is_not_made_again_and_what_is_missing_is(job):
    expected, _ = made_by(job)
    files = sorted(job.folder.rglob("*.safetensors"))
    files[1].unlink()
    files[2].write_bytes(files[2].read_bytes()[:-9])
    lost = [job.shards()[index] for index in (1, 2)]
    again, (model,) = made_by(job)
    assert sorted(model.drawn) == [1000 + index for rows in lost for index in rows]
    assert torch.equal(again.features.features, expected.features.features)


def test_shards_of_other_settings_are_not_taken(job):
    made_by(job)
    for other in (
        replace(job, record={"checkpoint": "b"}),
        replace(job, seed=7),
        replace(job, keep_images=False),
        replace(job, save_to=job.folder.parent / "images"),
    ):
        with pytest.raises(ValueError, match="missing or of other samples"):
            gather_shards(other)
        _, (model,) = made_by(other)
        assert len(model.drawn) == 150


def test_a_shard_in_the_place_of_another_is_made_again(job):
    expected, _ = made_by(job)
    files = sorted(job.folder.rglob("*.safetensors"))
    shutil.copy(files[0], files[1])
    with pytest.raises(ValueError, match="missing or of other samples"):
        gather_shards(job)
    again, _ = made_by(job)
    assert torch.equal(again.features.features, expected.features.features)


def test_samples_that_are_there_twice_are_refused(job):
    made_by(job)
    first, second = job.shards()[:2]
    tensors = {
        "seeds": torch.arange(len(second)) + job.seed + first.start,  # the first shard's samples once more
        "features": torch.zeros(len(second), 48),
        "images": torch.zeros(len(second), 3, 4, 4, dtype=torch.uint8),
        "clipped": torch.zeros(len(second)),
        "forwards": torch.tensor([1]),
        "seconds": torch.tensor([1.0]),
    }
    write_tensors(job.path(second), tensors, job.shard_record(second))
    with pytest.raises(ValueError, match="twice or not at all"):
        gather_shards(job)


def test_shards_cover_every_index_once_and_suit_several_ranks(tmp_path):
    for count in (2, 15, 100, 1000, 50_000):
        for batch_size in (1, 64, 700):
            shards = GenerationJob(Sampling(), count, 0, None, {}, tmp_path, batch_size).shards()
            assert [index for rows in shards for index in rows] == list(range(count))
            assert max(map(len, shards)) <= max(500, batch_size)
    assert len(GenerationJob(Sampling(), 1000, 0, None, {}, tmp_path, 1).shards()) == 32


def test_images_are_saved_under_their_index(job, tmp_path):
    samples, _ = made_by(replace(job, save_to=tmp_path / "images"))
    files = sorted((tmp_path / "images").iterdir())
    assert [path.name for path in files] == [f"{index:06d}.png" for index in range(150)]
    assert np.array_equal(np.asarray(Image.open(files[17])), samples.images[17].permute(1, 2, 0).numpy())


def test_a_class_is_drawn_by_the_sample_alone_and_by_the_frequencies_of_training():
    source = Source(train=60)
    source.labels["train"] = torch.tensor([0] * 45 + [2] * 15)
    frequencies = class_frequencies(source, 4)
    assert frequencies.tolist() == [0.75, 0, 0.25, 0]
    labels = draw_labels(range(4000), frequencies)
    assert torch.equal(draw_labels(range(100, 200), frequencies), labels[100:200])
    assert set(labels.tolist()) == {0, 2}
    assert (labels == 2).float().mean() == pytest.approx(0.25, abs=0.03)
    assert class_frequencies(source, 0) is None
    assert draw_labels(range(5), None) is None
    with pytest.raises(ValueError, match="do not fit"):
        class_frequencies(source, 2)
    assert class_frequencies(Source(labels=False), 4).tolist() == [0.25] * 4


def test_a_decoders_values_may_lie_outside_and_a_denoisers_may_not(job):
    samples, (model,) = made_by(job)
    blown_up = replace(samples, clipped=0.3)
    (said,) = overshooting(blown_up, model)
    assert said.startswith("30% of the samples' values overshot")
    assert overshooting(replace(samples, clipped=0.04), model) == []

    class Decoder(Model):
        interpolate = staticmethod(lambda first, second, shares: first)

    assert overshooting(blown_up, Decoder()) == []
