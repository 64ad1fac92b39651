"""The VAE: its loss from its definition, its figures, its images, and that it learns to give a batch back."""

import math

import numpy as np
import pytest
import torch
from helpers.runs import TINY_VAE, VAE_DIGITS
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio

from diffusion_lit.diffusion.images import psnr
from diffusion_lit.modules import L2, VAE
from diffusion_lit.modules.quality import LatentUse, active_channels
from diffusion_lit.nets import FSQ, Autoencoder


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(**options):
    torch.manual_seed(0)
    return VAE(Autoencoder(1, 8, 2, 8, (1, 2)), **options)


def test_the_loss_is_the_weighted_sum_per_value():
    module = tiny(reconstruction=L2(), kl_weight=0.25)
    image = draw(3, 1, 8, 8).clamp(-1, 1)
    terms = module.terms(image, "k")
    posterior = module.net.encode(image)
    x_hat = module.net.decode(
        posterior.mean + posterior.std * module.keyed_noise(posterior.mean.shape, "posterior", "k")
    )
    kl = (0.5 * (posterior.mean**2 + posterior.std**2 - 1) - posterior.std.log()).sum() / 3
    expected = ((x_hat - image).square().sum() / 3 + 0.25 * kl) / 64
    torch.testing.assert_close(module.loss(terms, 64, 0.25), expected)


def test_the_posteriors_noise_is_a_function_of_its_key():
    module = tiny()
    image = draw(2, 1, 8, 8).clamp(-1, 1)
    first, again, other = (module.terms(image, *key) for key in (("a", 1), ("a", 1), ("a", 2)))
    assert torch.equal(first.reconstruction, again.reconstruction)
    assert not torch.equal(first.reconstruction, other.reconstruction)


def test_the_divergence_is_warmed_up():
    module = tiny(kl_weight=2.0, kl_warmup_steps=4)
    assert module.current_kl_weight() == 0.5  # at step 0 of 4
    assert tiny(kl_weight=2.0).current_kl_weight() == 2.0


def test_psnr_is_torchmetrics_per_image():
    x, x_hat = draw(3, 1, 8, 8).clamp(-1, 1), draw(3, 1, 8, 8, seed=1).clamp(-1, 1)
    theirs = [peak_signal_noise_ratio(a, b, data_range=(-1.0, 1.0)) for a, b in zip(x_hat, x, strict=True)]
    torch.testing.assert_close(psnr(x_hat, x), torch.stack(theirs))
    assert float(psnr(x, x).min()) == pytest.approx(100)


def test_a_channel_is_active_where_its_mean_tells_images_apart():
    means = torch.stack([draw(500, 3, 3), 0.05 * draw(500, 3, 3, seed=1), draw(1, 3, 3).expand(500, 3, 3)], dim=1)
    sums = torch.stack([torch.ones_like(means[0]) * 500, means.sum(0), means.square().sum(0)])
    assert int(active_channels(sums)) == 1


def test_a_sample_depends_on_its_seed_alone():
    module = tiny()
    together = module.generate([5, 6, 7])
    torch.testing.assert_close(module.generate([6]), together[1:2], rtol=1e-4, atol=1e-5)
    assert together.shape == (3, 1, 8, 8)
    with pytest.raises(ValueError, match="unconditional"):
        module.generate([0], torch.tensor([1]))


def test_the_ends_of_an_interpolation_are_the_reconstructions():
    module = tiny().eval()
    first, last = draw(2, 1, 8, 8), draw(2, 1, 8, 8, seed=1)
    way = module.interpolate(first, last, torch.tensor([0.0, 0.5, 1.0]))
    assert way.shape == (2, 3, 1, 8, 8)
    torch.testing.assert_close(way[:, 0], module.reconstruct(first), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(way[:, 2], module.reconstruct(last), rtol=1e-4, atol=1e-5)
    middle = module.net.decode((module.net.encode(first).mean + module.net.encode(last).mean) / 2)
    torch.testing.assert_close(way[:, 1], middle, rtol=1e-4, atol=1e-5)


@pytest.mark.medium
def test_a_batch_that_is_learned_by_heart_comes_back():
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    image = torch.from_numpy(load_digits().images[:8]).float()[:, None] / 8 - 1
    module = VAE(Autoencoder(1, 8, 4, 32, (1, 2)))
    optimizer = torch.optim.Adam(module.parameters(), 4e-3)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / 300)
        optimizer.zero_grad()
        module.loss(module.terms(image, step), 64, 0.1).backward()
        optimizer.step()
    assert float(psnr(module.reconstruct(image).clamp(-1, 1), image).mean()) > 30


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kl_weight": -1.0}, "kl_weight is -1"), ({"lpips_weight": 1.0, "lpips_net": "resnet"}, "lpips_net is 'resnet'")],
)
def test_what_it_cannot_be_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_its_one_way_to_draw_takes_no_options():
    module = tiny()
    assert module.sampling.replace(sampler=None, num_steps=None) is module.sampling
    with pytest.raises(ValueError, match="no num_steps"):
        module.sampling.replace(num_steps=5)


def test_a_run_leaves_its_images_and_figures(lightning, tmp_path):
    lightning(
        *["fit", "--config", VAE_DIGITS, *TINY_VAE, "--trainer.max_steps=3", "--sample_grid.columns=2"],
        "--trainer.callbacks=[{class_path: diffusion_lit.callbacks.Reconstructions},"
        "{class_path: diffusion_lit.callbacks.Interpolations},{class_path: diffusion_lit.callbacks.ReconstructionFID,"
        "init_args: {extractor: diffusion_lit.evaluation.Pixels, num_samples: 100}}]",
    )
    run = tmp_path / "runs/vae_digits/version_0"
    grid = Image.open(run / "reconstructions/step_0000003.png")
    assert 1.9 < grid.width / grid.height < 2.1  # 12 columns; images, reconstructions and differences in 6 rows
    assert (run / "interpolations/step_0000003.png").is_file()
    assert (run / "samples/step_0000003.png").is_file()
    assert not (run / "trajectory").exists()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    values = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    assert {"val/psnr", "val/ssim", "val/kl", "val/bits_per_dim", "val/active_channels"} <= set(values)
    assert "rfd_pixels_100" in values
    # under kl_weight 1 the loss is the bound in nats
    assert values["val/loss"] == pytest.approx(values["val/bits_per_dim"] * math.log(2), rel=1e-5)
    lightning(*["sample", "--ckpt_path", run / "checkpoints/last.ckpt", "--num_samples=5", "--out=o"])
    assert np.load(tmp_path / "o/samples.npz")["arr_0"].shape == (5, 8, 8, 1)
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["autoencoder"]["class_path"].endswith("Autoencoder")
    assert checkpoint["autoencoder"]["init_args"]["image_size"] == 8


def test_the_use_of_codes_is_the_perplexity_of_their_frequencies():
    bottleneck, use = FSQ([2, 3]), LatentUse()
    codes = bottleneck.of_normal(torch.tensor([[-2.0, -2.0], [-2.0, -2.0], [2.0, 2.0], [2.0, 0.0]]).reshape(4, 2, 1, 1))
    use.add(codes[:1], bottleneck)
    use.add(codes[1:], bottleneck)  # frequencies 1/2, 1/4, 1/4
    figures = use.figures(lambda x: x)
    assert float(figures["code_perplexity"]) == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))
    assert int(figures["active_channels"]) == 2
    assert use.figures(lambda x: x) == {}
    use.add(codes, None)
    assert "code_perplexity" not in use.figures(lambda x: x)
