"""Latent diffusion: what it stands on is frozen, bound to it and standardised; the cache changes the time alone."""

import shutil
import time

import numpy as np
import pytest
import torch
import yaml
from helpers.runs import CONFIGS, LATENT_DIGITS, NO_IMAGES, TINY_LATENT, TINY_VAE, VAE_DIGITS, stopped
from lightning.pytorch import Trainer

import datamodules
from diffusion_lit.diffusion.generate import Sampling
from diffusion_lit.modules import LatentDiffusion
from diffusion_lit.modules.autoencoders import load_autoencoder
from diffusion_lit.modules.latent_scale import encode_all, scale_of
from diffusion_lit.modules.latent_space import LatentSpace
from diffusion_lit.modules.load import load_module
from diffusion_lit.nets import Autoencoder, UNet
from diffusion_lit.report.images import StepRecorder


def make_images(count, channels=1, size=8, seed=0):
    return torch.randint(0, 256, (count, channels, size, size), generator=torch.Generator().manual_seed(seed)).byte()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which both stages were trained for two steps, and a second VAE."""
    from diffusion_lit.commands.main import main

    folder = tmp_path_factory.mktemp("latent")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        quiet = [*NO_IMAGES, "--trainer.callbacks=[]", "--trainer.max_steps=2"]
        main(["fit", "--config", str(VAE_DIGITS), *TINY_VAE, *quiet])
        main(["fit", "--config", str(VAE_DIGITS), *TINY_VAE, *quiet, "--name=other", "--seed_everything=1"])
        main(["fit", "--config", str(LATENT_DIGITS), *TINY_LATENT, "--trainer.max_steps=2"])
    return folder


@pytest.fixture
def here(trained, lightning, tmp_path):
    """A copy of that folder, which is the current one."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def checkpoint(here):
    return here / "runs/latent_digits/version_0/checkpoints/last.ckpt"


def fitted(folder, steps=2, flips=False, loops=None, **options):
    """A tiny model after a few steps, its losses, and how often images were encoded while it trained."""
    losses, calls = [], []

    class Recorded(LatentDiffusion):
        def training_step(self, batch, batch_idx):
            encode = self.space.net.encode
            self.space.net.encode = lambda x: (calls.append(len(x)), encode(x))[1]
            loss = super().training_step(batch, batch_idx)
            self.space.net.encode = encode
            losses.append(float(loss.detach()))
            return loss

    torch.manual_seed(0)
    net = UNet(4, 4, 10, 16, (1,), 1, (), noise_embedding="fourier")
    module = Recorded(net, str(folder / "runs/vae_digits"), cache_dir=str(folder / "cache"), **options)
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=1, num_sanity_val_steps=0, **(loops or {}),
    )  # fmt: skip
    trainer.fit(module, datamodule=datamodules.Digits(64, random_flip=flips))
    return module, losses, calls


