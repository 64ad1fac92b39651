"""What is said at the start of a run."""

from types import SimpleNamespace

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, OneCycleLR

from diffusion_lit.callbacks.progress import other_length
from diffusion_lit.modules import WarmupStableDecay


def trainer(run, make):
    scheduler = make(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
    configs = [SimpleNamespace(scheduler=scheduler)]
    return SimpleNamespace(estimated_stepping_batches=run, lr_scheduler_configs=configs)


@pytest.mark.parametrize(
    ("run", "make", "words"),
    [
        (35_500, lambda one: CosineAnnealingLR(one, T_max=2400), ("T_max 2,400", "35,500 steps", "T_max 35500")),
        (100, lambda one: CosineAnnealingLR(one, T_max=2400), ("T_max 2,400", "100 steps", "does not come to its end")),
        (50, lambda one: OneCycleLR(one, 0.1, total_steps=200), ("total_steps 200", "50 steps", "total_steps 50")),
        (
            50,
            lambda one: WarmupStableDecay(one, decay_fraction=0.5, total_steps=40),
            ("total_steps 40", "50 steps", "total_steps 50"),
        ),
    ],
)
def test_a_schedule_with_another_length_than_the_run_is_told_with_both(run, make, words):
    (said,) = other_length(trainer(run, make))
    assert all(word in said for word in words)
    assert "\n" not in said and len(said) < 300


@pytest.mark.parametrize(
    ("run", "make"),
    [
        (2400, lambda one: CosineAnnealingLR(one, T_max=2400)),
        (50, lambda one: ExponentialLR(one, 0.9)),
        (50, lambda one: WarmupStableDecay(one, decay_fraction=0, total_steps=40)),
        (float("inf"), lambda one: CosineAnnealingLR(one, T_max=2400)),
    ],
)
def test_a_schedule_that_fits_is_not_told(run, make):
    assert other_length(trainer(run, make)) == []
