"""The denoiser: what the network is given, what comes back, in which precision, and what is refused."""

import pytest
import torch
from helpers.tiny_net import TinyNet

from diffusion_lit.diffusion import (
    SAMPLERS,
    ClassifierFreeGuidance,
    ClipX0,
    Conditioned,
    Denoiser,
    EDMPreconditioning,
    EpsPreconditioning,
    FlowPreconditioning,
    LearnedVarianceDenoiser,
    LinearSchedule,
    SeededNoise,
    VPreconditioning,
    X0Preconditioning,
)

SCHEDULE = LinearSchedule()
SCALINGS = [
    EDMPreconditioning(),
    EpsPreconditioning(SCHEDULE),
    X0Preconditioning(SCHEDULE),
    X0Preconditioning(),
    VPreconditioning(SCHEDULE),
    FlowPreconditioning(),
]
EVERY = pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: type(s).__name__)


def noisy(batch=4, channels=2, height=8, width=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)
    return (3 * x).to(dtype), torch.linspace(0.3, 20, batch, dtype=torch.float64).to(dtype)


@EVERY
def test_the_network_sits_inside_its_preconditioning(scaling):
    net = TinyNet(num_classes=3).double()
    x, sigma = noisy(dtype=torch.float64)
    label = torch.tensor([0, 2, 1, 3])
    x0_hat = Denoiser(net, scaling)(x, sigma, label)
    (call,) = net.calls
    c_skip, c_out, c_in, c_noise = (c[:, None, None, None] for c in scaling(sigma))
    torch.testing.assert_close(call["x"], c_in * x, rtol=1e-14, atol=0)
    assert torch.equal(call["noise"], c_noise.flatten()) and torch.equal(call["label"], label)
    expected = c_skip * x + c_out * net(c_in * x, c_noise.flatten(), label)
    torch.testing.assert_close(x0_hat, expected, rtol=1e-14, atol=1e-14)


@EVERY
@pytest.mark.parametrize("shape", [(1, 1, 5, 7), (3, 4, 9, 3), (2, 3, 8, 8)])
def test_one_sigma_for_all_is_the_same_as_one_for_each(scaling, shape):
    denoiser = Denoiser(TinyNet(shape[1]), scaling)
    x, _ = noisy(*shape)
    whole = denoiser(x, torch.tensor(2.0))
    assert whole.shape == shape
    assert torch.equal(whole, denoiser(x, torch.full((len(x),), 2.0)))
    torch.testing.assert_close(whole, denoiser(x, 2.0))
    assert denoiser.net.calls[0]["noise"].shape == (len(x),)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_precision_follows_the_image_but_not_below_single(scaling, dtype):
    net = TinyNet().to(torch.float64 if dtype == torch.float64 else torch.float32)
    x, sigma = noisy(dtype=dtype)
    x0_hat = Denoiser(net, scaling)(x, sigma)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    assert x0_hat.dtype == working
    assert {net.calls[0]["x"].dtype, net.calls[0]["noise"].dtype} == {working}
    exact = Denoiser(TinyNet().double(), scaling)(x.double(), sigma.double())
    tolerance = 1e-13 if dtype == torch.float64 else 1e-4  # in bf16 the coefficients alone would be off by 4e-3
    assert float((x0_hat - exact).detach().abs().max()) < tolerance * float(x.abs().max())


def test_preconditioning_stays_single_under_autocast():
    scaling = EDMPreconditioning()
    x, sigma = noisy()
    with torch.autocast("cpu", torch.bfloat16):
        x0_hat = Denoiser(TinyNet(), scaling)(x, sigma)
    c_skip, c_out, c_in, c_noise = (c[:, None, None, None] for c in scaling(sigma))
    with torch.autocast("cpu", torch.bfloat16):
        output = TinyNet()(c_in * x, c_noise.flatten())
    assert x0_hat.dtype == torch.float32
    torch.testing.assert_close(x0_hat, c_skip * x + c_out * output.float(), rtol=1e-6, atol=1e-6)


def test_a_network_in_half_precision_gets_half_images_and_exact_noise_levels():
    net = TinyNet().to(torch.bfloat16)
    x, _ = noisy()
    sigma = SCHEDULE.sigmas[[997, 998, 999, 1]].float()
    x0_hat = Denoiser(net, EpsPreconditioning(SCHEDULE))(x, sigma)
    assert x0_hat.dtype == torch.float32 and net.calls[0]["x"].dtype == torch.bfloat16
    torch.testing.assert_close(net.calls[0]["noise"], torch.tensor([997.0, 998.0, 999.0, 1.0]), rtol=0, atol=0.01)


