"""What the torture of training draws: a function of its seed, and wide enough to meet the ends of epochs."""

import random

from experiments.benchmarks.torture import FAMILIES, draw, draw_chain


def cases(seed):
    rng = random.Random(seed)
    settings = [draw(family, rng) for family in FAMILIES for _ in range(40)]
    return [(setting, draw_chain(setting, rng.randint(1, 4), rng)) for setting in settings]


def test_what_is_drawn_is_a_function_of_the_seed():
    assert cases(0) == cases(0) != cases(1)


def test_chains_of_kills_meet_the_ends_of_epochs():
    """A fault was seen only where a save fell on an epoch's last step and a second kill came later."""
    drawn = cases(0)
    for name in ("ranks", "workers", "batch_size", "accumulate", "save_every", "validate_every", "widths"):
        assert len({getattr(setting, name) for setting, _ in drawn}) > 1, name
    assert {setting.epochs is None for setting, _ in drawn} == {True, False}
    assert {kill.kind for _, chain in drawn for kill in chain} == {"step", "saving", "validation", "moment"}
    met = [
        (setting, kill)
        for setting, chain in drawn
        for kill in chain[:-1]
        if kill.kind == "step" and kill.at % setting.steps_per_epoch == 0 and kill.at % setting.save_every == 0
    ]
    assert len(met) > len(drawn) / 5
    assert any(setting.accumulate > 1 for setting, _ in met) and any(setting.epochs for setting, _ in met)
