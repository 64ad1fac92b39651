"""Codes: what they may be, what they cost, whose gradient they have, and that the decoder knows no others."""

import itertools
import math

import pytest
import torch

from diffusion_lit.nets import FSQ, VQ, Autoencoder, PatchDiscriminator


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(x):
    return torch.nn.functional.normalize(x, dim=1)


def vq(codes=7, channels=3):
    torch.manual_seed(0)
    made = VQ(codes)
    made.attach(channels)
    return made


def test_every_channel_of_fsq_takes_its_levels_and_no_others():
    fsq = FSQ([2, 3, 4, 5])
    fsq.attach(4)
    codes = fsq(5 * draw(4000, 4, 1, 1)).mean
    for channel, count in enumerate([2, 3, 4, 5]):
        steps = (torch.arange(count) - count // 2) / (count // 2)  # equidistant, the middle at 0
        assert codes[:, channel].unique().tolist() == pytest.approx(steps.tolist())
    everything = torch.tensor(list(itertools.product(*[codes[:, c].unique().tolist() for c in range(4)])))
    numbers = fsq.index(everything[:, :, None, None]).flatten()
    assert sorted(numbers.tolist()) == list(range(2 * 3 * 4 * 5))  # each code has a number of its own


def test_fsq_rounds_to_the_nearest_level_with_the_gradient_of_what_it_rounds():
    fsq = FSQ([5])
    fsq.attach(1)
    h = draw(50, 1, 1, 1).double().requires_grad_()
    codes = fsq(h).mean
    smooth = torch.tanh(h) * 2 * (1 + 1e-3)  # five levels: the squeeze without its rounding, in steps
    assert torch.equal(codes.detach() * 2, smooth.detach().round())
    (grad,) = torch.autograd.grad(codes.sum(), h)
    (expected,) = torch.autograd.grad(smooth.sum() / 2, h)
    torch.testing.assert_close(grad, expected)


def test_vq_takes_the_nearest_vector_by_brute_force():
    made = vq()
    h = draw(4, 3, 2, 2)
    unit = made.codebook / made.codebook.norm(dim=1, keepdim=True)
    points = (h / h.norm(dim=1, keepdim=True)).permute(0, 2, 3, 1).reshape(-1, 3)
    nearest = torch.cdist(points, unit).argmin(1)
    assert made.index(h).flatten().tolist() == nearest.tolist()
    codes = made(h)
    torch.testing.assert_close(codes.mean.permute(0, 2, 3, 1).reshape(-1, 3), unit[nearest].detach())
    apart = (unit[nearest] - points).square().reshape(4, -1).mean(1)
    torch.testing.assert_close(codes.penalty(), 1.25 * apart)
    codes.penalty().sum().backward()  # the codebook learns from the penalty, and only codes that were taken
    moved = made.codebook.grad.abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == nearest.unique().tolist()


@pytest.mark.parametrize("bottleneck", [FSQ([3, 5, 2]), vq()], ids=["FSQ", "VQ"])
def test_the_decoder_knows_codes_alone(bottleneck):
    net = Autoencoder(1, 8, 3, 8, (1, 2), bottleneck=bottleneck).eval()
    image = draw(3, 1, 8, 8)
    posterior = net.encode(image)
    assert torch.equal(posterior.sample(draw(*posterior.mean.shape)), posterior.mean)
    assert torch.equal(bottleneck.nearest(posterior.mean), posterior.mean)  # a code is the nearest to itself
    assert torch.equal(net.decode(posterior.mean + 1e-3), net.decode(posterior.mean))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bottleneck.nearest(posterior.mean), posterior.mean)
    x = posterior.mean.detach().requires_grad_()
    net.decode(x).sum().backward()
    assert float(x.grad.abs().sum()) > 0  # straight through


@pytest.mark.parametrize(("bottleneck", "count"), [(FSQ([3, 5, 2]), 30), (vq(), 7)], ids=["FSQ", "VQ"])
def test_a_code_is_as_long_as_its_number_and_the_prior_takes_all_equally_often(bottleneck, count):
    net = Autoencoder(1, 8, 3, 8, (1, 2), bottleneck=bottleneck)
    nats = net.encode(draw(2, 1, 8, 8)).kl().flatten(1).sum(1)
    assert nats.tolist() == pytest.approx([16 * math.log(count)] * 2, rel=1e-5)  # 4x4 positions
    index = bottleneck.index(bottleneck.of_normal(draw(30_000, 3, 1, 1, seed=1))).flatten()
    shares = torch.bincount(index, minlength=count) / len(index)
    assert len(shares) == count
    assert float((shares * count - 1).abs().max()) < 0.2


def test_an_autoencoder_of_codes_is_built_from_its_description():
    from diffusion_lit.modules.autoencoders import build, describe

    for bottleneck in (FSQ([3, 5]), VQ(9, 0.5), None):
        net = Autoencoder(1, 8, 2, 8, (1, 2), bottleneck=bottleneck).eval()
        again = build(describe(net)).eval()
        again.load_state_dict(net.state_dict())
        image = draw(2, 1, 8, 8)
        assert torch.equal(again(image), net(image))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FSQ([8, 1]), "levels is 1"),
        (lambda: FSQ([]), "levels is empty"),
        (lambda: Autoencoder(1, 8, 4, bottleneck=FSQ([8, 5])), r"FSQ has 2 levels, \[8, 5\], and the latents have 4"),
        (lambda: VQ(1), "codes is 1"),
        (lambda: VQ(8, 0.0), "commitment is 0"),
        (lambda: Autoencoder(1, 8, 1, bottleneck=VQ(8)), "at least 2 channels, and these have 1"),
        (lambda: PatchDiscriminator(1, 0), "model_channels is 0"),
        (lambda: PatchDiscriminator(1, 8, 3)(torch.zeros(1, 1, 12, 12)), "12"),
    ],
)
def test_what_cannot_be_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_logit_sees_its_patch_and_its_own_image_alone():
    torch.manual_seed(0)
    net = PatchDiscriminator(1, 8, 2)
    image = draw(3, 1, 32, 32)
    torch.testing.assert_close(net(image)[1:2], net(image[1:2]), rtol=1e-4, atol=1e-5)
    norms = [layer for layer in net.layers if isinstance(layer, torch.nn.GroupNorm)]
    for layer in norms:  # whose statistics are the whole image's
        layer.normalise = lambda x: x
    seen = image[:1].clone().requires_grad_()
    net(seen)[0, 0, 4, 4].backward()
    rows = (seen.grad[0, 0].abs().sum(1) > 0).nonzero().flatten()
    assert int(rows.max() - rows.min()) + 1 == 26


def test_vq_draws_codes_to_latents_and_by_its_share_latents_to_codes():
    """The source's equation 3: |e - stop(h)|^2 + beta |stop(e) - h|^2, each with its own weight."""
    made, h = vq(), draw(2, 3, 4, 4).requires_grad_()
    mine = torch.autograd.grad(made(h).penalty().sum(), [h, made.codebook])
    index = made.index(unit(h))
    codes = unit(made.codebook)[index].permute(0, 3, 1, 2)
    apart = (codes - unit(h)).square().flatten(1).mean(1).sum()  # its gradient by one end is that of the other held
    theirs = torch.autograd.grad(apart, [h, made.codebook])
    torch.testing.assert_close(mine[0], 0.25 * theirs[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(mine[1], theirs[1], rtol=1e-4, atol=1e-7)
