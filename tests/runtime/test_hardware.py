"""What is left to the hardware, that the user's word stands, and that nothing measured depends on it."""

import os
import subprocess
import sys

import pytest
import torch
from helpers.runs import FIT, LAST, read, same_training
from lightning.pytorch import Trainer

from diffusion_lit.callbacks import NonFiniteGuard
from diffusion_lit.modules import EDM
from diffusion_lit.modules.load import load_module
from diffusion_lit.runtime import hardware

CHURN = """
import ctypes, resource
from diffusion_lit.runtime.hardware import keep_freed_memory
told = keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
for _ in range(20):
    blocks = [libc.malloc(4 << 20) for _ in range(4)]
    for block in blocks:
        ctypes.memset(block, 1, 4 << 20)
    for block in blocks:
        libc.free(block)
print(told, resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def churned(**variables):
    """Whether the allocator was told to keep memory, and the page faults of taking and freeing 16 MB twenty times."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", CHURN], env=environment | variables, capture_output=True, text=True, check=True
    )
    told, faults = done.stdout.split()
    return told == "True", int(faults)


@pytest.mark.skipif(hardware.platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_freed_memory_is_kept_unless_the_user_tells_glibc_otherwise():
    kept, faults = churned()
    assert kept
    left, default = churned(MALLOC_TRIM_THRESHOLD_="131072")
    assert not left
    assert default - faults > 19 * (12 << 20) / 4096  # at least 12 of the 16 MB anew in each round but the first


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(hardware.platform, "libc_ver", lambda: ("", ""))
    assert not hardware.keep_freed_memory()


def test_bf16_is_for_processors_that_compute_in_it(monkeypatch):
    monkeypatch.setattr(hardware.platform, "system", lambda: "Linux")
    for there in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda there=there: there)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert hardware.bf16_pays("cpu") is there
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, there=there: there)
        assert hardware.bf16_pays("cuda") is there
        assert not hardware.bf16_pays("mps")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(hardware.platform, "system", lambda: "Darwin")
    assert not hardware.bf16_pays("cpu")


@pytest.mark.parametrize(
    ("quota", "given", "threads"), [("150000 100000", {}, 2), ("max 100000", {}, 4), ("100000 100000", {"x": "3"}, 4)]
)
def test_threads_keep_to_a_containers_quota(tmp_path, monkeypatch, quota, given, threads):
    before = torch.get_num_threads()
    monkeypatch.setattr(hardware, "CGROUP_QUOTA", tmp_path / "cpu.max")
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for value in given.values():
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    try:
        torch.set_num_threads(4)
        assert hardware.use_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def watched(monkeypatch):
    """The types that the network computes in, while it trains and while it is measured."""
    seen = {True: set(), False: set()}
    before = EDM.training_step, EDM.validation_step

    def watch(training, step):
        def watching(module, batch, batch_idx):
            handle = module.net.out.register_forward_hook(lambda _, __, out: seen[training].add(out.dtype))
            try:
                return step(module, batch, batch_idx)
            finally:
                handle.remove()

        return watching

    monkeypatch.setattr(EDM, "training_step", watch(True, before[0]))
    monkeypatch.setattr(EDM, "validation_step", watch(False, before[1]))
    return seen


@pytest.mark.parametrize("pays", [True, False])
def test_training_is_in_the_hardwares_precision_and_measuring_in_float32(lightning, watched, monkeypatch, capsys, pays):
    monkeypatch.setattr("diffusion_lit.commands.fit.bf16_pays", lambda device: pays)
    lightning(*FIT, "--trainer.max_steps=1")
    assert watched == {True: {torch.bfloat16 if pays else torch.float32}, False: {torch.float32}}
    precision = "bf16-mixed" if pays else "32-true"
    assert read(LAST)["diffusion_lit"]["precision"] == precision
    said = capsys.readouterr().out
    assert f"training in {precision}" in said and "fused AdamW" in said and "--trainer.precision" in said


def test_what_the_user_types_stands(lightning, watched, monkeypatch, capsys):
    monkeypatch.setattr("diffusion_lit.commands.fit.bf16_pays", lambda device: True)
    optimizer = "--model.init_args.optimizer.init_args.fused=false"
    lightning(*FIT, "--trainer.max_steps=1", "--trainer.precision=32-true", optimizer)
    assert watched[True] == {torch.float32}
    assert not read(LAST)["optimizer_states"][0]["param_groups"][0]["fused"]
    said = next(line for line in capsys.readouterr().out.splitlines() if "training in" in line)
    assert "training in 32-true;" in said and said.endswith("; AdamW.")


