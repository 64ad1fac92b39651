"""The mixture that a VAE may draw from: it is the one that its latents come from, and a sample is its seed's own."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.runs import NO_IMAGES, TINY_VAE, VAE_DIGITS, stopped

from diffusion_lit.modules.prior import (
    RIDGE,
    GaussianMixturePrior,
    Prior,
    PriorSampling,
    fit_mixture,
    mixture_of,
)
from diffusion_lit.nets import FSQ, Autoencoder


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_it_finds_the_mixture_that_latents_come_from():
    centres = torch.tensor([[4.0, 0.0, 1.0], [-4.0, 2.0, 0.0]])
    first, second = [[1.0, 0, 0], [0.8, 0.5, 0], [0, 0, 2.0]], [[0.5, 0, 0], [0, 1.0, 0], [0.3, 0, 0.2]]
    mixing = torch.tensor([first, second])
    chosen = (torch.arange(4000) % 4 == 0).long()  # three parts of the first, one of the second
    latents = centres[chosen] + torch.einsum("bij,bj->bi", mixing[chosen], draw(4000, 3))
    fitted = fit_mixture(latents, components=2)
    order = fitted.means[:, 0].argsort(descending=True)
    torch.testing.assert_close(fitted.weights[order], torch.tensor([0.75, 0.25]), rtol=0, atol=0.01)
    torch.testing.assert_close(fitted.means[order], centres, rtol=0, atol=0.15)
    covariances = fitted.factors @ fitted.factors.mT
    torch.testing.assert_close(covariances[order], mixing @ mixing.mT, rtol=0.1, atol=0.1)


def test_its_moments_are_those_of_the_latents_whatever_the_number_of_components():
    """A step of the fit keeps the mean and, up to the ridge, the covariance of what it is fitted to."""
    latents = draw(500, 4) @ draw(4, 4, seed=1) + draw(500, 1, seed=2).sign() * torch.tensor([3.0, 0, 1, 0])
    for components in (1, 3):
        made = fit_mixture(latents, components)
        mean = (made.weights[:, None] * made.means).sum(0)
        torch.testing.assert_close(mean, latents.mean(0), rtol=1e-3, atol=1e-3)
        second = (made.factors @ made.factors.mT) + made.means[:, :, None] * made.means[:, None]
        covariance = (made.weights[:, None, None] * second).sum(0) - mean[:, None] * mean
        expected = torch.cov(latents.T, correction=0) + RIDGE * torch.eye(4)
        torch.testing.assert_close(covariance, expected, rtol=1e-2, atol=1e-2)


def test_draws_have_its_moments_and_depend_on_their_seeds_alone():
    means = torch.tensor([[3.0, 0.0], [-1.0, 1.0]])
    factors = torch.tensor([[[1.0, 0.0], [0.5, 1.0]], [[0.1, 0.0], [0.0, 0.1]]])
    prior = GaussianMixturePrior(torch.tensor([0.3, 0.7]), means, factors)
    drawn = prior.draw(None, (2, 1, 1), range(6000), torch.device("cpu")).flatten(1)
    mean = torch.tensor([0.3 * 3 - 0.7, 0.7])
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=0.1)
    second = 0.3 * (factors[0] @ factors[0].T + torch.outer(means[0], means[0]))
    second += 0.7 * (factors[1] @ factors[1].T + torch.outer(means[1], means[1]))
    torch.testing.assert_close(torch.cov(drawn.T), second - torch.outer(mean, mean), rtol=0.1, atol=0.1)
    assert torch.equal(prior.draw(None, (2, 1, 1), [17], torch.device("cpu")).flatten(1), drawn[17:18])


def test_the_prior_of_codes_draws_codes():
    net = Autoencoder(1, 8, 2, 8, (1, 2), bottleneck=FSQ([3, 4]))
    z = Prior().draw(net, (2, 4, 4), range(50), torch.device("cpu"))
    assert torch.equal(net.bottleneck.nearest(z), z)
    assert len(net.bottleneck.index(z).unique()) == 12
    assert PriorSampling().record() == {"sampler": "prior", "num_steps": 1, "cfg_scale": 1.0}


def test_too_few_latents_are_refused():
    with pytest.raises(ValueError, match="at least 20 training images, and 19 images are there; leave --prior out"):
        fit_mixture(draw(19, 2), 10)
    with pytest.raises(ValueError, match="components is 0"):
        fit_mixture(draw(19, 2), 0)


def test_latents_too_large_for_their_covariances_are_refused():
    net = Autoencoder(1, 64, 4, 8, (1, 2))
    with pytest.raises(ValueError, match="have 4096 entries.*of up to 2048: leave --prior out"):
        mixture_of(net, SimpleNamespace(image_shape=(1, 64, 64)))


@pytest.mark.medium
def test_the_commands_draw_from_it(lightning, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DIFFUSION_LIT_CACHE", str(tmp_path / "cache"))
    run = ["fit", "--config", VAE_DIGITS, *TINY_VAE, *NO_IMAGES, "--trainer.callbacks=[]", "--trainer.max_steps=2"]
    lightning(*run)
    checkpoint = "runs/vae_digits/version_0/checkpoints/last.ckpt"
    for out, more in (("plain", []), ("standard", ["--prior=standard"]), ("gmm", ["--prior=gmm"])):
        lightning("sample", "--ckpt_path", checkpoint, "--num_samples=6", f"--out={out}", *more)
    plain, standard, gmm = (np.load(f"{out}/samples.npz")["arr_0"] for out in ("plain", "standard", "gmm"))
    assert (plain == standard).all() and (plain != gmm).any()
    assert len(list((tmp_path / "cache/priors").iterdir())) == 1
    options = ["--extractor=pixels", "--num_samples=40", "--num_blocks=3", "--prior=gmm", "--out=report.json"]
    lightning("evaluate", "--ckpt_path", checkpoint, *options)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["results"][0]["sampling"]["sampler"] == "gmm"
    assert report["results"][0]["sampling"]["prior"]["components"] == 10
    found = report["reconstruction"]
    assert found["count"] == 40 and found["blocks"] == 3 and found["split"] == "test"
    for figure in ("psnr", "ssim", "perceptual_classifier", "rfd_pixels"):
        made, floor = (found[name][figure]["mean"] for name in ("reconstructions", "floor"))
        assert made < floor if figure in ("psnr", "ssim") else made > floor, figure
    assert found["floor"]["psnr"]["mean"] == 100 and found["floor"]["ssim"]["mean"] == pytest.approx(1)
    assert found["floor"]["rfd_pixels"]["mean"] < found["reconstructions"]["rfd_pixels"]["mean"]
    assert (tmp_path / found["images"]).is_file()
    assert "another image" in (tmp_path / "report.md").read_text()
    said = stopped(capsys, lightning, "sample", "--ckpt_path", checkpoint, "--prior=flow", "--out=no")
    assert "'flow'; choose one of standard, gmm" in said
    assert "is for latent diffusion" in stopped(capsys, lightning, "sample", "--ckpt_path", checkpoint, "--decoder=x")
