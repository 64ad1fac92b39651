"""Augmentation: the label says all, nothing is the identity, and each transform equals torch's own on exact cases."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from diffusion_lit.nets import AUGMENT_DIM, Augment, augment_images


def image(n=2, height=16, width=16, seed=0):
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def smooth(height=128, width=128):
    """An image that interpolation reproduces well: a few low waves, dark at the border."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    image = torch.sin(3 * x + 1) * torch.cos(4 * y) + x * y
    return (image * torch.exp(-9 * (x**2 + y**2)))[None, None]


def label(n=2, **values):
    names = {"mirror": 0, "flip": 1, "scale": 2, "right": 7, "down": 8}
    rows = torch.zeros(n, AUGMENT_DIM)
    if "theta" in values:
        theta = values.pop("theta")
        rows[:, 3], rows[:, 4] = math.cos(theta) - 1, math.sin(theta)
    if "stretch" in values:
        w, phi = values.pop("stretch")
        rows[:, 5], rows[:, 6] = w * math.cos(2 * phi), w * math.sin(2 * phi)
    for key, value in values.items():
        rows[:, names[key]] = value
    return rows


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_zero_labels_are_the_identity_bit_for_bit():
    x = image()
    assert torch.equal(augment_images(x, torch.zeros(2, 9)), x)
    out, labels = Augment(probability=0.0, mirror=False)(x, generator())
    assert torch.equal(out, x)
    assert torch.count_nonzero(labels) == 0
    mixed = augment_images(x, torch.cat([label(1), label(1, theta=1.0)]))
    assert torch.equal(mixed[0], x[0])
    assert not torch.equal(mixed[1], x[1])


def test_mirrors_are_torch_flip():
    x = image()
    assert torch.equal(augment_images(x, label(mirror=1)), x.flip(3))
    assert torch.equal(augment_images(x, label(flip=1)), x.flip(2))
    assert torch.equal(augment_images(x, label(mirror=1, flip=1)), x.flip(2, 3))


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_quarter_turns_are_torch_rot90(turns):
    x = image()
    out = augment_images(x, label(theta=turns * math.pi / 2))
    torch.testing.assert_close(out, x.rot90(turns, (2, 3)), rtol=0, atol=1e-4)


def test_whole_pixels_are_a_slice_of_the_reflected_image():
    x = image(height=16, width=32)
    out = augment_images(x, label(right=0.5, down=-1.0))  # 0.125 * 32 * 0.5 = 2 right, 0.125 * 16 = 2 up
    wide = torch.cat([x.flip(3), x, x.flip(3)], 3)
    tall = torch.cat([wide.flip(2), wide, wide.flip(2)], 2)
    torch.testing.assert_close(out, tall[..., 16 + 2 : 32 + 2, 32 - 2 : 64 - 2], rtol=0, atol=1e-4)


def test_any_angle_is_torchvision_s_rotation():
    x = smooth()
    out = augment_images(x, label(1, theta=math.radians(33)))
    expected = TF.rotate(x, 33, InterpolationMode.BILINEAR)  # counter-clockwise
    assert (out - expected)[..., 16:-16, 16:-16].abs().max() < 0.01
    assert (x - expected).abs().max() > 0.1


def test_enlarging_is_torchvision_s_affine_scale():
    x = smooth()
    out = augment_images(x, label(1, scale=2.0))
    expected = TF.affine(x, 0.0, [0, 0], 2**0.4, [0.0, 0.0], InterpolationMode.BILINEAR)
    assert (out - expected).abs().max() < 0.01


def test_stretching_is_resizing_each_axis():
    x = smooth()
    w = 5 * math.log2(1.25)  # 2^(0.2 w) = 1.25: 128 columns become 160, cut to 128
    wide = F.interpolate(x, (128, 160), mode="bicubic", align_corners=False)[..., 16:-16]
    out = augment_images(x, label(1, stretch=(w, 0.0)))
    same_height = augment_images(out, label(1, stretch=(-w, 0.0)))
    assert (same_height - x)[..., 16:-16, 16:-16].abs().max() < 0.01
    rows = torch.linspace(-1, 1, 129)[:-1] + 1 / 128
    back = F.grid_sample(wide, torch.stack(torch.meshgrid(rows * 1.25, rows, indexing="ij")[::-1], -1)[None], "bicubic",
                         "reflection", align_corners=False)  # fmt: skip
    assert (out - back).abs().max() < 0.01


def test_stretching_along_an_axis_is_turning_stretching_and_turning_back():
    x, phi, w = smooth(), 0.7, 1.5
    direct = augment_images(x, label(1, stretch=(w, phi)))
    turned = augment_images(x, label(1, theta=-phi))
    composed = augment_images(augment_images(turned, label(1, stretch=(w, 0.0))), label(1, theta=phi))
    assert (direct - composed)[..., 16:-16, 16:-16].abs().max() < 0.02
    assert (direct - x).abs().max() > 0.1
    opposite = augment_images(x, label(1, stretch=(-w, phi + math.pi / 2)))
    torch.testing.assert_close(direct, opposite, rtol=0, atol=1e-4)


def test_the_order_is_scale_turn_stretch_move():
    x = smooth()
    together = augment_images(x, label(1, mirror=1, scale=-1.0, theta=0.5, stretch=(1.0, 0.3), right=0.2, down=0.1))
    step = x
    for one in ({"mirror": 1}, {"scale": -1.0}, {"theta": 0.5}, {"stretch": (1.0, 0.3)}, {"right": 0.2, "down": 0.1}):
        step = augment_images(step, label(1, **one))
    assert (together - step)[..., 32:-32, 32:-32].abs().max() < 0.02