@pytest.mark.parametrize(
    ("precision", "machine", "typed", "layout"),
    [
        ("32-true", "x86_64", None, "NHWC"),
        ("bf16-mixed", "x86_64", None, "NCHW"),
        ("32-true", "aarch64", None, "NCHW"),
        ("32-true", "x86_64", "false", "NCHW"),
        ("bf16-mixed", "x86_64", "true", "NHWC"),
    ],
)
def test_feature_maps_lie_as_convolutions_want_them(lightning, monkeypatch, capsys, precision, machine, typed, layout):
    monkeypatch.setattr(hardware.platform, "machine", lambda: machine)
    monkeypatch.setattr("diffusion_lit.commands.fit.bf16_pays", lambda device: False)
    formats, step = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}, EDM.training_step
    seen = []

    def watching(module, batch, batch_idx):
        handle = module.net.middle[0].register_forward_hook(lambda _, __, made: seen.append(made))
        try:
            return step(module, batch, batch_idx)
        finally:
            handle.remove()

    monkeypatch.setattr(EDM, "training_step", watching)
    more = [] if typed is None else [f"--channels_last={typed}"]
    lightning(*FIT, "--trainer.max_steps=1", f"--trainer.precision={precision}", *more)
    assert seen and all(made.is_contiguous(memory_format=formats[layout]) for made in seen)
    assert ("; NHWC;" in capsys.readouterr().out) == (layout == "NHWC")
    loaded = load_module(LAST).net.middle[0].block.conv0.weight
    assert loaded.is_contiguous(memory_format=formats["NHWC" if machine == "x86_64" else "NCHW"])


@pytest.mark.medium
@pytest.mark.parametrize("layouts", [("false", "true"), ("true", "false")])
def test_a_run_goes_on_in_another_layout(lightning, layouts):
    """A fused optimizer goes through weights and moments by address: laid differently, they would be mixed up."""
    run = [*FIT, "--trainer.precision=32-true"]
    lightning(*run, "--trainer.max_steps=6", f"--channels_last={layouts[0]}", "--name=whole")
    whole = read("runs/whole/version_0/checkpoints/last.ckpt")["optimizer_states"][0]
    assert whole["param_groups"][0]["fused"]
    lightning(*run, "--trainer.max_steps=3", f"--channels_last={layouts[0]}")
    lightning(*run, "--trainer.max_steps=6", f"--channels_last={layouts[1]}", "--ckpt_path=last")
    crossed = read(LAST)["optimizer_states"][0]
    for index, state in whole["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            expected, made = state[name], crossed["state"][index][name]
            torch.testing.assert_close(made, expected, rtol=0, atol=0.01 * expected.abs().max().item())


@pytest.mark.parametrize("recorded", ["32-true", None])
def test_a_run_goes_on_in_the_precision_that_it_was_started_in(lightning, watched, monkeypatch, recorded):
    monkeypatch.setattr("diffusion_lit.commands.fit.bf16_pays", lambda device: False)
    lightning(*FIT, "--trainer.max_steps=1")
    if recorded is None:  # as before precision was recorded, when it was float32
        checkpoint = read(LAST)
        del checkpoint["diffusion_lit"]["precision"]
        torch.save(checkpoint, LAST)
    monkeypatch.setattr("diffusion_lit.commands.fit.bf16_pays", lambda device: True)
    lightning(*FIT, "--trainer.max_steps=2", "--ckpt_path=last")
    assert watched[True] == {torch.float32}


@pytest.mark.medium
def test_resuming_in_bf16_is_exact(lightning, monkeypatch):
    monkeypatch.setattr("diffusion_lit.commands.fit.bf16_pays", lambda device: True)
    lightning(*FIT, "--trainer.max_steps=4")
    whole = read(LAST)
    lightning(*FIT, "--trainer.max_steps=2", "--name=half")
    lightning(*FIT, "--trainer.max_steps=4", "--name=half", "--ckpt_path=last")
    assert same_training(whole, read("runs/half/version_0/checkpoints/last.ckpt"))


def test_gradients_are_clipped_in_the_hardwares_precision(lightning, monkeypatch):
    monkeypatch.setattr("diffusion_lit.commands.fit.bf16_pays", lambda device: True)
    lightning(*FIT, "--trainer.max_steps=1", "--trainer.gradient_clip_val=0.1")
    assert not read(LAST)["optimizer_states"][0]["param_groups"][0]["fused"]


@pytest.mark.parametrize("scaled", [("cpu",), ()], ids=["scaled", "other devices"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_bad_step_is_left_out_also_where_the_checkpoint_changed_the_optimizers_kind(fused, scaled, monkeypatch):
    monkeypatch.setattr("diffusion_lit.callbacks.guard.SCALED", scaled)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], fused=True)
    optimizer.param_groups[0]["fused"] = fused  # as load_state_dict does
    guard, trainer = NonFiniteGuard("skip"), Trainer(logger=False, barebones=True, accelerator="cpu")
    trainer.strategy._optimizers = [optimizer]
    module = torch.nn.Module()
    module.device = torch.device("cpu")
    guard.on_train_start(trainer, module)
    for gradient in (float("nan"), 1.0):
        weight.grad = torch.full((3,), gradient)
        before = weight.detach().clone()
        guard.on_before_optimizer_step(trainer, module, optimizer)
        optimizer.step()
        assert torch.equal(before, weight) is (gradient != gradient)
