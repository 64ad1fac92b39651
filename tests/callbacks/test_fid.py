"""The FID callback: what it logs, from which weights, when, and that it leaves nothing behind."""

import pytest
import torch
from helpers.evaluation_tools import Source
from helpers.tiny_net import TinyNet
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch.utils.data import DataLoader

from diffusion_lit.callbacks import EMA, FID
from diffusion_lit.diffusion import Sampling
from diffusion_lit.diffusion.images import to_uint8
from diffusion_lit.evaluation.features import MissingWeights, Pixels
from diffusion_lit.evaluation.generation import class_frequencies, draw_labels
from diffusion_lit.evaluation.metrics import Statistics, frechet_distance
from diffusion_lit.modules import EDM


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_LIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


class Data(LightningDataModule, Source):
    """The source of the other tests with loaders: 60 images in batches of 20."""

    def __init__(self):
        LightningDataModule.__init__(self)
        Source.__init__(self)
        self.class_names = ["dark", "bright"]

    def loader(self, split):
        items = [
            {"image": image.float() / 127.5 - 1, "label": label}
            for image, label in zip(self.images[split], self.labels[split], strict=True)
        ]
        return DataLoader(items, batch_size=20)

    def train_dataloader(self):
        return self.loader("train")

    def val_dataloader(self):
        return self.loader("val")


def module():
    net = TinyNet(3, 2)
    net.in_channels, net.image_size = 3, 8
    return EDM(
        net,
        sampling=Sampling(num_steps=2),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.2),
    )


def trainer(*callbacks, **options):
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, **options}
    return Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def by_hand(model, data, count=20):
    """The figure by a few lines that share nothing with the callback but the extractor and the arithmetic."""
    labels = draw_labels(range(count), class_frequencies(data, 2))
    with torch.no_grad():
        samples = to_uint8(model.generate(list(range(count)), labels))
    made, real = (Pixels().features(images).features for images in (samples, data.images["train"]))
    return frechet_distance(Statistics.of(made), Statistics.of(real))


def test_it_logs_the_distance_of_samples_from_the_average_and_its_floor():
    data, model, average = Data(), module(), EMA(decay=0.5)
    run = trainer(average, FID(Pixels(), num_samples=20, batch_size=7), max_epochs=2)
    run.fit(model, datamodule=data)
    found = run.callback_metrics["fd_pixels_20"]
    raw = by_hand(model, data)
    model.load_state_dict({name: value.clone() for name, value in average._average_model.module.state_dict().items()})
    assert float(found) == pytest.approx(by_hand(model, data), rel=1e-4)
    assert float(found) != pytest.approx(raw, rel=1e-3)
    floor = run.callback_metrics["fd_pixels_20_floor"]
    assert 0 < floor < found


def test_training_goes_on_as_without_it():
    ends = []
    for callbacks in ([EMA()], [EMA(), FID(Pixels(), num_samples=8)]):
        model = module()
        trainer(*callbacks, max_epochs=2).fit(model, datamodule=Data())
        ends.append(model.state_dict())
        assert model.training
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


class Broken(Pixels, Callback):
    """Fails at the samples, once the reference is done and validation has begun."""

    begun = False

    def on_validation_start(self, trainer, pl_module):
        self.begun = True

    def features(self, images):
        if self.begun:
            raise RuntimeError("the extractor broke")
        return super().features(images)


def test_an_exception_leaves_raw_weights_and_the_mode_of_training():
    model, average = module(), EMA(decay=0.9)
    broken = Broken()
    run = trainer(average, broken, FID(broken, num_samples=8, batch_size=7))
    with pytest.raises(RuntimeError, match="the extractor broke"):
        run.fit(model, datamodule=Data())
    alone = module()
    trainer(EMA(decay=0.9)).fit(alone, datamodule=Data())
    for name, value in alone.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert not average._swapped
    assert all(part.training == model.denoiser.training for part in model.denoiser.modules())


def test_an_average_that_is_not_in_place_is_refused():
    run = trainer(EMAWeightAveraging(decay=0.5), FID(Pixels(), num_samples=8))
    with pytest.raises(ValueError, match="use diffusion_lit.callbacks.EMA"):
        run.fit(module(), datamodule=Data())


def test_the_best_checkpoint_is_kept_by_it(tmp_path):
    best = ModelCheckpoint(dirpath=tmp_path / "best", monitor="fd_pixels_8", filename="best")
    run = trainer(EMA(), FID(Pixels(), num_samples=8), best, max_epochs=3, enable_checkpointing=True)
    run.fit(module(), datamodule=Data())
    assert (tmp_path / "best/best.ckpt").exists()
    assert best.best_model_score > 0


