"""Copies of training images are found, and nothing is where there are none; what is said of models of one image."""

import json
import math

import pytest
import torch
from helpers.evaluation_tools import Source

from diffusion_lit.diffusion.images import psnr
from diffusion_lit.evaluation.memorization import (
    chance_of,
    compare,
    held_out_split,
    nearest,
    tail_probability,
    worst_triples,
)
from diffusion_lit.evaluation.single_image import is_single, patches, single_image_metrics
from diffusion_lit.report.memorization import pairs_image
from diffusion_lit.report.receipt_tables import verdict


def real(count, seed):
    """Images of a distribution with a few directions, 3x6x6."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(8, 108, generator=torch.Generator().manual_seed(99))
    values = torch.randn(count, 8, generator=generator) @ directions + 0.3 * torch.randn(
        count, 108, generator=generator
    )
    return (values * 12 + 128).clamp(0, 255).byte().reshape(count, 3, 6, 6)


TRAINING, HELD_OUT, FRESH = real(1500, 1), real(400, 2), real(300, 3)


def test_neighbours_are_those_of_the_whole_table_of_distances(monkeypatch):
    monkeypatch.setattr("diffusion_lit.evaluation.memorization.CHUNK", 64)
    table = torch.cdist(FRESH.flatten(1).double() / 255, TRAINING.flatten(1).double() / 255)
    distance, index = nearest(FRESH, TRAINING)
    torch.testing.assert_close(distance, table.min(1).values)
    assert torch.equal(index, table.argmin(1))
    own = torch.cdist(HELD_OUT.flatten(1).double() / 255, HELD_OUT.flatten(1).double() / 255).fill_diagonal_(math.inf)
    torch.testing.assert_close(nearest(HELD_OUT, HELD_OUT, itself=True)[0], own.min(1).values)
    assert nearest(TRAINING[:70], TRAINING)[0].max() < 1e-6
    with pytest.raises(ValueError, match="too few"):
        nearest(FRESH, FRESH[:1], itself=True)


@pytest.mark.parametrize("planted", [0.05, 0.5])
def test_planted_copies_are_flagged(planted):
    copies = int(planted * len(FRESH))
    noise = torch.randint(-2, 3, (copies, 3, 6, 6), generator=torch.Generator().manual_seed(0))
    copied = (TRAINING[:copies].int() + noise).clamp(0, 255).byte()
    found = compare(torch.cat([copied, FRESH[copies:]]), TRAINING, HELD_OUT)
    assert found.memorised
    assert sorted(found.copies.tolist()) == list(range(copies))
    assert torch.equal(found.training[:copies], torch.arange(copies))
    assert {pair["sample"] for pair in found.record["worst"]} <= set(range(copies))
    assert found.record["share_of_copies"] == pytest.approx(planted)


@pytest.mark.parametrize("seed", range(3, 9))
def test_fresh_images_are_not_flagged(seed):
    found = compare(real(300, seed), TRAINING, HELD_OUT)
    assert not found.memorised
    assert found.record["copies"] == 0
    assert found.record["share_below_quantile"] < 0.04
    assert found.record["nearest_is_training"] == pytest.approx(1500 / 1900, abs=0.1)
    assert found.record["nearest_is_training_by_chance"] == 1500 / 1900


def test_held_out_images_of_the_real_digits_are_not_flagged_and_training_ones_are():
    from datamodules import Digits

    digits = Digits()
    training, held_out = digits.reference_images("train"), digits.reference_images("test")
    samples, others = held_out[::2], held_out[1::2]
    assert not compare(samples, training, others).memorised
    found = compare(torch.cat([samples, training[:8]]), training, others)
    assert found.memorised
    assert sorted(found.copies.tolist()) == list(range(180, 188))


def test_mirrored_copies_are_found_where_training_mirrored():
    samples = torch.cat([TRAINING[:30].flip(-1), FRESH])
    assert not compare(samples, TRAINING, HELD_OUT).memorised
    assert compare(samples, TRAINING, HELD_OUT, flips=True).memorised


def test_chance_is_the_beta_binomial_tail():
    # one fresh value against m held-out ones is below the k-th smallest with probability k / (m + 1)
    assert chance_of(1, 1, 4, 99) == pytest.approx(0.04)
    assert chance_of(0, 50, 4, 99) == pytest.approx(1)
    # both of two fresh values below the smallest of m: 2 / ((m + 1) (m + 2))
    assert chance_of(2, 2, 1, 9) == pytest.approx(2 / (10 * 11))


def test_the_tail_follows_a_power_law():
    real = (torch.arange(1, 1001, dtype=torch.float64) / 1000) ** (1 / 5)  # F(r) = r^5
    made = tail_probability(torch.tensor([0.0, 0.1, 0.5, 0.9], dtype=torch.float64), real)
    assert made[0] == 0
    assert 1e-5 < float(made[1]) < 3e-5  # above F: the rate is known from 99 values only
    assert float(made[2]) == pytest.approx(0.5**5, rel=0.1)
    assert made[3] == 1


@pytest.mark.parametrize("held_out", [10, 30, 100, 360])
def test_copies_are_called_by_chance_as_rarely_as_is_said(held_out):
    """Ratios of an exact power law, 2,500 sets of samples; the exponent of Hill's estimator gave 12% at 100."""
    generator = torch.Generator().manual_seed(held_out)
    draws = torch.rand(2500, held_out + 300, generator=generator, dtype=torch.float64) ** (1 / 6)
    alarms = 0
    for draw in draws:
        chances = tail_probability(draw[held_out:], draw[:held_out].sort().values)
        alarms += bool((300 * chances < 0.01).any())
    assert alarms / len(draws) < 0.01 + 3 * math.sqrt(0.01 / len(draws))


