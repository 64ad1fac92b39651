"""What holds for every network: shapes, conditions that are really used, no dead parameters, half precision."""

from pathlib import Path

import pytest
import torch
import yaml

from diffusion_lit.nets import DiT, PlainUNet, UNet

SMALL = {
    "unet": lambda **kw: UNet(**{"model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1} | kw),
    "unet patches": lambda **kw: UNet(**{"model_channels": 16, "channel_mult": (1, 2), "patch_size": 2} | kw),
    "unet ddpm++": lambda **kw: UNet(
        **{
            "model_channels": 16,
            "channel_mult": (1, 2),
            "num_blocks": 1,
            "adaptive_scale": False,
            "resample": "block",
            "resample_filter": (1, 3, 3, 1),
            "skip_scale": 0.5**0.5,
            "decoder_attention": "last",
        }
        | kw
    ),
    "unet linear": lambda **kw: UNet(
        **{
            "model_channels": 16,
            "channel_mult": (1, 2),
            "num_blocks": 1,
            "linear_attention_resolutions": (16,),
            "resample": "unshuffle",
        }
        | kw
    ),
    "unet pool": lambda **kw: UNet(
        **{"model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "resample": "pool"} | kw
    ),
    "dit": lambda **kw: DiT(**{"hidden_channels": 32, "depth": 2, "num_heads": 2} | kw),
}


def build(name, seed=0, **options):
    """A small network whose zero-initialised parts are moved off zero, so that everything has an effect."""
    torch.manual_seed(seed)
    net = SMALL[name](**{"in_channels": 2, "image_size": 16, "noise_embedding": "fourier"} | options)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net.eval()


def batch(n=3, channels=2, size=16):
    torch.manual_seed(1)
    return torch.randn(n, channels, size, size), torch.rand(n)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 16, 16), (3, 8, 20), (4, 28, 12)])
def test_shapes(name, channels, height, width):
    net = build(name, in_channels=channels)
    out = net(torch.randn(2, channels, height, width), torch.rand(2))
    assert out.shape == (2, channels, height, width)
    assert build(name, out_channels=6)(*batch()).shape == (3, 6, 16, 16)


@pytest.mark.parametrize("name", SMALL)
def test_a_new_network_predicts_zero_and_says_what_it_is(name):
    net = SMALL[name](in_channels=2, image_size=16, num_classes=3, out_channels=4)
    assert (net.in_channels, net.out_channels, net.image_size, net.num_classes) == (2, 4, 16, 3)
    assert torch.count_nonzero(net(*batch())) == 0


@pytest.mark.parametrize("name", SMALL)
def test_every_condition_is_used(name):
    net = build(name, num_classes=3, augment_dim=9)
    x, noise = batch()
    label, augment = torch.tensor([0, 1, 2]), torch.randn(3, 9)
    with torch.no_grad():
        out = net(x, noise, label, augment)
        scale = out.std()
        for other in (
            net(x, noise + 0.3, label, augment),
            net(x, noise, (label + 1) % 3, augment),
            net(x, noise, None, augment),
            net(x, noise, label, -augment),
            net(x, noise, label),
            net(x + 0.1 * torch.randn_like(x), noise, label, augment),
        ):
            assert ((other - out).flatten(1).abs().amax(1) > 1e-3 * scale).all()
        assert torch.equal(net(x, noise, label), net(x, noise, label, torch.zeros(3, 9)))


@pytest.mark.parametrize("name", SMALL)
def test_a_condition_image_is_more_channels_of_the_input(name):
    net, wide = build(name, condition_channels=3), build(name, in_channels=5, out_channels=2)
    wide.load_state_dict(net.state_dict())
    x, noise = batch()
    condition = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        out = net(x, noise, condition=condition)
        assert torch.equal(out, wide(torch.cat([x, condition], 1), noise))
        assert torch.equal(net(x, noise), net(x, noise, condition=torch.zeros_like(condition)))
        assert (net(x, noise) - out).abs().max() > 1e-3 * out.std()
    with pytest.raises(ValueError, match=r"condition of shape \(3, 3, 16, 16\)"):
        net(x, noise, condition=condition[:, :2])


