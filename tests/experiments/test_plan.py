"""Plans: what is counted and measured, and what is assumed and says so."""

import pytest
from helpers.runs import DIGITS

from diffusion_lit.callbacks.cost import network_cost
from diffusion_lit.nets import UNet
from experiments.benchmarks.plan import plan

TINY = ["--model.init_args.net.init_args.model_channels=16", "--trainer.max_steps=1000", "--trainer.accelerator=cpu"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_hours_follow_from_operations_and_assumptions(capsys):
    measured, assumed = plan(
        [str(DIGITS)], gpus=4, gpu=["A100"], share=0.5, scaling=0.8, steps=1, batch=4, options=TINY, accelerator="cpu"
    )
    net = UNet(
        in_channels=1, image_size=8, num_classes=10, model_channels=16, channel_mult=(1, 2), num_blocks=1,
        attention_resolutions=(4,), noise_embedding="fourier",
    )  # fmt: skip
    assert assumed.rate == pytest.approx(4 * 0.8 * 0.5 * 312e12 / network_cost(net, (1, 8, 8)).training, rel=0.05)
    assert measured.basis.startswith("measured now") and assumed.basis.startswith("assumed: 50%")
    said = capsys.readouterr().out
    assert "64 thousand images" in said  # 1000 steps of 64
    assert "4 x A100" in said and measured.hardware in said


def test_what_cannot_be_planned_is_told():
    with pytest.raises(ValueError, match="no GPU 'abacus'"):
        plan([str(DIGITS)], gpu=["abacus"])
    with pytest.raises(ValueError, match="share is 2"):
        plan([str(DIGITS)], share=2)
    with pytest.raises(ValueError, match="trains a VAE"):
        plan([str(DIGITS.parent / "vae_digits.yaml")], steps=0, options=["--trainer.accelerator=cpu"])