@pytest.mark.parametrize(("directions", "held_out"), [(2, 20), (8, 100)])
def test_fresh_points_are_called_copies_as_rarely_as_is_said(directions, held_out):
    generator = torch.Generator().manual_seed(7)
    alarms = 0
    for _ in range(150):
        points = torch.randn(900 + held_out, directions, generator=generator, dtype=torch.float64)
        alarms += compare(points[:200], points[200:900], points[900:]).record["copies"] > 0
    assert alarms <= 6  # 0.01 of 150 or fewer are expected; 7 or more have a probability below 0.001


def test_copies_among_real_images_and_ties_are_no_sign_of_memorising():
    real = torch.cat([torch.zeros(3), torch.linspace(0.5, 1.5, 97)]).double()  # three held-out ones are training ones
    assert float(tail_probability(torch.zeros(1).double(), real)) >= 3 / 101
    assert float(tail_probability(torch.tensor([0.9]).double(), torch.ones(50).double())) == 1
    assert float(tail_probability(torch.zeros(1).double(), torch.linspace(0.5, 1.5, 20).double())) == 0


def test_the_image_of_the_worst_pairs_shows_them_in_triples():
    found = compare(TRAINING[:20], TRAINING, HELD_OUT)
    image = pairs_image(worst_triples(found, TRAINING[:20], TRAINING, HELD_OUT))
    assert image.width > 6 * 6 and image.height > 6 * 6  # six columns, six rows, and their headings
    triples = worst_triples(found, TRAINING[:20], TRAINING, HELD_OUT)
    assert torch.equal(triples[:, 0], triples[:, 1])  # a training image is its own nearest


IMAGE = real(1, 5)[0].repeat_interleave(4, 1).repeat_interleave(4, 2)


def test_a_copy_of_the_one_image_and_a_shuffle_of_it():
    copies = IMAGE.expand(6, -1, -1, -1)
    figures = single_image_metrics(copies, IMAGE)
    assert figures["psnr"] == 100
    assert figures["diversity"] == 0
    assert abs(figures["fd_patches7"]) < 1e-4
    shifted = torch.stack([IMAGE.roll(4 * step, 2) for step in range(1, 6)])
    noise = torch.randint(0, 256, (5, *IMAGE.shape), generator=torch.Generator().manual_seed(0)).byte()
    assert single_image_metrics(shifted, IMAGE)["psnr"] < 30
    assert single_image_metrics(shifted, IMAGE)["diversity"] > 0.3
    assert single_image_metrics(shifted, IMAGE)["fd_patches7"] < 0.2 * single_image_metrics(noise, IMAGE)["fd_patches7"]