def test_latents_are_standardised_over_the_whole_training_set(here):
    module, _, _ = fitted(here)
    data = datamodules.Digits(64)
    images = data.reference_images("train").float() / 127.5 - 1
    posterior = module.space.encode(images)
    u = module.space.standardise(posterior.sample(torch.randn(posterior.mean.shape)))
    assert bool((u.mean(dim=(0, 2, 3)).abs() < 0.02).all())
    assert bool(((u.std(dim=(0, 2, 3)) - 1).abs() < 0.02).all())
    raw = posterior.sample(torch.randn(posterior.mean.shape)).std(dim=(0, 2, 3))
    assert bool(((raw - 1).abs() > 0.02).any())  # so that there was something to do


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_finds_the_same_scale(world):
    torch.manual_seed(0)
    space = LatentSpace(Autoencoder(1, 8, 2, 8, (1, 2)), (1, 8, 8))
    images, cpu = make_images(600), torch.device("cpu")
    alone = encode_all(space, images, True, cpu)
    shared = sum(encode_all(space, images, True, cpu, (world, rank)) for rank in range(world))
    assert torch.equal(alone, shared)
    mean, std = scale_of(alone, 1200, 16)
    x = images.float() / 127.5 - 1
    posterior = space.encode(torch.cat([x, x.flip(-1)]))
    torch.testing.assert_close(mean.float(), posterior.mean.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    variance = posterior.mean.var(dim=(0, 2, 3)) + posterior.std.square().mean(dim=(0, 2, 3))
    torch.testing.assert_close(std.float(), variance.sqrt(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("flips", [False, True])
def test_the_cache_changes_no_loss_and_spares_the_encoder(here, flips):
    _, cached, calls = fitted(here, 3, flips)
    _, encoded, all_calls = fitted(here, 3, flips, cache_latents=False)
    assert calls == []
    assert all_calls == [64, 64, 64]
    assert cached == pytest.approx(encoded, rel=1e-4)
    if flips:
        _, straight, _ = fitted(here, 3, False)
        assert cached != pytest.approx(straight, rel=1e-4)


def test_a_cache_is_found_again_and_belongs_to_its_autoencoder_and_data(here, monkeypatch):
    fitted(here)
    assert len(list((here / "cache").glob("*/moments.f32"))) == 2  # train and val
    monkeypatch.setattr(LatentSpace, "encode", lambda *_: pytest.fail("encoded again"))
    fitted(here)
    monkeypatch.undo()
    fitted(here, flips=True)
    assert len(list((here / "cache").glob("*/moments.f32"))) == 3
    shutil.rmtree(here / "runs/vae_digits")
    shutil.copytree(here / "runs/other", here / "runs/vae_digits")
    fitted(here)
    assert len(list((here / "cache").glob("*/moments.f32"))) == 5


def test_a_damaged_cache_is_told_and_made_anew(here):
    _, losses, _ = fitted(here)
    for name, place in (("moments.f32", 5000), ("moments.f32", -1), ("index.json", 700)):
        for path in (here / "cache").glob(f"*/{name}"):
            content = bytearray(path.read_bytes())
            content[place if place < len(content) else 7] ^= 4  # one bit
            path.write_bytes(content)
        with pytest.warns(UserWarning, match="are damaged; they are encoded anew"):
            assert fitted(here)[1] == losses
    for path in (here / "cache").glob("*/moments.f32"):
        path.write_bytes(path.read_bytes()[:100])
    assert fitted(here)[1] == losses
    assert [path for path in (here / "cache").iterdir() if path.name.startswith(".")] == []


def test_where_no_lock_is_honoured_the_cache_of_another_host_stays(here, monkeypatch):
    """Another host encodes the same images, is half through with one split and finishes the other meanwhile."""
    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    _, losses, _ = fitted(here)
    (here / "cache").rename(here / "done")
    (here / "cache").mkdir()
    names = [path.name for path in (here / "done").iterdir() if path.is_dir()]
    half = here / "cache" / f".{names[0]}.0123abcd.1.89abcdef"
    half.mkdir()
    (half / "moments.f32").write_bytes(b"half")
    encode = LatentSpace.encode

    def while_the_other_finishes(self, images):
        for name in names:
            if (here / "done" / name).exists():
                (here / "done" / name).rename(here / "cache" / name)
        return encode(self, images)

    monkeypatch.setattr(LatentSpace, "encode", while_the_other_finishes)
    assert fitted(here)[1] == losses
    assert (half / "moments.f32").read_bytes() == b"half"
    assert sorted(path.name for path in (here / "cache").iterdir() if path.is_dir()) == sorted([half.name, *names])


def test_the_autoencoder_is_out_of_sight_and_frozen(here):
    module, _, _ = fitted(here)
    parameters = set(map(id, module.parameters()))
    assert not parameters & set(map(id, module.space.net.parameters()))
    assert all(name.startswith("denoiser.") for name in module.state_dict())
    module.train()
    assert not module.space.net.training
    assert not any(parameter.requires_grad for parameter in module.space.net.parameters())
    before = load_autoencoder(str(here / "runs/vae_digits")).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in module.space.net.state_dict().items())


def test_it_computes_in_its_own_precision(here):
    seen = []
    module, _, _ = fitted(here, 1, loops={"precision": "bf16-mixed"}, cache_latents=False)
    module.space.net.encoder[1].register_forward_hook(lambda layer, args, made: seen.append(made.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        module.space.encode(torch.zeros(1, 1, 8, 8))
    half = LatentSpace(load_autoencoder(str(here / "runs/vae_digits")), (1, 8, 8), "bfloat16")
    half.net.encoder[1].register_forward_hook(lambda layer, args, made: seen.append(made.dtype))
    posterior = half.encode(torch.zeros(1, 1, 8, 8))
    assert seen == [torch.float32, torch.bfloat16]
    assert posterior.mean.dtype == torch.float32
    assert half.sha256 != module.space.sha256


def test_one_file_is_enough_to_sample(here, checkpoint, lightning):
    (here / "alone.ckpt").write_bytes(checkpoint.read_bytes())
    shutil.rmtree(here / "runs")
    shutil.rmtree(here / "latents")
    lightning(
        *["sample", "--ckpt_path", "alone.ckpt", "--num_samples=12", "--labels=all", "--num_steps=2", "--out=o"],
        *["--batch_size=5", "--trajectory"],
    )
    arrays = np.load(here / "o/samples.npz")
    assert arrays["arr_0"].shape == (12, 8, 8, 1)
    module = load_module("alone.ckpt")
    made = module.generate([3, 4], torch.tensor([1, 2]), module.sampling.replace(num_steps=2))
    same = module.generate([4], torch.tensor([2]), module.sampling.replace(num_steps=2))
    torch.testing.assert_close(made[1:], same, rtol=1e-3, atol=1e-4)


def test_the_network_takes_its_shape_from_the_latents(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    net = content["hyper_parameters"]["net"]["init_args"]
    assert (net["in_channels"], net["image_size"], net["num_classes"]) == (4, 4, 10)
    assert content["latent_space"]["image_shape"] == [1, 8, 8]
    assert not any(name.startswith(("_space", "space")) for name in content["state_dict"])


def test_trajectories_are_decoded(checkpoint):
    module, seen = load_module(checkpoint), []

    def callback(step, x, x0_hat, sigma):
        seen.append((x, x0_hat, sigma))

    made = module.generate([0, 1], torch.tensor([3, 4]), module.sampling.replace(num_steps=3), callback)
    assert all(x.shape == x0_hat.shape == (2, 1, 8, 8) for x, x0_hat, _ in seen)
    torch.testing.assert_close(seen[-1][1], made, rtol=1e-4, atol=1e-4)  # the last prediction is the sample


def test_the_rows_that_a_recorder_keeps_are_decoded(checkpoint):
    module = load_module(checkpoint)
    sampling, whole = module.sampling.replace(num_steps=2), StepRecorder(4)
    module.generate(range(4), torch.arange(4), sampling, whole)
    for keep, rows in ((2, [0, 1]), ([3, 1], [3, 1])):
        some = StepRecorder(keep)
        module.generate(range(4), torch.arange(4), sampling, some)
        for full, part in zip([*whole.x, *whole.x0_hat], [*some.x, *some.x0_hat], strict=True):
            assert torch.allclose(part, full[rows], atol=1e-4)


def test_latents_go_there_and_back(checkpoint):
    module = load_module(checkpoint)
    images = make_images(3).float() / 127.5 - 1
    torch.testing.assert_close(module.decode(module.encode(images)), module.reconstruct(images))
    known = torch.ones(1, 1, 8, 8)
    known[..., 0, 3] = 0
    shrunk = module.shrink_mask(known)
    assert shrunk.shape == (1, 1, 4, 4)
    assert (shrunk == 0).nonzero().tolist() == [[0, 0, 0, 1]]


@pytest.mark.medium
def test_a_run_that_was_cut_ends_in_the_same_weights(here, lightning):
    run = ["fit", "--config", LATENT_DIGITS, *TINY_LATENT, *NO_IMAGES, "--trainer.val_check_interval=2"]
    steady = ["--model.init_args.lr_scheduler=null"]
    lightning(*run, *steady, "--name=cut", "--trainer.max_steps=2")
    lightning(*run, *steady, "--name=cut", "--trainer.max_steps=4", "--ckpt_path=last")
    lightning(*run, *steady, "--name=unbroken", "--trainer.max_steps=4")
    cut, unbroken = (
        torch.load(here / f"runs/{name}/version_0/checkpoints/last.ckpt", weights_only=True)
        for name in ("cut", "unbroken")
    )
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, unbroken[key][name]) for name, value in cut[key].items())


def test_a_swapped_autoencoder_is_refused_by_name(here, checkpoint, lightning, capsys):
    run = ["fit", "--config", LATENT_DIGITS, *TINY_LATENT, "--trainer.max_steps=3", "--ckpt_path=last"]
    said = stopped(capsys, lightning, *run, "--model.init_args.vae_ckpt=runs/other")
    assert "runs/other" in said
    assert torch.load(checkpoint, weights_only=True)["latent_space"]["sha256"][:12] in said


def test_weights_that_are_not_those_of_the_hash_are_refused(checkpoint):
    state = torch.load(checkpoint, weights_only=True)["latent_space"]
    next(iter(state["state_dict"].values())).add_(1)
    with pytest.raises(ValueError, match="damaged"):
        LatentSpace.from_state(state)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("runs/nowhere", "There is no autoencoder runs/nowhere"),
        ("truncated.ckpt", "damaged, truncated"),
        ("runs/latent_digits/version_0/checkpoints/last.ckpt", "checkpoint of LatentDiffusion, not of a VAE"),
        ("runs/empty", "runs/empty is a folder and none of"),
    ],
)
def test_what_is_no_autoencoder_is_told_in_a_sentence(here, lightning, capsys, source, message):
    (here / "runs/empty").mkdir()
    vae = here / "runs/vae_digits/version_0/checkpoints/last.ckpt"
    (here / "truncated.ckpt").write_bytes(vae.read_bytes()[:5000])
    run = ["fit", "--config", LATENT_DIGITS, *TINY_LATENT, "--trainer.max_steps=1"]
    said = stopped(capsys, lightning, *run, f"--model.init_args.vae_ckpt={source}")
    assert message in said
    assert said.strip().splitlines()[-1].startswith("diffusion-lit: ")


def test_an_autoencoder_of_other_images_is_refused():
    with pytest.raises(ValueError, match="made for images of 3 channels and 16 pixels"):
        LatentSpace(Autoencoder(3, 16, 4, 8), (1, 8, 8))
    with pytest.raises(ValueError, match="vae_precision is 'half'"):
        LatentSpace(Autoencoder(1, 8, 4, 8), (1, 8, 8), "half")


def test_clipping_is_for_pixels(here, checkpoint):
    module = load_module(checkpoint)
    with pytest.raises(ValueError, match="clip_x0 is 'static'"):
        module.generate([0], None, Sampling(clip_x0="static"))


def test_a_dead_channel_cannot_be_standardised():
    space = LatentSpace(Autoencoder(1, 8, 2, 8), (1, 8, 8))
    with pytest.raises(ValueError, match="Channel 1"):
        space.set_scale(torch.zeros(2), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="before training"):
        space.standardise(torch.zeros(1, 2, 4, 4))


def test_a_latent_step_costs_a_third_of_a_pixel_step_at_most():
    """The same network on CIFAR-10-sized images and on their latents, by the processor time of training steps."""

    def seconds(channels, size):
        net = UNet(channels, size, 10, 32, (1, 2), 1, noise_embedding="fourier")
        x, noise = torch.randn(8, channels, size, size), torch.randn(8)
        net(x, noise).square().mean().backward()
        begin = time.process_time()
        for _ in range(2):
            net(x, noise).square().mean().backward()
        return time.process_time() - begin

    assert seconds(3, 32) > 3 * seconds(4, 8)


PAIRS = sorted(path.stem.removeprefix("vae_") for path in CONFIGS.glob("vae_*.yaml"))


@pytest.mark.medium
@pytest.mark.parametrize("name", [name for name in PAIRS if name != "digits" and "landscapes" not in name])
def test_every_config_runs(name, lightning, tmp_path):
    """Those of landscapes, which take large images, are in tests/commands/test_landscapes.py."""
    from helpers.configs_tools import DATA

    vae, latent = CONFIGS / f"vae_{name}.yaml", CONFIGS / f"latent_{name}.yaml"
    data = DATA[yaml.safe_load(vae.read_text())["data"]["class_path"].rsplit(".", 1)[1]](tmp_path / "images")
    tiny = ["--data.init_args.batch_size=4", "--trainer.callbacks=[]", *data]
    lightning("fit", "--config", vae, *TINY_VAE, *tiny, *NO_IMAGES, "--trainer.max_steps=1")
    if latent.exists():
        lightning("fit", "--config", latent, *TINY_LATENT, *tiny, "--trainer.fast_dev_run=1")


@pytest.mark.slow
def test_two_ranks_train_as_one(here, lightning):
    run = ["fit", "--config", LATENT_DIGITS, *TINY_LATENT, *NO_IMAGES, "--trainer.max_steps=3"]
    lightning(*run, "--name=one", "--model.init_args.cache_dir=one")
    lightning(
        *run, "--name=two", "--model.init_args.cache_dir=two", "--trainer.devices=2", "--trainer.strategy=ddp_fork"
    )
    one, two = (
        torch.load(here / f"runs/{name}/version_0/checkpoints/last.ckpt", weights_only=True) for name in ("one", "two")
    )
    assert torch.equal(one["latent_space"]["mean"], two["latent_space"]["mean"])
    assert torch.equal(one["latent_space"]["std"], two["latent_space"]["std"])
    for name, value in one["current_model_state"].items():
        torch.testing.assert_close(value, two["current_model_state"][name], rtol=1e-3, atol=1e-5)


def test_on_a_full_disk_latents_stay_in_memory_and_train_the_same(here, monkeypatch):
    module, losses, calls = fitted(here, flips=True)
    shutil.rmtree(here / "cache")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.warns(UserWarning, match=r"cannot be kept in .*are free.*keeps them in memory"):
        again, same, none = fitted(here, flips=True)
    assert same == losses and calls == none == []
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in module.state_dict().items())
    assert [path for path in (here / "cache").iterdir() if path.is_dir()] == []
    monkeypatch.setattr("diffusion_lit.modules.latent_cache.fits_in_memory", lambda size: False)
    with pytest.raises(OSError, match=r"cannot be kept in .*set cache_dir"):
        fitted(here, flips=True)


