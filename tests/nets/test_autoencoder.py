"""The autoencoder's shapes, its posterior against torch's own distributions, and what it refuses."""

import pytest
import torch

from diffusion_lit.nets import Autoencoder, Posterior


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("options", "channels", "size", "latent"),
    [
        ({"channel_mult": (1,)}, 1, 8, (4, 8, 8)),
        ({"channel_mult": (1, 2), "latent_channels": 2}, 1, 8, (2, 4, 4)),
        ({"channel_mult": (1, 2), "patch_size": 2, "latent_channels": 3}, 3, 12, (3, 3, 3)),
        ({"channel_mult": (1, 1, 2), "attention": False, "num_blocks": 2}, 5, 20, (4, 5, 5)),
    ],
)
def test_any_channels_factor_and_size_that_divides(options, channels, size, latent):
    net = Autoencoder(channels, size, model_channels=8, **options)
    x = draw(2, channels, size, size)
    posterior = net.encode(x)
    assert net.latent_shape == latent == tuple(posterior.mean.shape[1:]) == tuple(posterior.std.shape[1:])
    assert size == net.factor * latent[1]
    assert bool((posterior.std > 0).all())
    assert net.decode(posterior.mean).shape == x.shape
    assert torch.equal(net(x), net.decode(posterior.mean))


def test_the_divergence_is_that_of_the_distributions():
    posterior = Posterior(draw(3, 2, 4, 4), draw(3, 2, 4, 4, seed=1).exp())
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Normal(posterior.mean, posterior.std), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(posterior.kl(), theirs)
    assert float(Posterior(torch.zeros(1), torch.ones(1)).kl()) == 0


def test_a_draw_has_the_posteriors_mean_and_spread():
    posterior = Posterior(torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), 0.5))
    z = posterior.sample(draw(1, 1, 200, 200))
    assert abs(float(z.mean()) - 3) < 0.02
    assert abs(float(z.std()) - 0.5) < 0.02


def test_its_config_builds_it_again():
    torch.manual_seed(0)
    net = Autoencoder(2, 12, 3, 8, (1, 2), 2, 2, False, 4, 0.1).eval()
    again = Autoencoder(**net.config).eval()
    again.load_state_dict(net.state_dict())
    x = draw(1, 2, 12, 12)
    assert torch.equal(net(x), again(x))


def test_the_noise_of_an_extreme_encoder_stays_finite():
    net = Autoencoder(1, 8, 1, 8, (1,))
    with torch.no_grad():
        net.encoder[-1].bias[1] = 1e6
    assert bool(torch.isfinite(net.encode(draw(1, 1, 8, 8)).kl()).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 10, "channel_mult": (1, 2, 2)}, "image_size=10 is not a multiple of 4"),
        ({"latent_channels": 0}, "latent_channels is 0"),
        ({"channel_mult": ()}, "channel_mult is empty"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_what_cannot_be_built_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        Autoencoder(**({"in_channels": 1, "image_size": 8, "model_channels": 8} | options))


def test_images_and_latents_of_another_shape_are_named():
    net = Autoencoder(1, 8, 4, 8, (1, 2))
    with pytest.raises(ValueError, match="1, H, W"):
        net.encode(draw(1, 3, 8, 8))
    with pytest.raises(ValueError, match="multiple of 2"):
        net.encode(draw(1, 1, 7, 8))
    with pytest.raises(ValueError, match="4, H, W"):
        net.decode(draw(1, 3, 4, 4))
