"""diffusers' autoencoders in the VAE's place: tiny ones that are built and saved here."""

import shutil

import pytest
import torch

from diffusion_lit.modules.autoencoders import load_autoencoder
from diffusion_lit.modules.latent_space import LatentSpace

diffusers = pytest.importorskip("diffusers")


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


@pytest.fixture
def kl(tmp_path):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=2, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
    ).eval()  # fmt: skip
    vae.save_pretrained(tmp_path / "kl")
    return vae, tmp_path / "kl"


@pytest.fixture
def tiny(tmp_path):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderTiny(
        latent_channels=3, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    ).eval()  # fmt: skip
    vae.save_pretrained(tmp_path / "tiny")
    return vae, tmp_path / "tiny"


@torch.no_grad()
def test_a_kl_autoencoder_computes_what_diffusers_does(kl):
    theirs, folder = kl
    ours, x = load_autoencoder(str(folder)), draw(2, 1, 8, 8)
    posterior = ours.encode(x)
    assert (ours.in_channels, ours.latent_channels, ours.factor) == (1, 2, 2)
    torch.testing.assert_close(posterior.mean, theirs.encode(x).latent_dist.mean)
    torch.testing.assert_close(posterior.std, theirs.encode(x).latent_dist.std)
    torch.testing.assert_close(ours.decode(posterior.mean), theirs.decode(posterior.mean).sample)


@torch.no_grad()
def test_a_tiny_autoencoder_computes_what_diffusers_does_and_has_no_noise(tiny):
    theirs, folder = tiny
    ours, x = load_autoencoder(str(folder)), draw(2, 3, 8, 8)
    posterior = ours.encode(x)
    assert (ours.in_channels, ours.latent_channels, ours.factor) == (3, 3, 2)
    torch.testing.assert_close(posterior.mean, theirs.encode(x).latents)
    assert float(posterior.std.abs().max()) == 0
    torch.testing.assert_close(ours.decode(posterior.mean), theirs.decode(posterior.mean).sample)


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_it_is_built_again_without_its_folder(kind, request, tmp_path):
    _, folder = request.getfixturevalue(kind)
    ours = load_autoencoder(str(folder))
    space = LatentSpace(ours, (ours.in_channels, 16, 16))
    assert space.shape == (ours.latent_channels, 8, 8)
    space.set_scale(torch.zeros(ours.latent_channels), torch.full((ours.latent_channels,), 2.0))
    torch.save(space.state(), tmp_path / "state.pt")
    shutil.rmtree(folder)
    again = LatentSpace.from_state(torch.load(tmp_path / "state.pt", weights_only=True))
    x = draw(1, ours.in_channels, 16, 16)
    assert torch.equal(again.reconstruct(x), space.reconstruct(x))
    assert torch.equal(again.standardise(torch.ones(1, *space.shape)), torch.full((1, *space.shape), 0.5))


def test_another_model_is_told(tmp_path):
    diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    ).save_pretrained(tmp_path / "unet")  # fmt: skip
    with pytest.raises(ValueError, match="holds a UNet2DModel"):
        load_autoencoder(str(tmp_path / "unet"))


def test_a_folder_without_weights_and_a_bad_name_are_told(kl):
    _, folder = kl
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ValueError, match="no weights in safetensors"):
        load_autoencoder(str(folder))
    with pytest.raises(ValueError, match="OWNER/NAME"):
        load_autoencoder("hub:nothing")


def test_latent_diffusion_trains_on_it(kl, lightning, tmp_path):
    from helpers.runs import LATENT_DIGITS, NO_IMAGES, TINY_LATENT

    _, folder = kl
    lightning(
        *["fit", "--config", LATENT_DIGITS, *TINY_LATENT, *NO_IMAGES, "--trainer.max_steps=2"],
        f"--model.init_args.vae_ckpt={folder}",
    )
    shutil.rmtree(folder)
    lightning(*["sample", "--ckpt_path", "runs/latent_digits/version_0/checkpoints/last.ckpt", "--num_samples=2"])
    assert (tmp_path / "runs/samples/grid.png").is_file()
