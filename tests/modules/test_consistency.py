"""Consistency models as modules: defaults, the progress of training, a teacher from a file, and exact resumption."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.runs import read, same_training

from diffusion_lit.diffusion import (
    Denoiser,
    EDMPreconditioning,
    FlowPreconditioning,
    LinearSchedule,
    VPreconditioning,
)
from diffusion_lit.diffusion import X0Preconditioning as X0
from diffusion_lit.modules import Consistency, LatentConsistency
from diffusion_lit.modules.load import load_module
from diffusion_lit.modules.teacher import FrozenDenoiser
from diffusion_lit.nets import UNet

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
QUIET = [
    *["--trainer.accelerator=cpu", "--trainer.callbacks=[]", "--trainer.enable_progress_bar=false"],
    *["--model.init_args.net.init_args.model_channels=8", "--data.init_args.batch_size=128", "--sample_grid.every=0"],
    *["--trajectory.every=0", "--loss_by_noise_level.batches=1", "--trainer.limit_val_batches=1"],
]
FIT = ["fit", f"--config={CONFIGS}/consistency_digits.yaml", *QUIET, "--model.init_args.net.init_args.dropout=0.2"]
LOSS = "--model.init_args.loss=diffusion_lit.diffusion.ConsistencyLoss"
LAST = "runs/consistency_digits/version_0/checkpoints/last.ckpt"


def net(**options):
    return UNet(1, 8, 3, model_channels=16, channel_mult=(1,), num_blocks=1, **options)


@pytest.mark.parametrize(
    ("scaling", "levels"),
    [
        (EDMPreconditioning(), [80.0, 0.8]),
        (EDMPreconditioning(sigma_data=1.0), [80.0, 1.6]),
        (FlowPreconditioning(), [999.0, 0.8]),
        (VPreconditioning(LinearSchedule(100)), [LinearSchedule(100).sigma_max, 0.8]),
    ],
)
def test_it_draws_in_two_steps_from_levels_that_it_is_trained_on(scaling, levels):
    module = Consistency(net(), scaling)
    assert module.sampling.sampler == "consistency" and module.sampling.nfe == 2
    assert module.sampling.sigmas(scaling).tolist() == pytest.approx([*levels, 0.0])
    assert module.generate([0, 1], torch.tensor([0, 2])).shape == (2, 1, 8, 8)
    alone = module.generate([1], torch.tensor([2]))
    torch.testing.assert_close(alone[0], module.generate([0, 1], torch.tensor([0, 2]))[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [Consistency, lambda *args: LatentConsistency(args[0], "runs/none", *args[1:])])
def test_a_prediction_type_without_the_boundary_is_refused_with_the_reason(make):
    with pytest.raises(ValueError, match=r"X0Preconditioning has c_skip\(0\) = 0 and c_out\(0\) = 1"):
        make(net(), X0(LinearSchedule(100)))


def test_latents_have_their_own_defaults():
    module = LatentConsistency(net(), "runs/none")
    assert module.denoiser.scaling.sigma_data == 1
    assert module.sampling.grid_options == {"levels": [80.0, 1.6]}
    assert type(module.loss).__name__ == "ConsistencyLoss"


def test_the_gap_shrinks_with_the_optimizer_steps_of_the_run():
    module, seen = Consistency(net()), []
    assert module.progress == 1
    module.loss.gap = lambda t, progress: seen.append(progress) or 0.5 * t
    module._trainer = SimpleNamespace(world_size=1, global_rank=0, global_step=0, estimated_stepping_batches=40)
    module._length = 40
    x0 = torch.rand(4, 1, 8, 8)
    for step in (0, 10, 40, 50):
        module._trainer.global_step = step
        module.losses(x0, module.draw(None, x0.shape, "train", step), None)
    assert seen == [0, 0.25, 1, 1]
    module.loss(module.denoiser, x0, torch.ones(4), torch.randn(x0.shape))
    assert seen[-1] == 1, "held-out losses compare at the smallest gap"


@pytest.mark.medium
def test_it_goes_on_as_if_it_had_not_stopped(lightning):
    """With dropout, accumulated batches and a gap that shrinks by the step."""
    more = ["--trainer.accumulate_grad_batches=2", "--trainer.max_steps=8"]
    lightning(*FIT, *more, "--name=whole")
    lightning(*FIT, *more, "--checkpoint.every_n_train_steps=3", "--name=consistency_digits")
    half = Path(LAST).with_name("previous.ckpt")
    assert read(half)["global_step"] == 6
    shutil.copy(half, LAST)
    lightning(*FIT, *more, "--ckpt_path=last")
    assert same_training(read(LAST), read("runs/whole/version_0/checkpoints/last.ckpt"))


def test_a_teacher_is_asked_at_the_levels_that_it_was_trained_on():
    """A DDPM's begin at 0.01, and its student's lower ones are moved there instead of ending the run."""
    scaling, x = VPreconditioning(LinearSchedule(100)), torch.randn(3, 1, 8, 8)
    denoiser, low = Denoiser(net(), scaling), torch.tensor([1e-4, 1.0, 1e6])
    with pytest.raises(ValueError, match="outside the noise levels"):
        denoiser(x, low)
    expected = denoiser(x, torch.tensor([scaling.sigma_min, 1.0, scaling.sigma_max]))
    torch.testing.assert_close(FrozenDenoiser(denoiser)(x, low), expected)


def test_a_run_without_an_end_is_refused(lightning, capsys):
    with pytest.raises(SystemExit):
        lightning(*FIT, "--trainer.max_steps=-1", "--trainer.max_epochs=-1", "--model.init_args.lr_scheduler=null")
    said = capsys.readouterr().err
    assert "the run has no end: set trainer.max_steps" in said and "Traceback" not in said


@pytest.mark.medium
def test_a_teacher_is_read_when_training_begins_and_nowhere_else(lightning, capsys):
    edm = ["fit", f"--config={CONFIGS}/edm_digits.yaml", *QUIET, "--trainer.max_steps=2"]
    lightning(*edm, "--name=teacher")
    lightning(*edm, "--name=other", "--seed_everything=1")
    point = [LOSS, "--model.init_args.loss.init_args.point=diffusion_lit.modules.Teacher"]
    path = "--model.init_args.loss.init_args.point.init_args.ckpt_path"
    scale = f"{path.replace('ckpt_path', 'cfg_scale')}=1.5"
    lightning(*FIT, *point, f"{path}=runs/teacher", scale, "--trainer.max_steps=2")
    checkpoint = read(LAST)
    assert not any("teacher" in name for name in checkpoint["state_dict"])
    trained = {name for name in checkpoint["state_dict"] if name.startswith("denoiser")}
    assert len(trained) == len(checkpoint["state_dict"])

    def refused(*options):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            lightning(*FIT, *point, *options)
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said

    said = refused(f"{path}=runs/other", scale, "--trainer.max_steps=3", "--ckpt_path=last")
    assert "The teacher has other weights" in said
    assert "There is no teacher runs/none" in refused(f"{path}=runs/none", "--trainer.max_steps=1")
    said = refused(f"{path}=runs/teacher", "--data.init_args.use_labels=false", "--trainer.max_steps=1")
    assert "with 10 classes, and this model" in said
    said = refused(f"{path}=runs/consistency_digits", "--trainer.max_steps=1")
    assert "follows no ODE, so that it is no teacher" in said
    with pytest.warns(UserWarning, match="There is no teacher, as training begins from nothing"):
        lightning(*FIT, *point, "--name=alone", "--trainer.max_steps=2")
    lightning(*FIT, LOSS, "--name=same_draw", "--trainer.max_steps=2")
    alone, same = (read(f"runs/{name}/version_0/checkpoints/last.ckpt") for name in ("alone", "same_draw"))
    assert same_training(alone, same)

    lightning(*FIT, *point, scale, "--init_from=runs/teacher", "--trainer.max_steps=2", "--name=begun")
    begun = read("runs/begun/version_0/checkpoints/last.ckpt")
    assert begun["teacher_sha256"] == checkpoint["teacher_sha256"], "the model that training began from"
    lightning(*FIT, *point, scale, "--name=begun", "--ckpt_path=last", "--trainer.max_steps=3")
    assert read("runs/begun/version_0/checkpoints/last.ckpt")["global_step"] == 3

    shutil.rmtree("runs/teacher")
    module = load_module(LAST)
    assert module.loss.point.cfg_scale == 1.5
    assert module.generate([0], torch.tensor([3])).shape == (1, 1, 8, 8)


@pytest.mark.medium
def test_what_needs_an_ode_is_refused(lightning, capsys):
    lightning(*FIT, "--trainer.max_steps=1")
    for command in (
        ["edit", "invert", f"--ckpt_path={LAST}", "--image=test:3", "--labels=3"],
        ["edit", "deblur", f"--ckpt_path={LAST}", "--labels=3", "--noise=0.1"],
        ["evaluate", f"--ckpt_path={LAST}", "--num_samples=8", "--extractor=pixels", "--likelihood=true"],
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            lightning(*command)
        said = capsys.readouterr().err
        assert "follows no ODE" in said and "it was tuned from" in said and "Traceback" not in said