def measured(callback):
    """Counts the measurements of a callback."""
    calls = []
    original = callback._generated
    callback._generated = lambda *args: calls.append(1) or original(*args)
    return calls


def test_it_measures_every_n_epochs_first_and_last_and_keeps_the_metric_between(tmp_path):
    callback = FID(Pixels(), num_samples=8, every_n_epochs=3)
    calls = measured(callback)
    best = ModelCheckpoint(dirpath=tmp_path, monitor="fd_pixels_8", save_top_k=1)
    run = trainer(callback, best, max_epochs=6, enable_checkpointing=True)
    run.fit(module(), datamodule=Data())
    assert len(calls) == 3  # epochs 0, 3 and 5
    assert "fd_pixels_8" in run.callback_metrics


def test_when_it_was_measured_survives_a_restart():
    callback = FID(Pixels(), num_samples=8, every_n_epochs=3)
    callback.load_state_dict({"measured_epoch": 4})
    assert callback.state_dict() == {"measured_epoch": 4}


class Absent(Pixels):
    """An extractor without weights."""

    name = "inception"

    def load(self, data=None):
        raise MissingWeights("The weights are not here; put them there.")


def test_without_weights_it_says_once_that_it_trains_without(tmp_path, recwarn):
    best = ModelCheckpoint(dirpath=tmp_path / "best", monitor="fid_inception_5k")
    run = trainer(FID(Absent(), num_samples=5000), best, max_epochs=2, enable_checkpointing=True)
    run.fit(module(), datamodule=Data())
    said = [str(one.message) for one in recwarn if "trains without" in str(one.message)]
    assert len(said) == 1
    assert "fid_inception_5k and keeps no best checkpoint by it: The weights are not here; put them there." in said[0]
    assert run.state.finished
    assert "fid_inception_5k" not in run.callback_metrics


def test_strict_stops_without_weights():
    with pytest.raises(ValueError, match=r"strict is set: The weights are not here"):
        trainer(FID(Absent(), strict=True)).fit(module(), datamodule=Data())


def test_a_rank_draws_its_share_and_all_get_the_same_figure(tmp_path):
    figures = {}
    for devices in (1, 2):
        options = {"devices": devices, "strategy": "ddp_fork" if devices > 1 else "auto"}
        run = trainer(FID(Pixels(), num_samples=9, batch_size=2), **options)
        run.validate(module(), datamodule=Data(), verbose=False)
        figures[devices] = float(run.callback_metrics["fd_pixels_9"])
    assert figures[2] == pytest.approx(figures[1], rel=1e-5)


def test_a_rank_draws_a_part_of_the_samples_each_of_its_own_class(monkeypatch):
    class Rank:
        world_size, global_rank = 3, 1
        datamodule = Data()

    class Model:
        device, num_classes, seen, trainer = torch.device("cpu"), 2, [], Rank()

        def generate(self, seeds, labels):
            self.seen += list(zip(seeds, labels.tolist(), strict=True))
            return torch.zeros(len(seeds), 3, 8, 8)

    others = lambda whole: torch.stack([whole - 1, whole, whole + 1])  # noqa: E731
    monkeypatch.setattr("diffusion_lit.runtime.ranks.gather", others)
    model = Model()
    made = FID(Pixels(), num_samples=10, batch_size=3, seed=100)._generated(model.trainer, model)
    assert [seed for seed, _ in model.seen] == [104, 105, 106, 107]
    labels = draw_labels(range(100, 110), class_frequencies(Rank.datamodule, 2))
    assert [label for _, label in model.seen] == labels[4:8].tolist()
    assert made.shape == (10, 192)
    grey = Pixels().features(to_uint8(torch.zeros(1, 3, 8, 8))).features[0, 0]
    assert (made[:, 0] - torch.tensor([-1] * 4 + [0] * 4 + [1] * 2) - grey).abs().max() < 1e-6


def test_numbers_that_cannot_be_measured_are_refused():
    for options in ({"num_samples": 1}, {"batch_size": 0}, {"every_n_epochs": 0}):
        with pytest.raises(ValueError, match="num_samples is 1|batch_size is 0|every_n_epochs is 0"):
            FID(Pixels(), **options)
    assert FID(Pixels(), num_samples=50_000).tag == "fd_pixels_50k"
