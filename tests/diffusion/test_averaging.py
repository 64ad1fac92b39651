"""Power-function averages: closed forms, parity with ema-pytorch, and the reconstruction of any width afterwards."""

import numpy as np
import pytest
import torch
from ema_pytorch import KarrasEMA, PostHocEMA
from ema_pytorch.post_hoc_ema import sigma_rel_to_gamma, solve_weights
from helpers.climber import Climber, fit
from torch import nn

from diffusion_lit.callbacks import EMA
from diffusion_lit.diffusion.averaging import exponent, power_beta, weights
from diffusion_lit.modules.posthoc import reconstruct
from diffusion_lit.storage.snapshots import Snapshots


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.25])
def test_the_exponent_gives_the_width(sigma_rel):
    gamma = exponent(sigma_rel)
    assert gamma == pytest.approx(sigma_rel_to_gamma(sigma_rel), rel=1e-12)
    tau = (np.arange(200_000) + 0.5) / 200_000  # the profile itself, normalised, its standard deviation
    density = (gamma + 1) * tau**gamma
    mean = (density * tau).mean()
    assert np.sqrt((density * (tau - mean) ** 2).mean()) == pytest.approx(sigma_rel, rel=1e-4)


def test_widths_that_do_not_exist_are_refused():
    for width in (0, -1, 0.3):
        with pytest.raises(ValueError, match=f"sigma_rel is {width}"):
            exponent(width)
    assert exponent(0.288) == pytest.approx(0, abs=0.02)  # the plain mean is the widest: 1 / sqrt(12)


def random_walk(steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, 5, generator=generator, dtype=torch.float64).cumsum(0)


def track(path, gamma):
    average, seen = torch.zeros(5, dtype=torch.float64), []
    for step, value in enumerate(path, start=1):
        average = torch.lerp(average, value, 1 - power_beta(step, gamma))
        seen.append(average)
    return torch.stack(seen)


def test_the_recursion_is_the_weighted_mean():
    """With gamma 0 it is the plain mean; in general the weights fall as the profile does."""
    path = random_walk(50)
    assert torch.allclose(track(path, 0.0)[-1], path.mean(0))
    gamma, n = 6.94, 2000
    shares = track(torch.eye(n, dtype=torch.float64)[:, :5], gamma)[-1]  # of the first five steps
    assert shares.max() < 1e-12
    tau = torch.arange(1, n + 1, dtype=torch.float64)
    exact = ((tau / n) ** (gamma + 1) - ((tau - 1) / n) ** (gamma + 1))[:5]
    assert torch.allclose(shares, exact, atol=1e-15)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5))


def test_parity_with_karras_ema_of_ema_pytorch(tmp_path):
    """Theirs counts the steps from 2; started at -1 it counts as the paper does."""
    online = Model()
    theirs = KarrasEMA(online, sigma_rel=0.1, update_every=1)
    theirs.step.fill_(-1)
    path = random_walk(30).float()
    ours = track(path.double(), exponent(0.1))
    for value, expected in zip(path, ours, strict=True):
        online.weight.data.copy_(value)
        theirs.update()
        assert torch.allclose(theirs.ema_model.weight, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [[10], [5, 10], [10, 20, 40], list(range(20, 401, 20))])
@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.07, 0.15, 0.28])
def test_the_average_of_constant_weights_is_constant(tmp_path, steps, sigma_rel):
    """Whatever was kept: a network that no longer changes is its own average."""
    constant = torch.tensor([3.0, -700.0, 0.01])
    for step in steps:
        for width in (0.05, 0.1):
            Snapshots.write(tmp_path, step, width, {"w": constant})
    assert torch.allclose(reconstruct(Snapshots(tmp_path), sigma_rel)["w"], constant, rtol=1e-5, atol=0)


@pytest.mark.parametrize("left_out", [0.05, 0.1, 0.15])
def test_a_kept_width_is_found_again_from_the_others(tmp_path, left_out):
    """Weights far from 0, as a network's are, which shares of another sum would scale."""
    path = random_walk(400) + 100
    for width in {0.05, 0.1, 0.15, 0.2} - {left_out}:
        average = track(path, exponent(width))
        for step in (100, 200, 300, 400):
            Snapshots.write(tmp_path, step, width, {"w": average[step - 1]})
    mine = reconstruct(Snapshots(tmp_path), left_out)["w"].double()
    kept = track(path, exponent(left_out))[-1]
    exact = 0.03 if left_out == 0.05 else 0.005  # the narrowest lies outside the others
    assert (mine - kept).norm() < exact * (path[-1] - kept).norm()


def test_weights_are_those_of_ema_pytorch_divided_by_their_sum():
    steps, gammas = [10, 10, 20, 20, 40, 40], [16.97, 6.94] * 3
    mine = weights(steps, gammas, 37, 9.0)
    theirs = solve_weights(*(torch.tensor(x) for x in (steps, gammas, [37], [9.0]))).squeeze(1)
    assert abs(theirs.sum() - 1) > 0.05  # it lacks the division by the sum that the source's code has
    assert torch.allclose(mine, theirs / theirs.sum(), rtol=1e-5)  # theirs reads the exponents in float32


