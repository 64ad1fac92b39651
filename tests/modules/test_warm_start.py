"""Weights of another run in a new module: what fits, what does not, and which weights they are."""

from pathlib import Path

import pytest
import torch
from torch import nn

from diffusion_lit.modules import DDPM, EDM, VAE, ColdDiffusion
from diffusion_lit.modules.warm_start import Source, sentence, start_from
from diffusion_lit.nets import Autoencoder, DiT, UNet
from diffusion_lit.storage.snapshots import Snapshots

SHAPE = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attention_resolutions": [-1], "image_size": 8}


def unet(seed, **changes):
    torch.manual_seed(seed)
    net = UNet(**{"in_channels": 1, "num_classes": 10, **SHAPE, **changes})
    for parameter in net.parameters():  # some are drawn as zeros
        parameter.data.add_(torch.randn_like(parameter))
    return net


def source(module, names=(), **record):
    state = {name: value.clone() for name, value in module.state_dict().items()}
    return Source(Path("other.ckpt"), "0" * 64, state, "average (EMA)", list(names), record)


def digits(*without):
    return [str(digit) for digit in range(10) if digit not in without]


def changed(module, before):
    """The tensors that are not as they were."""
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def test_another_class_of_module_with_the_same_network_takes_it_whole():
    one, other = DDPM(unet(0)), EDM(unet(1))
    start = start_from(other, source(one, digits()), digits())
    mine = other.denoiser.state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in one.denoiser.state_dict().items())
    assert not start.new and not start.rows and not start.left and start.values[0] == start.values[1]
    assert [line.split() for line in start.lines()[1:-1]] == [
        ["denoiser", *f"taken, {len(start.taken)} layers".split()]
    ]


def test_rows_of_classes_go_by_their_names():
    one, other = EDM(unet(0, num_classes=9)), EDM(unet(1))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    names = digits(3)[::-1]
    start = start_from(other, source(one, names), digits())
    there, here = (module.net.conditioning.label.weight for module in (one, other))
    for row, name in enumerate(names):
        assert torch.equal(here[int(name)], there[row])
    assert torch.equal(here[10], there[9])
    assert list(start.rows) == ["denoiser.net.conditioning.label"] and not start.new
    (line,) = (line for line in start.lines() if "conditioning.label" in line)
    assert "9 of 10" in line and line.endswith("3 is new")
    assert changed(other, before) == before.keys()  # and the rest was taken


def test_a_new_class_starts_apart_from_all_that_the_source_knows():
    """As it was drawn would be near another class: under the same seed that class of the source began there."""
    one = EDM(unet(0, num_classes=9))
    starts = []
    for seed in (0, 1):
        other = EDM(unet(seed))
        start_from(other, source(one, digits(3)), digits())
        starts.append(other.net.conditioning.label.weight[3].detach())
    there = one.net.conditioning.label.weight.detach()
    assert torch.equal(*starts)
    apart = torch.cdist(there, there)[~torch.eye(len(there), dtype=torch.bool)]
    assert torch.cdist(starts[0][None], there).min() > 0.5 * apart.min()


def test_other_channels_keep_the_rest_and_tell_what_is_new():
    one, other = EDM(unet(0, num_classes=0)), EDM(unet(1, in_channels=3))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    start = start_from(other, source(one), digits())
    new = {name for name in before if name not in changed(other, before)}
    assert {name.rpartition(".")[0] for name in new} == start.new.keys()
    assert start.new["denoiser.net.conditioning.label"] == "new: not there"
    stem = next(name for name, value in other.state_dict().items() if value.ndim == 4 and value.shape[1] == 3)
    assert stem in new and "8 x 3 x 3 x 3 here, 8 x 1 x 3 x 3 there" in start.new[stem.rpartition(".")[0]]
    assert len(start.new) == 3 and start.values[0] == sum(before[name].numel() for name in before.keys() - new)
    assert all(any(layer in line for line in start.lines()) for layer in start.new)
    assert start.left == []
    assert start_from(EDM(unet(1, num_classes=0)), source(EDM(unet(0)), digits())).left == [
        "denoiser.net.conditioning.label"
    ]