@pytest.mark.medium
def test_a_consistency_model_of_latents_starts_from_a_latent_model_and_draws_by_its_own_settings(
    here, lightning, capsys
):
    config = yaml.safe_load(LATENT_DIGITS.read_text())
    config["model"]["class_path"] = "diffusion_lit.modules.LatentConsistency"
    config["model"]["init_args"]["sampling"] = {"sampler": "consistency", "grid_options": {"levels": [80, 1.6]}}
    (here / "consistency.yaml").write_text(yaml.safe_dump(config))
    lightning(
        *["fit", f"--config={here}/consistency.yaml", *TINY_LATENT, "--trainer.max_steps=2"],
        "--init_from=runs/latent_digits",
    )
    module = load_module(here / "runs/consistency/version_0/checkpoints/last.ckpt")
    assert module.sampling.sampler == "consistency" and module.sampling.nfe == 2
    assert module.generate([0, 1], torch.tensor([0, 2])).shape == (2, 1, 8, 8)
    before = load_module(here / "runs/latent_digits/version_0/checkpoints/last.ckpt")
    assert module.space.sha256 == before.space.sha256
    first, now = (next(iter(one.net.parameters())) for one in (before, module))
    assert 0 < float((first - now).detach().abs().max()) < 0.02, "from its weights, and two steps on"

    lightning(
        "fit", f"--config={VAE_DIGITS}", *TINY_VAE, "--trainer.max_steps=1", "--name=other", "--seed_everything=3"
    )
    begin = ["fit", f"--config={here}/consistency.yaml", *TINY_LATENT, "--trainer.max_steps=1", "--name=again"]
    begin += ["--init_from=runs/latent_digits", "--model.init_args.vae_ckpt=runs/other"]
    with pytest.warns(UserWarning, match="denoised latents of another encoder than vae_ckpt runs/other"):
        lightning(*begin)
    point = "--model.init_args.loss.init_args.point=diffusion_lit.modules.Teacher"
    with pytest.raises(SystemExit):
        lightning(*begin, "--model.init_args.loss=diffusion_lit.diffusion.ConsistencyLoss", point)
    assert "denoises latents of the encoder with the hash" in capsys.readouterr().err
