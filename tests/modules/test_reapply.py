"""Options of optimizer and schedule that were changed hold where a run goes on; the rest, and the moments, stay."""

import copy
import warnings

import pytest
import torch
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, ReduceLROnPlateau, SequentialLR

from diffusion_lit.modules import WarmupStableDecay
from diffusion_lit.modules.reapply import reapply

STEPS = 7


def adamw(**options):
    return lambda weights: AdamW(weights, **{"lr": 0.1, "weight_decay": 0.2, **options})


def train(weight, optimizer, scheduler, steps):
    """The learning rates of so many steps."""
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        weight.grad = weight.detach() * 0.5
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return rates


def begin(make, schedule):
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = make([weight])
    return weight, optimizer, schedule(optimizer) if schedule else None


def go_on(before, now, changed):
    """A run of `STEPS` with one pair of optimizer and schedule that goes on with another, as Lightning restores it."""
    weight, optimizer, scheduler = begin(*before)
    train(weight, optimizer, scheduler, STEPS)
    saved = copy.deepcopy(scheduler.state_dict()) if scheduler else {}
    state = copy.deepcopy(optimizer.state_dict())
    weight, optimizer, scheduler = begin(*now)
    optimizer.load_state_dict(copy.deepcopy(state))
    if scheduler and "schedule" not in changed:
        scheduler.load_state_dict(copy.deepcopy(saved))
    reapply(optimizer, scheduler, now, changed, saved, STEPS)
    for name, value in state["state"].get(0, {}).items():  # the moments are those of the checkpoint
        assert torch.equal(optimizer.state[weight][name], value)
    return weight, optimizer, scheduler


def of(kind, **options):
    return lambda optimizer: kind(optimizer, **options)


def in_turn(optimizer):
    parts = [LinearLR(optimizer, 0.5, total_iters=4), CosineAnnealingLR(optimizer, T_max=30)]
    return SequentialLR(optimizer, parts, milestones=[4])


SCHEDULES = {
    "none": None,
    "cosine of 20": of(CosineAnnealingLR, T_max=20),
    "cosine of 40": of(CosineAnnealingLR, T_max=40),
    "trapezoid": of(WarmupStableDecay, warmup_steps=3, decay_fraction=0.5, total_steps=16),
    "one cycle": of(OneCycleLR, max_lr=0.5, total_steps=30),
    "in turn": in_turn,
}


@pytest.mark.parametrize("after", SCHEDULES)
@pytest.mark.parametrize("before", ["none", "cosine of 20", "trapezoid", "one cycle"])
@pytest.mark.parametrize("lr", [0.1, 0.003])
def test_rates_go_on_as_in_a_run_that_had_them_from_the_start(before, after, lr):
    changed = {**({"lr": (0.1, lr)} if lr != 0.1 else {}), **({"schedule": (0, 1)} if before != after else {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = train(*begin(adamw(lr=lr), SCHEDULES[after]), 16)
        run = go_on((adamw(), SCHEDULES[before]), (adamw(lr=lr), SCHEDULES[after]), changed)
        if changed:
            assert train(*run, 16 - STEPS) == pytest.approx(whole[STEPS:])


def test_a_changed_option_leaves_the_others_as_they_are():
    """And a run with it steps as a fresh optimizer of these options would from these moments."""
    new = {"weight_decay": 0.7, "betas": (0.2, 0.3)}
    changed = {"weight_decay": (0.2, 0.7), "betas": ((0.9, 0.999), (0.2, 0.3))}
    _, optimizer, _ = go_on((adamw(), SCHEDULES["cosine of 20"]), (adamw(**new), SCHEDULES["cosine of 20"]), changed)
    group = optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"]) == (0.7, (0.2, 0.3))
    assert group["lr"] == pytest.approx(train(*begin(adamw(), SCHEDULES["cosine of 20"]), 16)[STEPS])


@pytest.mark.parametrize("changed", [{"lr": 0.02}, {"patience": 5}, {"lr": 0.02, "patience": 5}])
def test_a_plateau_keeps_what_it_has_seen(changed):
    """Reduced once by 0.1: the new rate is reduced as well, and a change of patience keeps the best."""

    def plateau(**options):
        return lambda optimizer: ReduceLROnPlateau(optimizer, **{"factor": 0.1, "patience": 0, **options})

    weight, optimizer, scheduler = begin(adamw(), plateau())
    train(weight, optimizer, None, 1)
    for value in (1.0, 1.0):
        scheduler.step(value)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    state, saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(scheduler.state_dict())
    options, patience = {k: v for k, v in changed.items() if k == "lr"}, {k: v for k, v in changed.items() if k != "lr"}
    now = (adamw(**options), plateau(**patience))
    weight, optimizer, scheduler = begin(*now)
    optimizer.load_state_dict(state)
    differs = {"lr": (0.1, 0.02), "schedule": (0, 1)}
    differs = {name: differs[name] for name, part in (("lr", options), ("schedule", patience)) if part}
    if not patience:
        scheduler.load_state_dict(saved)
    reapply(optimizer, scheduler, now, differs, saved, 1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(changed.get("lr", 0.1) * 0.1)
    assert (scheduler.best, scheduler.patience) == (1.0, changed.get("patience", 0))


def test_an_option_that_keeps_state_of_its_own_is_refused_and_momentum_is_not():
    with pytest.raises(ValueError, match="max_exp_avg_sq.*amsgrad = True"):
        go_on((adamw(), None), (adamw(amsgrad=True), None), {"amsgrad": (False, True)})

    def sgd(**options):
        return lambda weights: SGD(weights, lr=0.1, **options)

    weight, optimizer, _ = go_on((sgd(), None), (sgd(momentum=0.9), None), {"momentum": (0, 0.9)})
    train(weight, optimizer, None, 2)
    assert optimizer.state[weight]["momentum_buffer"] is not None


@pytest.mark.parametrize(
    "schedule", [of(CosineAnnealingLR, T_max=20), of(WarmupStableDecay, warmup_steps=3, total_steps=30), in_turn, None]
)
def test_each_group_keeps_its_share_of_the_learning_rate(schedule):
    """As the adversary of a VAE has one: after a change both rates are those of a run that began with the new one."""

    def built(lr):
        first, second = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
        groups = [{"params": [first], "lr_ratio": 1.0}, {"params": [second], "lr_ratio": 0.25}]
        optimizer = AdamW(groups, lr=lr)
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_ratio"]
        return optimizer, schedule(optimizer) if schedule else None

    def steps(optimizer, scheduler, count):
        for _ in range(count):
            for group in optimizer.param_groups:
                group["params"][0].grad = torch.ones(2, 2)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        return [group["lr"] for group in optimizer.param_groups]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer, scheduler = built(0.1)
        steps(optimizer, scheduler, STEPS)
        saved = copy.deepcopy(scheduler.state_dict()) if scheduler else {}
        makers = (lambda weights: AdamW(weights, lr=0.04), schedule)
        reapply(optimizer, scheduler, makers, {"lr": (0.1, 0.04)}, saved, STEPS)
        unbroken = built(0.04)
        expected = steps(*unbroken, STEPS)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)
        assert expected[1] == pytest.approx(expected[0] / 4)
        assert steps(optimizer, scheduler, 5) == pytest.approx(steps(*unbroken, 5))
