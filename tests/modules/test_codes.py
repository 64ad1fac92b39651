"""A VAE of codes by the command: its figures, exact resuming, two ranks, and latent diffusion on its codes."""

import math

import numpy as np
import pytest
import torch
from helpers.runs import LATENT_DIGITS, NO_IMAGES, TINY_LATENT, TINY_VAE, VAE_DIGITS, logged, read, same_training

from diffusion_lit.modules.load import load_module

RUN = ["fit", "--config", str(VAE_DIGITS), *TINY_VAE, *NO_IMAGES, "--trainer.callbacks=[]"]
RUN += ["--model.init_args.lr_scheduler=null", "--trainer.log_every_n_steps=1", "--ema.ramp_up=null"]
CODES = {
    "FSQ": "{class_path: diffusion_lit.nets.FSQ, init_args: {levels: [5, 4, 3, 3]}}",
    "VQ": "{class_path: diffusion_lit.nets.VQ, init_args: {codes: 24}}",
}


def last(name):
    return read(f"runs/{name}/version_0/checkpoints/last.ckpt")


@pytest.mark.medium
@pytest.mark.parametrize("kind", CODES)
def test_codes_keep_the_promises_of_a_run_and_carry_latent_diffusion(lightning, tmp_path, kind):
    run = [*RUN, f"--model.init_args.net.init_args.bottleneck={CODES[kind]}", "--trainer.accumulate_grad_batches=2"]
    lightning(*run, "--trainer.max_steps=4")
    lightning(*run, "--trainer.max_steps=2", "--name=cut")
    lightning(*run, "--trainer.max_steps=4", "--name=cut", "--ckpt_path=last")
    assert same_training(last("cut"), last("vae_digits"))
    count = {"FSQ": 180, "VQ": 24}[kind]
    folder = tmp_path / "runs/vae_digits/version_0"
    (perplexity,) = logged(folder, "val/code_perplexity").values()
    assert 1 <= perplexity <= count
    (nats,) = logged(folder, "val/kl").values()
    assert nats == pytest.approx(16 * math.log(count), rel=1e-4)  # a 4x4 latent
    lightning("fit", "--config", LATENT_DIGITS, *TINY_LATENT, *NO_IMAGES, "--trainer.max_steps=2")
    checkpoint = "runs/latent_digits/version_0/checkpoints/last.ckpt"
    lightning("sample", "--ckpt_path", checkpoint, "--num_samples=3", "--out=o")
    assert np.load("o/samples.npz")["arr_0"].shape == (3, 8, 8, 1)
    module = load_module(checkpoint)
    x = torch.randn(2, *module.x_shape, generator=torch.Generator().manual_seed(0))
    net, space = module.space.net, module.space
    nearest = space.standardise(net.bottleneck.nearest(x * space.std.float() + space.mean.float()))
    assert not torch.allclose(x, nearest)
    torch.testing.assert_close(module.decode(x), module.decode(nearest), rtol=1e-4, atol=1e-5)


@pytest.mark.medium
def test_two_ranks_train_a_codebook_as_one(lightning, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork must not inherit a pool
    run = [*RUN, f"--model.init_args.net.init_args.bottleneck={CODES['VQ']}", "--trainer.max_steps=3"]
    run += ["--trainer.precision=32-true"]
    try:
        lightning(*run, "--name=one")
        lightning(*run, "--name=two", "--trainer.devices=2", "--trainer.strategy=ddp_fork")
    finally:
        torch.set_num_threads(threads)
    one, two = last("one")["state_dict"], last("two")["state_dict"]
    assert "net.bottleneck.codebook" in one
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=2e-3), name
