"""Cold diffusion: degradations by their definitions, the samplers' exact properties, and training that is keyed."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from diffusion_lit.diffusion import Blur, Box, ColdSampling, Degradation, Grey, Mask, Pixelate, Snow
from diffusion_lit.diffusion.cold import improved, naive
from diffusion_lit.modules import ColdDiffusion
from diffusion_lit.modules.cold import principal_components
from diffusion_lit.modules.load import load_module
from diffusion_lit.nets import UNet

CONFIG = Path(__file__).resolve().parents[2] / "configs/cold_digits.yaml"
ALL = {
    "blur": Blur(6), "mask": Mask(6), "pixelate": Pixelate(3), "snow": Snow(6), "grey": Grey(6), "box": Box(6)
}  # fmt: skip


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_images(count=4, size=16, channels=3):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("degradation", ALL.values(), ids=ALL)
def test_each_image_is_degraded_by_its_own_number_of_steps(degradation):
    x0, noise = make_images(), draw(4, 1, 16, 16)
    assert torch.equal(degradation(x0, 0, noise), x0)
    t = torch.tensor([0, 1, 2, degradation.num_steps])[:4]
    alone = [degradation(x0[i : i + 1], int(t[i]), noise[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(degradation(x0, t, noise), torch.cat(alone))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(degradation(x0, t, noise), torch.cat(alone), rtol=1e-6, atol=1e-6)
    away = [(degradation(x0, s, noise) - x0).square().mean().item() for s in range(degradation.num_steps + 1)]
    assert all(first < second for first, second in pairwise(away)), away


def test_what_cannot_be_degraded_is_named():
    with pytest.raises(ValueError, match=r"Steps reach from 4 to 4, but must be in \[0, 3\]"):
        Pixelate(3)(make_images(), 4, draw(4, 1, 16, 16))
    with pytest.raises(ValueError, match="16x8; degradations take square ones"):
        Blur()(make_images()[..., :8], 1, draw(4, 1, 16, 8))
    with pytest.raises(ValueError, match="squares of 32 pixels, which do not divide images of 16; lower num_steps"):
        Pixelate(5)(make_images(), 1, draw(4, 1, 16, 16))
    with pytest.raises(ValueError, match="last is 0.1; give a finite number from 0.3"):
        Blur(first=0.3, last=0.1)
    with pytest.raises(ValueError, match="density is 2"):
        Snow(density=2.0)


def test_blur_is_scipys_gaussian_filter_with_mirrored_edges():
    blur, x0 = Blur(3, first=0.1, last=0.2), make_images(size=16)
    for t, width in ((1, 1.6), (3, 3.2)):
        made = blur(x0, t, draw(4, 1, 16, 16))
        theirs = gaussian_filter(x0.double().numpy(), (0, 0, width, width), mode="reflect", truncate=8)
        np.testing.assert_allclose(made, theirs, atol=2e-3)


def test_blurring_twice_is_blurring_by_the_root_of_the_sum_of_squares():
    blur = Blur(2, first=0.3, last=0.5)
    other = Blur(1, first=0.4, last=0.4)
    both = blur.tables(8)[1] @ other.tables(8)[1]
    torch.testing.assert_close(both, blur.tables(8)[2])
    flat = torch.full((1, 1, 8, 8), 0.7)
    torch.testing.assert_close(blur(flat, 2, flat), flat)


def test_a_mask_grows_around_a_centre_that_is_anywhere():
    mask, noise = Mask(5, first=0.05, last=0.3), draw(2000, 1, 8, 8)
    shown = mask(torch.ones(2000, 1, 8, 8), 1, noise)
    centre = noise.flatten(1).argmax(1)
    assert torch.equal(shown.flatten(1).argmin(1), centre) and float(shown.flatten(1).amin(1).max()) == 0
    counts = torch.bincount(centre, minlength=64)
    assert counts.min() > 10 and counts.max() < 60  # 31 each on average
    row, column, widths = 2, 6, torch.linspace(0.05, 0.3, 5, dtype=torch.float64)
    at = torch.zeros(1, 1, 8, 8)
    at[0, 0, row, column] = 9.0
    squared = ((5 - row) ** 2 + (1 - column) ** 2) / 64
    expected = (1 - torch.exp(-squared / (2 * widths[:4] ** 2))).prod()
    assert mask(torch.ones(1, 1, 8, 8), 4, at)[0, 0, 5, 1].item() == pytest.approx(expected.item(), rel=1e-6)
    assert Mask(last=1.0)(make_images(), 50, draw(4, 1, 16, 16)).abs().max() < 0.02  # nothing is left


def test_pixelation_is_average_pooling_shown_at_the_old_size():
    x0 = make_images()
    for t in (1, 2, 3):
        theirs = F.interpolate(F.avg_pool2d(x0, 2**t), scale_factor=2**t, mode="nearest")
        torch.testing.assert_close(Pixelate(3)(x0, t, draw(4, 1, 16, 16)), theirs)


def test_snow_brightens_and_its_flakes_stay():
    snow, noise, x0 = Snow(10, density=0.4), draw(64, 1, 32, 32), make_images(64, 32)
    falls = [snow.flakes(torch.full((64,), t), noise) for t in range(1, 11)]
    assert all(bool((more >= less).all()) for less, more in pairwise(falls))
    assert 0.2 < falls[-1].mean() < 0.5 and falls[0].mean() < 0.1
    degraded = snow(x0, 10, noise)
    assert bool((degraded >= x0 - 1e-6).all()) and degraded.max() <= 1 + 1e-6
    assert not torch.allclose(degraded[0] - x0[0], snow(x0, 10, noise.roll(1, 0))[0] - x0[0])


class Linear(Degradation):
    """D(x, t) = x + t e with e fixed: the case in which algorithm 2 forgives everything."""

    def __init__(self, num_steps=7):
        super().__init__(num_steps)

    def degrade(self, x0, t, noise):
        return x0 + t[:, None, None, None] * noise


def wrong(x, t):
    """A restorer that knows nothing."""
    return torch.tanh(3 * x.flip(-1)) + t / 5


def test_algorithm_2_recovers_from_any_restorer_where_the_degradation_is_linear_and_algorithm_1_does_not():
    x0, noise, steps = make_images().double(), draw(4, 1, 16, 16).double(), list(range(7, -1, -1))
    degradation = Linear()

    def degrade(x, t):
        return degradation(x, t, noise)

    degraded = degrade(x0, 7)
    # all but the last step, from 1 to 0: D(x0_hat, 0) = x0_hat, and the rest cancels as well
    torch.testing.assert_close(improved(wrong, degrade, degraded, steps), x0)
    torch.testing.assert_close(improved(wrong, degrade, degraded, [7, 4, 1, 0]), x0)
    assert (naive(wrong, degrade, degraded, steps) - x0).abs().mean() > 0.1


@pytest.mark.parametrize("sampler", [naive, improved])
@pytest.mark.parametrize("degradation", ALL.values(), ids=ALL)
def test_a_perfect_restorer_gives_the_image_back(sampler, degradation):
    x0, noise = make_images().double(), draw(4, 1, 16, 16).double()
    degraded = degradation(x0, degradation.num_steps, noise)
    steps = list(range(degradation.num_steps, -1, -1))
    seen = []
    made = sampler(
        lambda x, t: x0, lambda x, t: degradation(x, t, noise), degraded, steps, lambda *step: seen.append(step)
    )
    torch.testing.assert_close(made, x0)
    assert [step[0] for step in seen] == list(range(degradation.num_steps))
    for (_, x, x0_hat, _), t in zip(seen, steps, strict=False):
        torch.testing.assert_close(x, degradation(x0, t, noise))
        assert x0_hat is x0


def tiny(degradation=None, **options):
    torch.manual_seed(0)
    net = UNet(1, 8, 0, 8, (1, 2), 1, ())
    torch.nn.init.normal_(net.out.weight, std=0.3)  # a new network restores nothing
    return ColdDiffusion(net, degradation or Blur(4, 0.05, 0.3), **options)


def test_the_loss_is_the_mean_absolute_error_at_steps_that_are_drawn_evenly():
    module, x0 = tiny(), make_images(400, 8, 1)
    seen = {}
    inner = module.degradation.forward
    module.degradation.forward = lambda x0, t, noise: seen.update(t=t, noise=noise) or inner(x0, t, noise)
    loss = module.loss(x0, "train", 0)
    assert torch.bincount(seen["t"]).tolist()[0] == 0 and torch.bincount(seen["t"])[1:].min() > 70
    again = module(inner(x0, seen["t"], seen["noise"]), seen["t"])
    torch.testing.assert_close(loss, (again - x0).abs().mean())


def test_draws_are_keyed_and_shared_out_by_rank():
    x0, seen = make_images(8, 8, 1), []
    for world, rank in ((1, 0), (2, 0), (2, 1)):
        module = tiny(Mask(4))
        module._trainer = SimpleNamespace(world_size=world, global_rank=rank)
        module.degradation.forward = lambda x0, t, noise: seen.append((t, noise)) or x0
        module.loss(x0[rank::world], "train", 0, 1, 2)
    for whole, first, second in zip(*seen, strict=True):
        assert torch.equal(whole[::2], first) and torch.equal(whole[1::2], second)


def test_direct_restoration_is_one_call_and_fewer_steps_jump():
    module, x0 = tiny(), make_images(3, 8, 1)
    degraded, noise = module.degrade(x0, [0, 1, 2])
    with torch.no_grad():
        at_once = module.eval()(degraded, 4)
    torch.testing.assert_close(module.restore(degraded, noise, ColdSampling("direct")), at_once)
    calls = []
    module.net.register_forward_hook(lambda net, args, made: calls.append(float(args[1][0])))
    module.restore(degraded, noise, ColdSampling("improved", 2))
    assert calls == [999.0, 499.5]
    with pytest.raises(ValueError, match="num_steps is 9, but the degradation has 4 steps"):
        module.restore(degraded, noise, ColdSampling(num_steps=9))


def test_settings_are_those_of_restorers():
    setting = tiny().sampling
    assert (setting.sampler, setting.num_steps, setting.nfe) == ("improved", 4, 4)
    assert setting.replace(sampler="direct").nfe == 1 and ColdSampling(**setting.record()) == setting
    assert setting.replace(sampler="direct").replace(sampler="naive").num_steps is None
    assert setting.replace(sampler=None, grid=None) == setting
    for name, value in (("grid", "karras"), ("clip_x0", "static")):
        with pytest.raises(ValueError, match=f"Cold diffusion has no noise and so no {name}; leave --{name} out"):
            setting.replace(**{name: value})
    with pytest.raises(ValueError, match="cold diffusion has no classes"):
        setting.replace(cfg_scale=2.0)
    with pytest.raises(ValueError, match="no sampler 'heun' here; choose one of improved, naive, direct"):
        setting.replace(sampler="heun")


def test_principal_components_have_the_images_covariance():
    x = draw(300, 6) @ draw(6, 6, seed=1) + 3
    mean, components = principal_components(x.double(), 6)
    np.testing.assert_allclose(components.T @ components, np.cov(x.numpy().T), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mean, x.double().mean(0))
    lengths = components.norm(dim=1)
    assert bool((lengths[:-1] >= lengths[1:]).all())
    few = principal_components(x[:3].double(), 6)[1]
    assert few[2:].abs().max() < 1e-6 and few[1].norm() > 0.1


FIT = [
    *["fit", "--config", CONFIG, "--trainer.accelerator=cpu", "--trainer.max_steps=4", "--trainer.callbacks=[]"],
    *["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--sample_grid.rows=1"],
    *["--model.init_args.net.init_args.model_channels=8", "--data.init_args.batch_size=16", "--trajectory.count=1"],
    *["--model.init_args.degradation=diffusion_lit.diffusion.Mask", "--model.init_args.degradation.num_steps=4"],
    "--trainer.val_check_interval=2",
]


@pytest.mark.medium
def test_a_run_that_was_cut_ends_in_the_same_weights_and_its_checkpoint_is_all_that_is_needed(lightning, tmp_path):
    lightning(*FIT, "--name=whole")
    lightning(*FIT, "--name=cut", "--trainer.max_steps=2", "--model.init_args.lr_scheduler.init_args.total_steps=4")
    lightning(*FIT, "--name=cut", "--ckpt_path=last")
    whole, cut = (tmp_path / f"runs/{name}/version_0/checkpoints/last.ckpt" for name in ("whole", "cut"))
    one, two = (torch.load(path, weights_only=True) for path in (whole, cut))
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, two[key][name]) for name, value in one[key].items())
    assert {"samples", "trajectory"} <= {path.name for path in whole.parents[1].iterdir()}
    assert list((whole.parents[1] / "trajectory").glob("*.gif"))

    module = load_module(whole)
    first = module.generate(range(5))
    assert first.isfinite().all() and not torch.equal(first[0], first[1])
    torch.testing.assert_close(first[2:4], module.generate([2, 3]))
    lightning("export", "--ckpt_path", whole, "--out=exported")
    assert torch.equal(load_module("exported").generate([2, 3]), module.generate([2, 3]))
    lightning("sample", "--ckpt_path", whole, "--num_samples=4", "--out=drawn", "--sampler=naive", "--trajectory")
    assert (tmp_path / "drawn/grid.png").exists() and (tmp_path / "drawn/trajectory.gif").exists()
    lightning("evaluate", "--ckpt_path", whole, "--num_samples=8", "--num_blocks=1", "--extractor=pixels")
    assert (tmp_path / "runs/evaluations/report.json").exists()
    for command in (["sample", "--labels=all"], ["sample", "--grid=karras"], ["evaluate", "--likelihood"]):
        with pytest.raises(SystemExit) as refused:
            lightning(command[0], "--ckpt_path", whole, "--num_samples=4", *command[1:])
        assert refused.value.code == 2


def test_what_was_never_trained_draws_nothing():
    with pytest.raises(ValueError, match="has seen no training images"):
        tiny().generate([0])
    with pytest.raises(ValueError, match="takes no labels"):
        tiny().generate([0], torch.tensor([1]))


@pytest.mark.medium
@pytest.mark.parametrize("degradation", ["Blur", "Pixelate", "Snow"])
def test_the_config_of_real_data_runs_with_every_degradation(lightning, idx_folder, degradation):
    lightning(
        *["fit", "--config", CONFIG.with_name("cold_fashion_mnist.yaml"), "--trainer.fast_dev_run=1"],
        *["--trainer.accelerator=cpu", "--trainer.callbacks=[]", "--trainer.enable_progress_bar=false"],
        *["--data.init_args.root", idx_folder, "--data.init_args.val_size=8", "--data.init_args.batch_size=4"],
        *["--model.init_args.net.init_args.model_channels=16", "--sample_grid.rows=1", "--sample_grid.columns=1"],
        f"--model.init_args.degradation=diffusion_lit.diffusion.{degradation}",
        *["--trajectory.count=1", "--trainer.enable_model_summary=false"],
    )