def test_no_label_is_the_null_class():
    denoiser = Denoiser(TinyNet(num_classes=3), EDMPreconditioning())
    x, sigma = noisy()
    assert denoiser.num_classes == 3
    assert torch.equal(denoiser(x, sigma), denoiser(x, sigma, torch.full((4,), 3)))
    assert not torch.equal(denoiser(x, sigma), denoiser(x, sigma, torch.zeros(4, dtype=torch.long)))


def test_augmentation_labels_travel_only_when_given():
    net = TinyNet()
    denoiser = Denoiser(net, EDMPreconditioning())
    x, sigma = noisy()
    augment = torch.ones(4, 9)
    plain, augmented = denoiser(x, sigma), denoiser(x, sigma, augment=augment)
    assert "augment" not in net.calls[0] and torch.equal(net.calls[1]["augment"], augment)
    assert not torch.equal(plain, augmented)


@pytest.mark.parametrize("kind", [Denoiser, LearnedVarianceDenoiser])
def test_a_condition_image_travels_as_it_is(kind):
    net = TinyNet(out_channels=4 if kind is LearnedVarianceDenoiser else 2)
    net.condition_channels = 3
    denoiser = kind(net, EpsPreconditioning(SCHEDULE))
    x, sigma = noisy()
    condition = torch.full((4, 3, 8, 8), 0.5)
    denoiser(x, sigma), denoiser(x, sigma, condition=condition)
    assert "condition" not in net.calls[0] and torch.equal(net.calls[1]["condition"], condition)
    with pytest.raises(ValueError, match=r"condition has shape \(4, 2, 8, 8\)"):
        denoiser(x, sigma, condition=condition[:, :2])
    with pytest.raises(ValueError, match="model that takes none"):
        Denoiser(TinyNet(), EDMPreconditioning())(x, sigma, condition=condition)


def test_compiles_into_one_graph():
    denoiser = Denoiser(TinyNet(num_classes=3), EDMPreconditioning())
    x, sigma = noisy()
    label = torch.tensor([0, 1, 2, 3])
    denoiser.net.calls = denoiser.net.calls[:0]
    expected = denoiser(x, sigma, label)
    compiled = torch.compile(denoiser, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, sigma, label), expected)


def test_one_level_for_all_and_one_for_each_image_share_a_graph():
    class Net(torch.nn.Conv2d):
        def forward(self, x, noise, label=None):
            return super().forward(x) + torch.sin(noise)[:, None, None, None]

    torch.compiler.reset()
    graphs = []
    denoiser = Denoiser(Net(2, 2, 3, padding=1), EDMPreconditioning()).eval()
    denoiser.net.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    x, sigma = noisy()
    with torch.no_grad():
        for level in (sigma, 2.0, torch.tensor(0.5), sigma[0].expand(len(x))):
            denoiser(x, level)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("sigma", "label", "words"),
    [
        (torch.ones(3), None, r"sigma has shape \(3,\) for a batch of 4"),
        (torch.ones(4, 1), None, r"sigma has shape \(4, 1\)"),
        (torch.tensor(1000.0), None, "outside the noise levels that EpsPreconditioning"),
        (1.0, torch.tensor([0, 1, 2, 4]), "Label 4 is outside the classes 0 to 2"),
        (1.0, torch.tensor([0, -1, 2, 0]), "Label -1 is outside the classes 0 to 2"),
        (1.0, torch.tensor([0, 1, 2]), "Labels must be 4 integers"),
        (1.0, torch.ones(4), "Labels must be 4 integers"),
    ],
)
def test_bad_input_is_named(sigma, label, words):
    denoiser = Denoiser(TinyNet(num_classes=3), EpsPreconditioning(SCHEDULE))
    with pytest.raises(ValueError, match=words):
        denoiser(noisy()[0], sigma, label)


def test_a_label_for_an_unconditional_model_is_refused():
    with pytest.raises(ValueError, match="label was given to an unconditional model"):
        Denoiser(TinyNet(), EDMPreconditioning())(*noisy(), torch.zeros(4, dtype=torch.long))


def test_a_network_of_the_wrong_width_is_refused():
    with pytest.raises(ValueError, match="LearnedVarianceDenoiser"):
        Denoiser(TinyNet(out_channels=4), EDMPreconditioning())(*noisy())
    with pytest.raises(ValueError, match="out_channels 4"):
        LearnedVarianceDenoiser(TinyNet(), EDMPreconditioning())(*noisy())


def test_learned_variance_is_the_second_half_of_one_forward():
    net = TinyNet(num_classes=3, out_channels=4).double()
    scaling = VPreconditioning(SCHEDULE)
    denoiser = LearnedVarianceDenoiser(net, scaling)
    x, sigma = noisy(dtype=torch.float64)
    label = torch.tensor([0, 1, 2, 3])
    x0_hat, v = denoiser.learned_variance(x, sigma, sigma / 2, label)
    assert len(net.calls) == 1
    c_skip, c_out, c_in, c_noise = (c[:, None, None, None] for c in scaling(sigma))
    output = net(c_in * x, c_noise.flatten(), label)
    torch.testing.assert_close(x0_hat, c_skip * x + c_out * output[:, :2])
    # The network says -1 for the posterior variance and 1 for beta.
    torch.testing.assert_close(v, (output[:, 2:] + 1) / 2)
    assert torch.equal(denoiser(x, sigma, label), x0_hat)
    assert not hasattr(Denoiser(net, scaling), "learned_variance")


