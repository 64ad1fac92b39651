"""bf16 and compilation: what stays in float32, and how far samples move."""

import numpy as np
import pytest
import torch
from helpers.runs import FIT, LAST, logged, read

from diffusion_lit.diffusion import (
    Denoiser,
    DenoisingLoss,
    EDMPreconditioning,
    EpsPreconditioning,
    LinearSchedule,
    Sampling,
)
from diffusion_lit.modules import EDM
from diffusion_lit.nets import UNet


class Watched(torch.nn.Module):
    """A network of one convolution that keeps the type of what it is given and gives back."""

    num_classes = 0

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Conv2d(1, 1, 3, padding=1)
        self.seen = []

    def forward(self, x, noise, label=None):
        out = self.mix(x)
        self.seen.append((x.dtype, noise.dtype, out.dtype))
        return out


@pytest.mark.parametrize("scaling", [EDMPreconditioning(), EpsPreconditioning(LinearSchedule(100))], ids=["edm", "eps"])
def test_under_autocast_only_the_network_is_in_bf16(scaling):
    denoiser = Denoiser(Watched(), scaling)
    x0, noise = torch.rand(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    sigma = torch.tensor([0.5, 20.0])
    with torch.autocast("cpu", torch.bfloat16):
        x0_hat = denoiser(x0 + sigma[:, None, None, None] * noise, sigma)
        loss = DenoisingLoss()(denoiser, x0, sigma, noise)
        samples = Sampling(num_steps=3, sigma_max=20.0).generate(denoiser, (1, 8, 8), [0, 1])
    assert denoiser.net.seen[0] == (torch.float32, torch.float32, torch.bfloat16)
    assert x0_hat.dtype == loss.dtype == samples.dtype == torch.float32
    # float32 arithmetic around the network's own output: exact to float32, far below bf16's 3 digits
    c_skip, c_out, c_in, c_noise = (c[:, None, None, None].double() for c in scaling(sigma))
    x = (x0 + sigma[:, None, None, None] * noise).double()
    with torch.autocast("cpu", torch.bfloat16):
        raw = denoiser.net((c_in * x).float(), c_noise.flatten().float())
    assert torch.allclose(x0_hat.double(), c_skip * x + c_out * raw.double(), rtol=1e-5, atol=1e-5)


def test_grids_are_float64():
    assert Sampling(num_steps=5).sigmas(EDMPreconditioning()).dtype == torch.float64


def test_samples_in_bf16_are_near_those_in_float32():
    """The tolerance is that of docs/faults.md: 0.05 on average and 0.3 at the most, of images in [-1, 1]."""
    torch.manual_seed(0)
    net = UNet(
        in_channels=1, image_size=8, model_channels=16, channel_mult=(1, 2), num_blocks=1, noise_embedding="fourier"
    )
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05) if parameter.abs().max() == 0 else None
    module = EDM(net).eval()
    exact = module.generate(range(8), sampling=Sampling(num_steps=18))
    with torch.autocast("cpu", torch.bfloat16):
        rough = module.generate(range(8), sampling=Sampling(num_steps=18))
    difference = (rough - exact).abs()
    assert 0 < difference.mean() < 0.05
    assert difference.max() < 0.3


@pytest.mark.medium
def test_training_in_bf16_keeps_weights_average_and_optimizer_in_float32(lightning):
    lightning(*FIT, "--trainer.precision=bf16-mixed")
    checkpoint = read(LAST)
    for key in ("state_dict", "current_model_state"):
        assert {value.dtype for value in checkpoint[key].values() if value.is_floating_point()} == {torch.float32}
    for state in checkpoint["optimizer_states"][0]["state"].values():
        assert {value.dtype for value in state.values()} == {torch.float32}
    losses = list(logged(LAST.parent.parent, "train/loss").values())
    assert len(losses) == 6 and all(map(torch.isfinite, map(torch.tensor, losses)))


@pytest.mark.medium
def test_compiling_leaves_the_keys_of_the_checkpoint(lightning, trained_once, monkeypatch):
    trained_once(*FIT, "--trainer.max_steps=1")
    keys = read(LAST)["state_dict"].keys()
    compiled = []
    before = torch.nn.Module.compile

    def compile_eagerly(module, *args, **options):  # the tracer alone: a compiler takes a minute
        compiled.append(module)
        return before(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    lightning(*FIT, "--trainer.max_steps=2", "--model.compile=true", "--ckpt_path=last")
    assert read(LAST)["state_dict"].keys() == keys
    assert [type(module) for module in compiled] == [UNet]
    assert "_orig_mod" not in "".join(read(LAST)["current_model_state"])


@pytest.mark.medium
def test_sampling_compiles_the_network_for_graphs_and_draws_the_same(lightning, trained_once, monkeypatch):
    trained_once(*FIT, "--trainer.max_steps=1")
    options = ["--ckpt_path", LAST, "--num_samples=2", "--num_steps=2", "--device=cpu"]
    lightning("sample", *options, "--out=plain")
    asked = []
    before = torch.nn.Module.compile

    def compile_eagerly(module, **wanted):  # the tracer alone: a compiler takes a minute
        asked.append((type(module), wanted["mode"]))
        return before(module, backend="eager", dynamic=False)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    lightning("sample", *options, "--out=compiled", "--compile")
    assert asked == [(UNet, "reduce-overhead")]
    plain, compiled = (np.load(f"{name}/samples.npz")["arr_0"].astype(int) for name in ("plain", "compiled"))
    assert abs(plain - compiled).max() <= 1


@pytest.mark.medium
def test_training_may_use_tf32_and_what_is_measured_does_not(lightning, monkeypatch):
    """The flags as a GPU would find them, at each training step, in each validation step and while images are drawn."""
    seen = {"train": set(), "val": set(), "draw": set()}

    def watch(name, where):
        before = getattr(EDM, name)

        def watched(*args, **options):
            seen[where].add((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
            return before(*args, **options)

        monkeypatch.setattr(EDM, name, watched)

    watch("training_step", "train"), watch("validation_step", "val"), watch("generate", "draw")
    lightning(*FIT, "--trainer.val_check_interval=2", "--sample_grid.every=1", "--trainer.max_steps=4")
    assert seen == {"train": {("high", True)}, "val": {("highest", False)}, "draw": {("highest", False)}}
    torch.backends.cudnn.allow_tf32 = True
    lightning("sample", "--ckpt_path", LAST, "--num_samples=1", "--num_steps=1", "--device=cpu")
    assert seen["draw"] == {("highest", False)}
    lightning(*FIT, "--trainer.max_steps=1", "--tf32.training=false", "--name=other")
    assert ("highest", False) in seen["train"]
