"""Muon and AdamW in one optimizer: each as torch's own, convolutions and queries, keys, values as their matrices."""

import copy

import pytest
import torch
from helpers.runs import FIT, LAST, read, same_training
from torch import nn

from diffusion_lit.modules.muon import MuonAdamW, muon_groups, orthogonal
from diffusion_lit.modules.reapply import reapply
from diffusion_lit.nets import DiT, UNet

SETTING = {"lr": 0.02, "weight_decay": 0.1}
MUON = "--model.optimizer=diffusion_lit.modules.MuonAdamW"


def weights(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def train(optimizer, parameters, steps=4):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for weight in parameters:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    return [weight.detach().clone() for weight in parameters]


def test_matrices_step_as_torchs_muon_and_the_rest_as_its_adamw():
    shapes = (5, 7), (12, 4), (6, 6), (3,), (8,)
    ours = train(MuonAdamW(parameters := weights(*shapes), **SETTING, betas=(0.9, 0.98)), parameters)
    matrices = weights(*shapes)
    muon = torch.optim.Muon(matrices[:3], **SETTING, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(matrices[3:], **SETTING, betas=(0.9, 0.98))
    both = type("Both", (), {"step": lambda self: (muon.step(), adamw.step())})()
    for one, other in zip(ours, train(both, matrices), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)
    plain = train(MuonAdamW(parameters := weights((5, 7)), **SETTING, nesterov=False, momentum=0.9), parameters)
    muon = torch.optim.Muon(
        matrices := weights((5, 7)), **SETTING, nesterov=False, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    assert torch.allclose(plain[0], train(muon, matrices)[0], rtol=1e-5, atol=1e-7)


def test_a_convolution_is_a_matrix_and_queries_keys_and_values_are_three():
    whole = weights((6, 2, 3, 3))
    made = train(MuonAdamW([{"params": whole, "parts": 1}], **SETTING), whole)[0]
    flat = [nn.Parameter(weights((6, 2, 3, 3))[0].detach().flatten(1))]
    muon = torch.optim.Muon(flat, **SETTING, adjust_lr_fn="match_rms_adamw")
    assert torch.allclose(made.flatten(1), train(muon, flat)[0], rtol=1e-5, atol=1e-7)
    channels_last = [nn.Parameter(weights((6, 2, 3, 3))[0].detach().to(memory_format=torch.channels_last))]
    assert torch.allclose(train(MuonAdamW(channels_last, **SETTING), channels_last)[0], made, rtol=1e-5, atol=1e-7)

    joined, generator = weights((12, 4)), torch.Generator().manual_seed(2)
    parts = [nn.Parameter(part.detach().clone()) for part in joined[0].split(4)]
    one, other = MuonAdamW([{"params": joined, "parts": 3}], **SETTING), MuonAdamW(parts, **SETTING)
    for _ in range(3):
        joined[0].grad = torch.randn(12, 4, generator=generator)
        for part, grad in zip(parts, joined[0].grad.split(4), strict=True):
            part.grad = grad.clone()
        one.step()
        other.step()
    assert torch.allclose(joined[0], torch.cat(list(parts)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(40, 40), (16, 90), (90, 16)])
def test_a_step_is_about_orthogonal(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    made = orthogonal(matrix).float()
    kept = (left.T @ made @ right.T).diagonal()[values > values[0] / 50]
    assert kept.min() > 0.4 and kept.max() < 1.3


@pytest.mark.parametrize(
    "net", [UNet(1, 16, 10, 16, (1, 2), 1, (8,)), DiT(1, 16, 10, 4, 32, 2, 2)], ids=["unet", "dit"]
)
def test_the_muon_groups_a_network(net):
    named = {id(weight): name for name, weight in net.named_parameters()}
    groups = {group["parts"]: [named[id(weight)] for weight in group["params"]] for group in muon_groups(net)}
    assert sorted(name for names in groups.values() for name in names) == sorted(named.values())
    assert groups[3] and all(name.endswith("qkv.weight") for name in groups[3])
    for name in groups[1]:
        assert name.endswith("weight") and not name.startswith(("stem", "out", "conditioning"))
    assert {"stem.weight", "out.weight", "out.bias", "conditioning.label.weight"} <= set(groups[0])
    assert any("modulation" in name or "conv0" in name for name in groups[1])


def test_state_is_restored_and_a_changed_option_is_taken():
    parameters = weights((4, 4), (4,))
    optimizer = MuonAdamW(parameters, **SETTING)
    train(optimizer, parameters)
    state, kept = copy.deepcopy(optimizer.state_dict()), [weight.detach().clone() for weight in parameters]
    there = train(optimizer, parameters)
    again = [nn.Parameter(weight.clone()) for weight in kept]
    fresh = MuonAdamW(again, **SETTING)
    fresh.load_state_dict(state)
    assert all(torch.equal(one, other) for one, other in zip(there, train(fresh, again), strict=True))
    reapply(fresh, None, (lambda params: MuonAdamW(params, lr=0.5, weight_decay=0.1), None), {"lr": (0.02, 0.5)}, {}, 4)
    assert [group["lr"] for group in fresh.param_groups] == [0.5, 0.5]
    assert [group["parts"] for group in fresh.param_groups] == [0, 1]


@pytest.mark.medium
def test_a_run_goes_on_exactly(lightning):
    options = [MUON, "--model.optimizer.lr=0.003", "--model.init_args.net.init_args.model_channels=8"]
    lightning(*FIT, *options, "--trainer.max_steps=4", "--name=unbroken")
    whole = read("runs/unbroken/version_0/checkpoints/last.ckpt")
    groups = whole["optimizer_states"][0]["param_groups"]
    assert [group["parts"] for group in groups] == [0, 1, 3]
    lightning(*FIT, *options, "--trainer.max_steps=2")
    lightning(*FIT, *options, "--trainer.max_steps=4", "--ckpt_path=last")
    assert same_training(read(LAST), whole)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr"),
        ({"momentum": 1.0}, "momentum"),
        ({"betas": (0.9, 1.5)}, "beta2"),
        ({"ns_steps": 0}, "ns_steps"),
    ],
)
def test_what_is_out_of_range_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        MuonAdamW(weights((2, 2)), **options)


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match=r"shape \(5, 2\) is no 3 matrices"):
        MuonAdamW([{"params": weights((5, 2)), "parts": 3}])