def test_the_sampler_takes_the_extremes_of_a_learned_variance():
    """A network that says -1 samples with the posterior variance and one that says 1 with beta."""
    net = TinyNet(num_classes=3, out_channels=4).double()
    denoiser = Conditioned(LearnedVarianceDenoiser(net, EpsPreconditioning(SCHEDULE)), torch.tensor([0, 1, 2, 3]))
    start = noisy(dtype=torch.float64)[0] * 50
    sigmas = torch.cat([SCHEDULE.sigmas[[999, 700, 400, 100]], torch.zeros(1, dtype=torch.float64)])

    def sample(variance):
        return SAMPLERS["ddpm"].function(denoiser, start, sigmas, variance=variance, noise=SeededNoise(range(4)))

    for said, variance in ((-1.0, "posterior"), (1.0, "beta")):
        net.register_forward_hook(
            lambda net, inputs, output, said=said: torch.cat([output[:, :2], torch.full_like(output[:, :2], said)], 1)
        )
        torch.testing.assert_close(sample("learned"), sample(variance))


class TwoLevels(TinyNet):
    """A network that is told a second noise level and depends on it."""

    takes_until = True

    def forward(self, x, noise, label=None, *, until=None):
        output = super().forward(x, noise, label, until=until)
        return output + torch.cos(3 * (noise if until is None else until))[:, None, None, None].to(x)


def test_until_maps_to_another_level_by_one_call_of_the_network():
    """Against the paper's own step z_r = z_t - (t - r) u(z_t, r, t) on the straight path (arXiv 2505.13447, eq. 12)."""
    net = TwoLevels(num_classes=3).double()
    denoiser = Denoiser(net, FlowPreconditioning())
    x, sigma = noisy(dtype=torch.float64)
    label, until = torch.tensor([0, 2, 1, 3]), sigma * torch.tensor([0.0, 0.3, 0.9, 0.99], dtype=torch.float64)
    moved = denoiser(x, sigma, label, until=until)
    assert len(net.calls) == 1
    t, r = (level / (1 + level) for level in (sigma, until))
    column = (slice(None), None, None, None)
    z = (1 - t)[column] * x
    expected = (z - (t - r)[column] * net(z, t, label, until=r)) / (1 - r)[column]
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12)
    # at 0 it is an estimate of the clean image; a level for all is the same as one for each
    torch.testing.assert_close(denoiser(x, sigma, until=0.0), denoiser.average(x, sigma, torch.zeros(4)))
    assert torch.equal(denoiser(x, 9.0, until=1.5), denoiser(x, torch.full((4,), 9.0), until=torch.full((4,), 1.5)))


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: ClipX0(ClassifierFreeGuidance(d, 2.0))])
def test_at_equal_levels_the_map_is_the_identity_and_no_network_is_called(wrap):
    net = TwoLevels(num_classes=3)
    denoiser = Denoiser(net, FlowPreconditioning())
    x, sigma = noisy()
    assert torch.equal(denoiser(x, sigma, until=sigma), x) and torch.equal(denoiser(x, 0.3, until=0.3), x)
    assert net.calls == []
    half = torch.where(torch.arange(4) < 2, sigma, 0.0)
    label = torch.tensor([0, 1, 2, 2])
    assert torch.equal(wrap(denoiser)(x, sigma, label, until=half)[:2], x[:2])
    # without until the estimate is that of a way of no length
    torch.testing.assert_close(denoiser(x, sigma), denoiser.average(x, sigma, sigma))


def test_until_is_refused_where_it_has_no_meaning():
    x, sigma = noisy()
    with pytest.raises(ValueError, match="takes none; train one with takes_until"):
        Denoiser(TinyNet(), FlowPreconditioning())(x, sigma, until=0.0)
    with pytest.raises(ValueError, match="takes none"):
        LearnedVarianceDenoiser(TwoLevels(out_channels=4), FlowPreconditioning())(x, sigma, until=0.0)
    with pytest.raises(ValueError, match="EDMPreconditioning has no c_noise for the level 0"):
        Denoiser(TwoLevels(), EDMPreconditioning())
    denoiser = Denoiser(TwoLevels(), FlowPreconditioning())
    for until, words in (
        (3.0, "until 3 is not between"),
        (-0.1, "until -0.1 is not"),
        (torch.ones(3), r"shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            denoiser(x, torch.full((4,), 2.0), until=until)
