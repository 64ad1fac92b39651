"""The LightningModules: draws keyed by step and independent of ranks, and the schedule of the learning rate."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffusion_lit.diffusion import Constant, CosineSchedule, DenoisingLoss, LinearSchedule, UnitWeight
from diffusion_lit.modules import DDPM, EDM, WarmupStableDecay
from diffusion_lit.nets import UNet
from diffusion_lit.storage.checkpoints import read_training_state

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def net(**options):
    return UNet(
        in_channels=1, image_size=8, num_classes=3, model_channels=16, channel_mult=(1,), num_blocks=1, **options
    )


def as_rank(module, rank, world):
    module._trainer = SimpleNamespace(world_size=world, global_rank=rank)
    return module


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_take_their_rows_of_the_draws_of_the_global_batch(world):
    whole_label = torch.arange(8) % 3
    alone = EDM(net(), label_dropout=0.5)
    whole = alone.draw(whole_label, torch.Size((8, 1, 8, 8)), "train", 0, 1, 2)
    assert (whole.label == 3).any() and (whole.label == whole_label).any()
    for rank in range(world):
        module = as_rank(EDM(net(), label_dropout=0.5), rank, world)
        rows = slice(rank, None, world)
        draws = module.draw(whole_label[rows], torch.Size((8 // world, 1, 8, 8)), "train", 0, 1, 2)
        for mine, all_of_them in zip(draws[:3], whole[:3], strict=True):
            assert torch.equal(mine, all_of_them[rows])


def test_draws_change_with_every_part_of_the_key_and_do_not_move_the_global_generator():
    module = EDM(net())
    state = torch.get_rng_state()
    seen = [
        module.draw(None, torch.Size((4, 1, 8, 8)), "train", *key).noise
        for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    assert torch.equal(torch.get_rng_state(), state)
    for index, noise in enumerate(seen):
        assert not any(torch.equal(noise, other) for other in seen[index + 1 :])


@pytest.mark.parametrize("dropout", [0.0, 0.1, 1.0])
def test_labels_are_dropped_to_the_null_class_at_the_given_rate(dropout):
    label = torch.zeros(20_000, dtype=torch.int64)
    draws = EDM(net(), label_dropout=dropout).draw(label, torch.Size((20_000, 1, 1, 1)), "train", 0)
    dropped = (draws.label == 3).float().mean().item()
    assert dropped == pytest.approx(dropout, abs=0.01)
    assert set(draws.label.tolist()) <= {0, 3}


def test_what_a_module_is_made_of_reaches_its_loss():
    module = EDM(net(), noise_levels=Constant(2.0), loss=DenoisingLoss(UnitWeight()))
    x0 = torch.rand(5, 1, 8, 8) * 2 - 1
    draws = module.draw(None, x0.shape, "train", 0)
    assert torch.equal(draws.sigma, torch.full((5,), 2.0))
    # the output convolution starts at zero, so D = c_skip x with c_skip = 0.25 / (4 + 0.25)
    x0_hat = (x0 + 2 * draws.noise) * 0.25 / 4.25
    expected = (x0_hat - x0).square().mean((1, 2, 3))
    assert torch.allclose(module.loss(module.denoiser, x0, draws.sigma, draws.noise), expected, rtol=1e-5)


def test_ddpm_trains_on_the_steps_of_its_schedule_and_predicts_what_it_is_told():
    schedule = CosineSchedule(50)
    module = DDPM(net(), schedule, prediction="v")
    sigma = module.draw(None, torch.Size((400, 1, 1, 1)), "train", 0).sigma
    distance = (sigma.double().log()[:, None] - schedule.sigmas.log()[None]).abs().min(dim=1).values
    assert distance.max() < 1e-5
    c_skip = module.denoiser.scaling(torch.tensor(1.0))[0]
    assert c_skip.item() == pytest.approx(0.5)  # v: 1 / (1 + sigma^2)
    assert module.sampling.num_steps == 50
    with pytest.raises(ValueError, match="no prediction 'noise' here; choose one of eps, x0, v"):
        DDPM(net(), prediction="noise")


def test_noise_levels_beyond_the_schedule_are_moved_to_its_edge():
    module = DDPM(net(), LinearSchedule(100), noise_levels=Constant(1e6))
    sigma = module.draw(None, torch.Size((3, 1, 8, 8)), "train", 0).sigma
    assert sigma.max().item() == pytest.approx(module.denoiser.scaling.sigma_max, rel=1e-6)
    module.loss(module.denoiser, torch.zeros(3, 1, 8, 8), sigma, torch.zeros(3, 1, 8, 8))


def test_augmentation_reaches_the_loss_with_its_labels_and_is_keyed():
    from diffusion_lit.nets.augment import Augment, augment_images

    module = EDM(net(augment_dim=9), augment=Augment(probability=1.0))
    labels = module.draw_augment(6, "train", 0, 0, 0)
    assert torch.equal(labels, module.draw_augment(6, "train", 0, 0, 0))
    assert not torch.equal(labels, module.draw_augment(6, "train", 0, 0, 1))
    halves = [as_rank(EDM(net(augment_dim=9), augment=Augment(1.0)), rank, 2) for rank in (0, 1)]
    assert all(torch.equal(half.draw_augment(3, "train", 0, 0, 0), labels[r::2]) for r, half in enumerate(halves))

    seen = {}
    module.loss.forward = lambda denoiser, x0, sigma, noise, label, augment: (
        seen.update(x0=x0, augment=augment) or sigma
    )
    module.log = lambda *args, **options: None
    image = torch.rand(6, 1, 8, 8) * 2 - 1
    module.training_step({"image": image}, 0)
    assert torch.equal(seen["augment"], labels)
    assert torch.equal(seen["x0"], augment_images(image, labels))
    assert not torch.allclose(seen["x0"], image)
    with pytest.raises(ValueError, match="augment_dim 0, but augmentation tells it labels"):
        EDM(net(), augment=Augment())


def test_generating_leaves_the_module_in_the_mode_that_it_was_in():
    module = EDM(net(dropout=0.5)).train()
    first = module.generate([0, 1], torch.tensor([0, 1]), module.sampling.replace(num_steps=2))
    assert module.training
    assert torch.equal(first, module.generate([0, 1], torch.tensor([0, 1]), module.sampling.replace(num_steps=2)))
    assert not first.requires_grad


def rates(steps, **options):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    schedule = WarmupStableDecay(optimizer, **options)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_the_learning_rate_rises_stays_and_falls():
    seen = rates(10, warmup_steps=4, decay_fraction=0.5, total_steps=10)
    assert seen == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 1.6, 1.2, 0.8, 0.4])
    assert rates(3) == [2.0, 2.0, 2.0]
    with pytest.raises(ValueError, match="decay_fraction is 1.5"):
        rates(1, decay_fraction=1.5)


def test_a_label_dropout_that_is_no_probability_is_refused():
    with pytest.raises(ValueError, match="label_dropout is 1.5"):
        EDM(net(), label_dropout=1.5)


def test_a_plateau_is_looked_for_after_each_validation_and_when_a_run_goes_on(lightning):
    plateau = {"factor": 0.5, "patience": 0, "threshold": 1.0, "monitor": "val/loss"}  # no loss is low enough
    scheduler = {"class_path": "lightning.pytorch.cli.ReduceLROnPlateau", "init_args": plateau}
    command = [
        *["fit", "--config", CONFIGS / "edm_digits.yaml", "--trainer.callbacks=[]", "--trainer.accelerator=cpu"],
        *["--trainer.val_check_interval=3", "--trainer.limit_val_batches=1", "--sample_grid.every=0"],
        *[
            "--trajectory.every=0",
            "--loss_by_noise_level.batches=0",
            "--model.init_args.net.init_args.model_channels=8",
        ],
        *["--model.init_args.net.init_args.model_channels=8", "--data.init_args.batch_size=8"],
        "--trainer.enable_progress_bar=false",
        *["--model.init_args.optimizer.init_args.lr=1.0", f"--model.init_args.lr_scheduler={json.dumps(scheduler)}"],
    ]
    lightning(*command, "--trainer.max_steps=6")
    lightning(*command, "--trainer.max_steps=9", "--ckpt_path=last")
    state = read_training_state("runs/edm_digits/version_0/checkpoints/last.ckpt")
    assert [group["lr"] for group in state["optimizer_states"][0]["param_groups"]] == [0.125]  # halved three times