def test_statistics_of_the_data_begin_anew():
    """Cold diffusion takes its images' mean and components from the training data."""
    one, other = ColdDiffusion(unet(0, num_classes=0)), ColdDiffusion(unet(1, num_classes=0))
    one.mean.fill_(0.5)
    start_from(other, source(one))
    assert torch.equal(one.net.stem.weight, other.net.stem.weight) and not other.mean.any()


@pytest.mark.parametrize("kind", ["another network", "an autoencoder", "nothing"])
def test_nothing_that_fits_is_refused_and_changes_nothing(kind):
    module = EDM(unet(0))
    other = {
        "another network": lambda: EDM(DiT(1, 8, 10, patch_size=2, hidden_channels=48, depth=1, num_heads=2)),
        "an autoencoder": lambda: VAE(Autoencoder(1, image_size=8, model_channels=8, channel_mult=[1, 2])),
        "nothing": nn.Module,
    }[kind]()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"other\.ckpt fits this run's EDM.*--init_from"):
        start_from(module, source(other))
    assert not changed(module, before)


def test_weights_that_are_not_finite_are_refused_and_change_nothing():
    one, module = EDM(unet(0)), EDM(unet(1))
    one.net.conditioning.hidden.weight.data[0, 0] = torch.nan
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"other\.ckpt are not finite in denoiser\.net\.conditioning\.hidden"):
        start_from(module, source(one))
    assert not changed(module, before)


@pytest.mark.parametrize(
    "value",
    [torch.zeros(4).to_sparse(), torch.zeros(4, dtype=torch.complex64), torch.zeros(4, dtype=torch.int64)],
    ids=["sparse", "complex", "integers"],
)
def test_tensors_of_a_file_that_are_no_weights_do_not_fit(value):
    module = nn.Sequential(nn.LayerNorm(4), nn.Linear(2, 2))
    state = {"0.weight": value, "0.bias": torch.ones(4), "1.weight": torch.ones(2, 2), "1.bias": torch.ones(2)}
    start = start_from(module, Source(Path("a.ckpt"), "0" * 64, state, "raw", [], {}))
    assert start.taken == ["1"] and list(start.new) == ["0"]


def save(path, **content):
    torch.save({"state_dict": {"a": torch.zeros(1)}, **content}, path)


def test_the_average_by_default_the_raw_weights_when_asked_and_a_snapshot(tmp_path):
    save(tmp_path / "a.ckpt", current_model_state={"a": torch.ones(1)}, global_step=7)
    average, raw = Source.read(tmp_path / "a.ckpt"), Source.read(tmp_path / "a.ckpt", "raw")
    assert (average.state["a"], raw.state["a"]) == (0, 1)
    assert (average.weights, raw.weights) == ("average (EMA)", "raw")
    assert average.record == {"step": 7}
    Snapshots.write(tmp_path, 5, 0.1, {"a": torch.full((1,), 2.0)}, ["zero", "one"])
    path = tmp_path / "step_0000005_sigma_0.1.safetensors"
    snapshot = Source.read(path)
    assert snapshot.state["a"] == 2 and snapshot.class_names == ["zero", "one"]
    with pytest.raises(ValueError, match="no raw weights"):
        Source.read(path, "raw")
    path.write_bytes(path.read_bytes()[:-1])
    for broken in (path, tmp_path / "none.safetensors", tmp_path / "none.ckpt"):
        with pytest.raises(ValueError, match=broken.name):
            Source.read(broken)
    with pytest.raises(ValueError, match="'ema'"):
        Source.read(tmp_path / "a.ckpt", "ema")
    save(tmp_path / "a.ckpt", state_dict={"a": 1})
    with pytest.raises(ValueError, match=r"a\.ckpt is no sound checkpoint.*'a'"):
        Source.read(tmp_path / "a.ckpt")


def test_a_start_in_words():
    record = {
        **{"file": "a.ckpt", "sha256": "0123456789abcdef", "weights": "raw", "step": 1200, "module": "x.y.EDM"},
        **{"values": [3, 4], "layers": {"taken": ["a"], "rows": {}, "new": {"b": "new"}, "left": []}},
    }
    assert sentence(record) == (
        "Started from a.ckpt (EDM, step 1,200, raw, 0123456789ab), 75.0% of the weights, in 1 of 2 layers"
    )
