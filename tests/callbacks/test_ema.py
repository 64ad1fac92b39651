"""The average of the weights: its arithmetic, and who sees it when."""

import pytest
import torch
from helpers.climber import Climber, fit, loader
from lightning.pytorch import Callback, Trainer

from diffusion_lit.callbacks import EMA


class Watch(Callback):
    def __init__(self):
        self.seen = {}

    def note(self, name, module):
        self.seen.setdefault(name, []).append(module.weight.item())

    def on_validation_epoch_end(self, trainer, module):
        self.note("validation_epoch_end", module)

    def on_train_epoch_end(self, trainer, module):
        self.note("train_epoch_end", module)


def expected(beta_of_images, steps, batch=4):
    average = 1.0  # Lightning starts the average from the weights after the first step
    for step in range(2, steps + 1):
        beta = beta_of_images(step * batch)
        average = beta * average + (1 - beta) * step
    return average


@pytest.mark.parametrize(
    ("ema", "beta"),
    [
        (EMA(decay=0.9), lambda images: 0.9),
        (EMA(half_life=20, ramp_up=None), lambda images: 0.5 ** (4 / 20)),
        (EMA(half_life=20, ramp_up=0.5), lambda images: 0.5 ** (4 / min(20, 0.5 * images))),
    ],
    ids=["decay", "half-life", "ramped"],
)
def test_the_average_is_the_recursion(tmp_path, ema, beta):
    module, watch = Climber(), Watch()
    trainer = fit(tmp_path, module, watch, ema)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    average = expected(beta, 10)
    assert checkpoint["state_dict"]["weight"].item() == pytest.approx(average, rel=1e-5)
    assert checkpoint["current_model_state"]["weight"].item() == 10
    assert watch.seen["validation_epoch_end"] == [
        pytest.approx(average, rel=1e-5)
    ]  # listed before the average, yet sees it
    assert watch.seen["train_epoch_end"] == [10]
    assert module.weight.item() == 10  # raw weights stay at the end


def test_accumulated_batches_count_as_one_step(tmp_path):
    module = Climber()
    trainer = fit(tmp_path, module, EMA(half_life=20, ramp_up=None), accumulate_grad_batches=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    average = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]["weight"].item()
    assert average == pytest.approx(expected(lambda images: 0.5 ** (8 / 20), 5), rel=1e-5)


def test_a_failing_validation_leaves_the_raw_weights(tmp_path):
    module = Climber(fail_in_validation=True)
    with pytest.raises(RuntimeError, match="validation failed"):
        fit(tmp_path, module, EMA(decay=0.9))
    assert module.weight.item() == 10


def test_a_resumed_run_averages_as_an_unbroken_one(tmp_path):
    whole = Climber()
    trainer = fit(tmp_path, whole, EMA(half_life=30), epochs=2)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")

    fit(tmp_path, Climber(), EMA(half_life=30)).save_checkpoint(tmp_path / "half.ckpt")
    trainer = Trainer(
        max_epochs=2,
        callbacks=[EMA(half_life=30)],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
    )
    trainer.fit(Climber(), loader(), loader(batches=1), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    trainer.save_checkpoint(tmp_path / "resumed.ckpt")
    whole_state, resumed_state = (
        torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("whole", "resumed")
    )
    assert whole_state["state_dict"]["weight"] == resumed_state["state_dict"]["weight"]
    assert whole_state["current_model_state"]["weight"] == resumed_state["current_model_state"]["weight"] == 20


@pytest.mark.parametrize(
    ("options", "message"), [({"decay": 1.0}, "decay is 1.0"), ({"half_life": 0}, "half_life is 0")]
)
def test_averages_that_never_move_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EMA(**options)