def test_rotation_keeps_its_shape_in_an_oblong_image():
    """A quarter turn of the middle square of a 16x32 image is that square turned."""
    x = image(height=16, width=32)
    out = augment_images(x, label(theta=math.pi / 2))
    torch.testing.assert_close(out[..., 8:24], x[..., 8:24].rot90(1, (2, 3)), rtol=0, atol=1e-4)


def test_draws_are_a_function_of_the_key():
    augment = Augment(0.5)
    assert torch.equal(augment.draw(20, generator(3)), augment.draw(20, generator(3)))
    assert not torch.equal(augment.draw(20, generator(3)), augment.draw(20, generator(4)))
    a, b = generator(3), generator(3)
    Augment(0.5, rotate=False, mirror=False).draw(20, a)
    Augment(0.9).draw(20, b)
    assert torch.equal(a.get_state(), b.get_state()), "what is switched on must not change later draws"


def test_each_rank_s_rows_are_those_of_the_whole_batch():
    x, augment = image(12), Augment(0.7)
    whole, labels = augment(x, generator(1))
    for rank in range(3):
        drawn = augment.draw(12, generator(1))[rank::3]
        assert torch.equal(drawn, labels[rank::3])
        torch.testing.assert_close(augment_images(x[rank::3], drawn), whole[rank::3], rtol=0, atol=1e-5)


def test_drawn_labels_have_the_stated_distribution():
    labels = Augment(0.12).draw(40000, generator()).double()
    on = labels != 0
    assert on[:, 0].double().mean().item() == pytest.approx(0.5, abs=0.01)
    for column in (2, 4, 5, 7, 8):
        assert on[:, column].double().mean().item() == pytest.approx(0.12, abs=0.008)
    assert labels[on[:, 2], 2].std().item() == pytest.approx(1, abs=0.05)
    assert labels[on[:, 7], 7].std().item() == pytest.approx(1, abs=0.05)
    w = Augment(1.0).draw(40000, generator())[:, 5:7].double().norm(dim=1)  # |w|, whatever the angle
    assert w.pow(2).mean().item() == pytest.approx(1, abs=0.03)
    assert w.pow(4).mean().item() == pytest.approx(3, abs=0.25)
    assert (labels[on[:, 5], 6] == 0).double().mean().item() == pytest.approx(0.5, abs=0.03)
    theta = torch.atan2(labels[:, 4], labels[:, 3] + 1)[on[:, 4]]
    torch.testing.assert_close(
        (labels[:, 3] + 1) ** 2 + labels[:, 4] ** 2, torch.ones(40000).double(), atol=1e-6, rtol=0
    )
    assert theta.mean().item() == pytest.approx(0, abs=0.1)
    assert theta.std().item() == pytest.approx(math.pi / math.sqrt(3), abs=0.05)


@pytest.mark.parametrize("p", [0.12, 0.15, 1.0])
def test_each_label_is_as_frequent_as_in_edm_s_pipe(p):
    """Table 6 of the source simulated in its own order: a value is drawn first, then kept with its probability."""
    n, rng = 100_000, np.random.default_rng(0)
    multipliers = {"mirror": 1e8, "flip": 1, "scale": 1, "rotate": 1, "stretch": 1, "translate": 1}
    keep = {name: rng.random(n) < times * p for name, times in multipliers.items()}
    turned = rng.random(n) < 0.5
    theirs = {
        0: keep["mirror"] & (rng.integers(0, 2, n) == 1),
        1: keep["flip"] & (rng.integers(0, 2, n) == 1),
        2: keep["scale"],
        4: keep["rotate"],
        5: keep["stretch"],
        6: keep["stretch"] & turned,
        7: keep["translate"],
        8: keep["translate"],
    }
    ours = Augment(p).draw(n, generator()) != 0
    for column, on in theirs.items():
        assert ours[:, column].double().mean().item() == pytest.approx(on.mean(), abs=0.008), column
    together = (ours[:, 2] & ours[:, 4] & ours[:, 7]).double().mean().item()  # independently of each other
    assert together == pytest.approx((theirs[2] & theirs[4] & theirs[7]).mean(), abs=0.005)


def test_switches_turn_off_their_own_labels_alone():
    every = Augment(0.6).draw(500, generator())
    for name, columns in (
        ("mirror", [0]), ("flip", [1]), ("scale", [2]), ("rotate", [3, 4]), ("stretch", [5, 6]), ("translate", [7, 8]),
    ):  # fmt: skip
        labels = Augment(0.6, **{name: False}).draw(500, generator())
        expected = every.clone()
        expected[:, columns] = 0
        assert torch.equal(labels, expected)


def test_types_and_bad_input():
    x, rows = image(), label(theta=0.5, stretch=(1.0, 0.3), right=1.3)
    exact = augment_images(x, rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment_images(x, rows), exact)
        half = augment_images(x.bfloat16(), rows)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0, atol=0.05)
    with pytest.raises(ValueError, match=r"probability is 1\.2"):
        Augment(1.2)
    with pytest.raises(ValueError, match=r"shape \(2, 9\), not \(3, 9\)"):
        augment_images(x, torch.zeros(3, 9))