@pytest.mark.parametrize("name", SMALL)
def test_no_label_is_the_null_class(name):
    net = build(name, num_classes=3)
    x, noise = batch()
    assert torch.equal(net(x, noise), net(x, noise, torch.full((3,), 3)))
    with pytest.raises(IndexError):
        net(x, noise, torch.tensor([0, 1, 4]))


@pytest.mark.parametrize("name", SMALL)
def test_images_of_a_batch_do_not_see_each_other(name):
    net = build(name, num_classes=3).double()
    x, noise = batch()
    x, noise, label = x.double(), noise.double(), torch.tensor([2, 0, 3])
    together = net(x, noise, label)
    alone = torch.cat([net(x[i : i + 1], noise[i : i + 1], label[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_learns(name):
    net = build(name, num_classes=2, augment_dim=9)
    x, noise = batch()
    net(x, noise, torch.tensor([0, 1, 2]), torch.randn(3, 9)).square().sum().backward()
    dead = [key for key, p in net.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6]
    assert not dead
    rows = net.conditioning.label.weight.grad.abs().amax(1)
    assert (rows > 1e-6).all(), "each class and the null class has a row of its own"


@pytest.mark.parametrize("name", SMALL)
def test_conditions_without_a_place_are_refused(name):
    net = build(name)
    x, noise = batch()
    with pytest.raises(ValueError, match="num_classes"):
        net(x, noise, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="augment_dim"):
        net(x, noise, augment=torch.zeros(3, 9))
    with pytest.raises(ValueError, match="condition_channels"):
        net(x, noise, condition=x)


@pytest.mark.parametrize("name", SMALL)
def test_sizes_that_do_not_divide_are_refused(name):
    with pytest.raises(ValueError, match="image_size=17 is not a multiple of"):
        build(name, image_size=17)
    net = build(name)
    with pytest.raises(ValueError, match=r"16x17 .* multiple of"):
        net(torch.zeros(1, 2, 16, 17), torch.zeros(1))
    with pytest.raises(ValueError, match=r"17x16 .* multiple of"):
        net(torch.zeros(1, 2, 17, 16), torch.zeros(1))
    with pytest.raises(ValueError, match=r"\(B, 2, H, W\), not \(1, 3, 16, 16\)"):
        net(torch.zeros(1, 3, 16, 16), torch.zeros(1))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    "bad",
    [{"in_channels": 0}, {"num_classes": -1}, {"patch_size": 0}, {"augment_dim": -9}, {"noise_embedding": "sine"}],
)
def test_arguments_out_of_range_are_refused_by_name(name, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SMALL[name](**bad)


@pytest.mark.parametrize(
    "bad",
    [
        {"channel_mult": ()},
        {"channel_mult": (1, 0)},
        {"num_blocks": 0},
        {"dropout": 1.0},
        {"resample": "stride"},
        {"resample": "pool", "resample_filter": (1, 2, 1)},
        {"decoder_attention": "first"},
        {"head_channels": 0},
        {"model_channels": 3},
    ],
)
def test_the_unet_refuses_what_it_cannot_build(bad):
    with pytest.raises(
        ValueError, match=r"level|channel_mult|num_blocks|dropout|resample|decoder|head_channels|features"
    ):
        UNet(**{"model_channels": 8, "image_size": 16} | bad)


@pytest.mark.parametrize("bad", [{"hidden_channels": 30}, {"num_heads": 5}, {"depth": 0}, {"mlp_ratio": 0.0}])
def test_the_dit_refuses_what_it_cannot_build(bad):
    with pytest.raises(ValueError, match=r"hidden_channels|num_heads|depth|mlp_ratio"):
        DiT(**{"hidden_channels": 32} | bad)


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_autocast_stays_near_float32(name):
    net = build(name, num_classes=3)
    x, noise = batch()
    with torch.no_grad():
        exact = net(x, noise)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = net(x, noise)
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).std() < 0.03 * exact.std()


@pytest.mark.parametrize("name", SMALL)
def test_neighbouring_steps_stay_apart_under_bfloat16(name):
    net = build(name, noise_embedding="positional")
    steps = torch.tensor([900.0, 901.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        emb = net.conditioning(steps, None, None)
    assert emb.dtype == torch.float32
    exact = net.conditioning(steps.double(), None, None)
    torch.testing.assert_close(emb, exact.to(emb.dtype), rtol=1e-3, atol=1e-4)
    assert (emb[0] - emb[1]).abs().max() > 1e-3


def test_the_plain_network_ignores_the_noise_level():
    torch.manual_seed(0)
    net = PlainUNet(in_channels=2, image_size=16, model_channels=16, channel_mult=(1, 2), num_blocks=1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    x, noise = batch()
    assert net.conditioning is None
    assert torch.equal(net(x, noise), net(x, noise + 5))
    with pytest.raises(ValueError, match="num_classes"):
        net(x, noise, torch.zeros(3, dtype=torch.int64))
    labelled = PlainUNet(2, 16, num_classes=3, model_channels=16, channel_mult=(1, 2))
    with torch.no_grad():
        for p in labelled.parameters():
            p.add_(0.05 * torch.randn_like(p))
    assert torch.equal(labelled(x, noise), labelled(x, noise + 5))
    assert not torch.equal(labelled(x, noise), labelled(x, noise, torch.tensor([0, 1, 2])))


def test_attention_stands_where_it_was_asked_for():
    from diffusion_lit.nets.layers import Attention, LinearAttention

    def count(**options):
        net = UNet(image_size=32, model_channels=8, channel_mult=(1, 1, 1), num_blocks=2, **options)
        full = sum(type(m) is Attention for m in net.modules())
        return full, sum(type(m) is LinearAttention for m in net.modules())

    assert count(attention_resolutions=()) == (0, 0)
    assert count(attention_resolutions=(16,)) == (2 + 1 + 3, 0)  # encoder, middle, decoder
    assert count(attention_resolutions=(16, 8), decoder_attention="last") == (4 + 1 + 2, 0)
    assert count(attention_resolutions=(8,), linear_attention_resolutions=(32,)) == (6, 5)
    assert count(attention_resolutions=(8,), patch_size=4) == (6, 0)  # 8 is the largest map behind the stem
    assert count(attention_resolutions=(-1, -2)) == count(attention_resolutions=(16, 8))
    with pytest.raises(ValueError, match=r"attention_resolutions has 4, but .* sizes 32, 16, 8; take these, or -1"):
        count(attention_resolutions=(8, 4))


def attends_at(**options):
    """Sizes of the feature maps that attention sees, by running the network."""
    from diffusion_lit.nets.layers import Attention

    net, seen = UNet(1, **{"model_channels": 8, "num_blocks": 1, **options}), set()
    for module in net.modules():
        if type(module) is Attention:
            module.register_forward_hook(lambda module, args, out: seen.add(out.shape[-1]))
    net(torch.zeros(1, 1, options["image_size"], options["image_size"]), torch.zeros(1))
    return seen


@pytest.mark.parametrize(("size", "expected"), [(8, {8, 2}), (16, {8, 4}), (28, set()), (32, {8}), (48, set())])
def test_attention_that_nobody_asked_for_stands_at_8_where_a_map_has_that_size(size, expected):
    """The middle, at the smallest map, attends where any level does."""
    assert attends_at(image_size=size) == expected


NETS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize(
    "path",
    [
        "edm_digits",
        "ddpm_digits",
        "cold_digits",
        "consistency_digits",
        *("nets/" + p.stem for p in (NETS / "nets").glob("unet*")),
    ],
)
@pytest.mark.parametrize("size", [48, 64, 80])
def test_the_network_of_a_config_takes_images_of_another_size(path, size):
    config = yaml.safe_load((NETS / f"{path}.yaml").read_text())
    options = (config.get("model", {}).get("init_args", {}).get("net") or config)["init_args"]
    options = {**options, "model_channels": 8, "num_blocks": 1, "channel_mult": [1] * len(options["channel_mult"])}
    smallest = size // options.get("patch_size", 1) // 2 ** (len(options["channel_mult"]) - 1)
    wanted = {smallest * 2 ** (-level - 1) for level in options["attention_resolutions"]}
    assert attends_at(image_size=size, **options) == wanted


def test_without_attention_a_shift_of_the_image_shifts_the_prediction():
    """A convolutional network commutes with shifts by its total stride, away from the border."""
    net = UNet(1, 160, model_channels=8, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(), patch_size=2)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    for norm in (m for m in net.modules() if isinstance(m, torch.nn.GroupNorm)):
        norm.forward = lambda x, *modulation: x  # its statistics see the whole image
    net = net.double().requires_grad_(False)
    inner = torch.zeros(1, 1, 160, 160, dtype=torch.float64)
    inner[..., 76:84, 76:84] = torch.randn(8, 8, dtype=torch.float64)
    noise = torch.zeros(1, dtype=torch.float64)
    here, there = net(inner, noise), net(inner.roll((4, -4), (2, 3)), noise)
    middle = (..., slice(72, 88), slice(72, 88))  # 60 pixels that one output sees on each side keep off the border
    effect = (here - net(torch.zeros_like(inner), noise))[middle].abs().max()
    assert effect > 1e-3
    expected = here.roll((4, -4), (2, 3))[middle]
    torch.testing.assert_close(there[middle], expected, rtol=0, atol=1e-9 * effect.item())
    odd = net(inner.roll(1, 3), noise).roll(-1, 3)[middle]
    assert (odd - here[middle]).abs().max() > 1e-3 * effect, "it does not commute with a shift inside a patch"


@pytest.mark.parametrize("name", SMALL)
def test_the_cost_can_be_counted_without_computing(name):
    """On the meta device, as a plan of a run counts FLOPs."""
    with torch.device("meta"):
        net = SMALL[name](in_channels=2, image_size=16, num_classes=3)
        assert net(torch.randn(2, 2, 16, 16), torch.rand(2), torch.zeros(2, dtype=torch.int64)).shape == (2, 2, 16, 16)


def compiled_equals_eager(name, backend):
    net = build(name, num_classes=3, augment_dim=9)
    x, noise = batch()
    label, augment = torch.tensor([0, 1, 2]), torch.randn(3, 9)
    eager = net(x, noise, label, augment)
    net.compile(fullgraph=True, backend=backend)
    out = net(x, noise, label, augment)
    torch.testing.assert_close(out, eager, rtol=1e-3, atol=1e-4)
    out.sum().backward()


@pytest.mark.medium
@pytest.mark.parametrize(("name", "backend"), [("unet linear", "eager"), ("dit", "aot_eager")])
def test_the_compiler_sees_one_graph(name, backend):
    """No part of a network falls back to Python: the tracer takes it whole; all of the compiler runs when slow."""
    compiled_equals_eager(name, backend)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", "unet linear", "dit"])
def test_compiled_equals_eager(name):
    compiled_equals_eager(name, "inductor")


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_a_second_noise_level_matters_and_starts_out_as_if_it_did_not(name):
    torch.manual_seed(0)
    fresh = SMALL[name](in_channels=2, image_size=16, noise_embedding="fourier", takes_until=True)
    with torch.no_grad():
        for p in fresh.conditioning.out.parameters():
            p.add_(0.05 * torch.randn_like(p))
    x, noise = batch()
    embed = fresh.conditioning
    assert torch.equal(embed(noise, None, None, noise / 3), embed(noise, None, None))
    net = build(name, takes_until=True)
    told, untold, same = (net(x, noise, until=until) for until in (noise / 3, None, noise))
    assert torch.equal(untold, same)
    assert float((told - untold).abs().max()) > 1e-4
    with pytest.raises(ValueError, match="takes_until"):
        build(name)(x, noise, until=noise)
    with pytest.raises(ValueError, match="takes_until needs a noise embedding"):
        build(name, takes_until=True, noise_embedding="none")