def test_reconstruction_is_that_of_ema_pytorch(tmp_path):
    online = Model()
    post = PostHocEMA(
        online,
        sigma_rels=(0.05, 0.1),
        update_every=1,
        checkpoint_every_num_steps=10,
        checkpoint_dtype=torch.float32,
        checkpoint_folder=str(tmp_path / "theirs"),
    )
    for value in random_walk(40).float():
        online.weight.data.copy_(value)
        post.update()
        if post.step.item() % 10 == 0:
            for width, average in zip((0.05, 0.1), post.ema_models, strict=True):
                Snapshots.write(tmp_path, post.step.item(), width, {"weight": average.ema_model.weight})
    theirs = post.synthesize_ema_model(sigma_rel=0.15).ema_model.weight
    steps, gammas = [step for step in (10, 20, 30, 40) for _ in range(2)], [exponent(0.05), exponent(0.1)] * 4
    total = solve_weights(*(torch.tensor(x) for x in (steps, gammas, [40], [exponent(0.15)]))).sum()
    mine = total * reconstruct(Snapshots(tmp_path), 0.15)["weight"]  # theirs is not divided by it
    assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("sigma_rel", "tolerance"), [(0.07, 0.02), (0.1, 1e-5), (0.15, 0.02)])
def test_reconstruction_is_near_the_average_that_was_not_kept(tmp_path, sigma_rel, tolerance):
    path = random_walk(400)
    for width in (0.05, 0.1):
        average = track(path, exponent(width))
        for step in range(20, 401, 20):
            Snapshots.write(tmp_path, step, width, {"w": average[step - 1]})
    mine = reconstruct(Snapshots(tmp_path), sigma_rel)["w"].double()
    exact = track(path, exponent(sigma_rel))[-1]
    assert (mine - exact).norm() < tolerance * (path[-1] - exact).norm()


def test_snapshots_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(ValueError, match="no snapshots of averages"):
        Snapshots(tmp_path)
    Snapshots.write(tmp_path, 10, 0.05, {"w": torch.zeros(3)})
    with pytest.raises(ValueError, match="Step 11 is outside the snapshots"):
        reconstruct(Snapshots(tmp_path), 0.1, 11)
    (tmp_path / "step_0000010_sigma_0.05.safetensors").write_bytes(b"text")
    with pytest.raises(ValueError, match="is damaged"):
        reconstruct(Snapshots(tmp_path), 0.05)


def test_the_callback_keeps_several_and_writes_snapshots(tmp_path):
    module = Climber()
    trainer = fit(tmp_path, module, EMA(sigma_rel=[0.05, 0.1], snapshot_every=5))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    path = torch.arange(1.0, 11).double()[:, None].expand(10, 5)
    narrow, wide = (track(path, exponent(width))[:, 0] for width in (0.05, 0.1))
    assert checkpoint["state_dict"]["weight"].item() == pytest.approx(narrow[-1].item(), rel=1e-5)
    assert module.weight.item() == 10
    snapshots = Snapshots(tmp_path / "averages")
    assert snapshots.steps == [5, 10]
    assert reconstruct(snapshots, 0.05)["weight"].item() == pytest.approx(narrow[-1].item(), rel=1e-4)
    assert reconstruct(snapshots, 0.1)["weight"].item() == pytest.approx(wide[-1].item(), rel=1e-4)
    assert reconstruct(snapshots, 0.1, 5)["weight"].item() == pytest.approx(wide[4].item(), rel=1e-4)


def test_a_resumed_run_goes_on_with_all_averages(tmp_path):
    def ema():
        return EMA(sigma_rel=[0.05, 0.1])

    fit(tmp_path, Climber(), ema(), epochs=2).save_checkpoint(tmp_path / "whole.ckpt")
    fit(tmp_path, Climber(), ema()).save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(tmp_path, Climber(), ema(), epochs=2, ckpt_path=tmp_path / "half.ckpt")
    resumed.save_checkpoint(tmp_path / "resumed.ckpt")
    whole, again = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("whole", "resumed"))
    others = [next(v["others"] for k, v in state["callbacks"].items() if "others" in v) for state in (whole, again)]
    assert torch.equal(others[0][0][0], others[1][0][0])
    assert torch.equal(whole["state_dict"]["weight"], again["state_dict"]["weight"])
    with pytest.raises(ValueError, match="holds 2 averages, but this run asks for 1"):
        fit(tmp_path, Climber(), EMA(), epochs=2, ckpt_path=tmp_path / "half.ckpt")


def test_frozen_weights_are_shared_and_not_averaged(tmp_path):
    class Frozen(Climber):
        def __init__(self):
            super().__init__()
            self.fixed = nn.Parameter(torch.full((3,), 7.0), requires_grad=False)

    module, ema = Frozen(), EMA(sigma_rel=[0.05, 0.1])
    fit(tmp_path, module, ema)
    assert ema._average_model.module.fixed.data_ptr() == module.fixed.data_ptr()
    assert module.fixed.tolist() == [7.0] * 3
    assert module.weight.item() == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma_rel": [0.05], "decay": 0.9}, "no decay"),
        ({"sigma_rel": [0.05, 0.05]}, "different widths"),
        ({"snapshot_every": 5}, "snapshot_every is 5"),
        ({"sigma_rel": [0.5]}, "sigma_rel is 0.5"),
    ],
)
def test_averages_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EMA(**options)