def test_psnr_of_a_known_error():
    assert float(psnr((IMAGE // 2 + 10)[None], IMAGE // 2)) == pytest.approx(20 * math.log10(25.5))
    assert float(psnr(IMAGE[None], IMAGE)) == pytest.approx(100)


def test_patches_are_all_windows():
    image = torch.arange(2 * 9 * 9, dtype=torch.uint8).reshape(1, 2, 9, 9)
    made = patches(image, 7)
    assert made.shape == (9, 98)
    assert torch.equal((made[4] * 255).round().byte().reshape(2, 7, 7), image[0, :, 1:8, 1:8])


def test_a_single_image_is_known_even_many_times():
    assert is_single(IMAGE[None].expand(5, -1, -1, -1))
    assert not is_single(TRAINING)


@pytest.mark.parametrize(("val", "test", "split"), [(5, 2, "test"), (1, 1, "val+test"), (3, 0, "val+test")])
def test_few_held_out_images_are_taken_from_both_splits(val, test, split):
    source = Source(labels=False)
    source.images = {"train": source.images["train"], "val": real(val, 5), "test": real(test, 6)}
    assert held_out_split(source) == split


@pytest.mark.parametrize(("val", "test", "words"), [(0, 1, "1 image is held out"), (0, 0, "0 images are held out")])
def test_one_held_out_image_says_nothing_of_memorisation(val, test, words):
    source = Source(labels=False)
    source.images = {"train": source.images["train"], "val": real(val, 5), "test": real(test, 6)}
    with pytest.raises(ValueError, match=words):
        held_out_split(source)
    source.images["val"] = source.images["test"]  # as with test_fraction 0, where both are the same images
    with pytest.raises(ValueError, match=words):
        held_out_split(source)


def test_two_held_out_images_do_not_acquit_a_few_samples():
    training, held_out = real(40, 1), real(2, 2)
    near = (training.float() + 6 * torch.randn(training.shape, generator=torch.Generator().manual_seed(7))).clamp(
        0, 255
    )
    few = compare(near[:8].byte(), training, held_out)  # all of them lean to training images
    assert not few.memorised and verdict(few.record) == "too few images to tell"
    many = compare(near.repeat(3, 1, 1, 1).byte(), training, held_out)
    assert many.memorised and verdict(many.record) == "memorised"
    enough = compare(real(200, 3), training, real(40, 4))
    assert verdict(enough.record) == "not memorised"


def test_a_record_is_json_where_held_out_images_have_copies():
    held_out = real(1, 2).repeat(3, 1, 1, 1)  # each has a neighbour at distance 0
    found = compare(torch.cat([held_out[:1], real(3, 4)]), real(5, 1), held_out)
    assert json.loads(json.dumps(found.record, allow_nan=False)) == found.record
    assert found.record["quantile"] is None


def test_a_mirrored_copy_of_the_one_image_counts_where_training_mirrored():
    image = real(1, 5)[0]
    samples = torch.stack([image, image.flip(-1)])
    assert single_image_metrics(samples, image, flips=True)["psnr"] == single_image_metrics(samples[:1], image)["psnr"]
    assert single_image_metrics(samples, image)["psnr"] < single_image_metrics(samples[:1], image)["psnr"] - 1


def test_one_grey_level_has_no_diversity_to_compare_with():
    flat = torch.full((3, 16, 16), 128, dtype=torch.uint8)
    figures = single_image_metrics(torch.randint(0, 256, (3, 3, 16, 16)).byte(), flat)
    assert "diversity" not in figures and all(value < 1000 for value in figures.values())
