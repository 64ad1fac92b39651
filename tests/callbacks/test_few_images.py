"""Callbacks on sets of very few images: what can be drawn and measured is, and what cannot is told."""

from types import SimpleNamespace

import pytest
import torch
from helpers.climber import Climber
from helpers.evaluation_tools import Source
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from diffusion_lit.callbacks import FID, ImagePSNR, Interpolations, LossByNoiseLevel, ReconstructionFID
from diffusion_lit.callbacks.monitors import check_monitors
from diffusion_lit.callbacks.progress import RunSummary
from diffusion_lit.evaluation.features import Pixels


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_LIT_CACHE", str(tmp_path / "cache"))


class Halfway(torch.nn.Module):
    """Interpolates pixels, reconstructs and generates."""

    device, num_classes, trainer = torch.device("cpu"), 0, None

    def interpolate(self, first, second, shares):
        assert len(first), "a batch of no image"
        return torch.lerp(first[:, None], second[:, None], shares.view(1, -1, 1, 1, 1))

    def reconstruct(self, images):
        return images

    def generate(self, seeds, labels=None, sampling=None, callback=None):
        return torch.zeros(len(seeds), 3, 8, 8)


def trainer_of(world=1, **counts):
    """A trainer whose data has so many images in each split."""
    data = Source(labels=False)
    data.images = {split: data.images[split][:count] for split, count in counts.items()}
    data.labels = dict.fromkeys(counts)
    alone = SimpleNamespace(broadcast=lambda value: value, reduce_boolean_decision=bool)
    state = {"world_size": world, "global_rank": 0, "fast_dev_run": False, "callbacks": [], "strategy": alone}
    return SimpleNamespace(datamodule=data, **state)


@pytest.mark.parametrize(("val", "rows"), [(5, 2), (2, 1), (1, 3), (0, 3)])
def test_a_split_of_one_image_draws_between_training_images(monkeypatch, val, rows):
    drawn = []
    monkeypatch.setattr(Interpolations, "write", lambda self, trainer, tag, name, image: drawn.append(image))
    callback = Interpolations(rows=3, columns=4)
    between = Halfway()
    asked = []
    monkeypatch.setattr(
        Halfway, "interpolate", lambda self, *pair: asked.append(pair) or torch.zeros(len(pair[0]), 4, 3, 8, 8)
    )
    trainer = trainer_of(train=6, val=val)
    callback.show(trainer, between)
    (first, second, _), images = asked[0], trainer.datamodule.images["val" if val > 1 else "train"]
    assert len(first) == len(second) == rows and len(drawn) == 1
    known = [image.float() / 127.5 - 1 for image in images]
    assert all(any(torch.allclose(one, image, atol=1e-6) for image in known) for one in (*first, *second))


def test_a_set_of_one_image_has_no_interpolations(monkeypatch):
    monkeypatch.setattr(Interpolations, "write", lambda *given: pytest.fail("it drew"))
    Interpolations().show(trainer_of(train=1, val=0), Halfway())
    Interpolations().show(trainer_of(train=1, val=1), Halfway())


@pytest.mark.parametrize(("val", "floor"), [(1, True), (0, True), (30, True)])
def test_one_held_out_image_is_enough_for_a_run_with_fid(val, floor):
    callback = FID(Pixels(), num_samples=4)
    trainer = trainer_of(train=20, val=val)
    callback.on_fit_start(trainer, Halfway())
    assert callback._available and callback._reference.count == 20
    assert (callback._floor is not None) == floor
    assert callback.measure(trainer, Halfway()) > 0


@pytest.mark.parametrize(
    ("callback", "splits", "world", "words"),
    [
        (FID(Pixels(), num_samples=4), {"train": 1, "val": 9}, 1, ("fd_pixels_4", "the split train has 1 image,")),
        (ReconstructionFID(Pixels()), {"train": 9, "val": 1}, 1, ("rfd_pixels_1k", "the split val has 1 image,")),
        (ReconstructionFID(Pixels()), {"train": 1, "val": 9}, 1, ("rfd_pixels_1k", "the split train has 1 image,")),
        (ReconstructionFID(Pixels()), {"train": 9, "val": 3}, 4, ("rfd_pixels_1k", "3 images, and it takes 4")),
    ],
)
def test_what_is_too_small_for_a_distance_trains_without_it(callback, splits, world, words):
    with pytest.warns(UserWarning, match="trains without") as told:
        callback.on_fit_start(trainer_of(world, **splits), Halfway())
    assert all(word in str(told[0].message) for word in words)
    assert not callback._available


def test_a_long_name_stands_apart_from_its_figure(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("diffusion_lit.callbacks.progress.run_folder", lambda trainer: tmp_path)
    figures = {"fd_efficientnet_lite0_1k": torch.tensor(769.0)}
    trainer = SimpleNamespace(is_global_zero=True, global_step=3, callback_metrics=figures, loggers=[])
    summary = RunSummary()
    summary._started_at = 0
    summary.on_fit_end(trainer, None)
    assert "fd_efficientnet_lite0_1k: 769" in capsys.readouterr().out


@pytest.mark.parametrize("flips", [False, True])
def test_psnr_is_of_one_image_alone(flips):
    data, logged = Source(labels=False), []
    data.random_flip, image = flips, data.images["train"][0]
    data.images["train"] = image.expand(3, -1, -1, -1)
    near = (image.float() / 127.5 - 1).flip(-1)[None].expand(4, -1, -1, -1)
    module = SimpleNamespace(generate=lambda seeds: near, log=lambda name, value, **options: logged.append(value))
    trainer = SimpleNamespace(sanity_checking=False, datamodule=data)
    ImagePSNR().on_validation_epoch_end(trainer, module)
    assert (logged[0] > 60) == flips, "the mirrored image is a copy where training mirrored"
    data.images["train"] = Source(labels=False).images["train"]
    several = ImagePSNR()
    with pytest.warns(UserWarning, match="trains without psnr") as told:
        for _ in range(2):
            several.on_validation_epoch_end(trainer, module)
    assert len(logged) == len(told) == 1


@pytest.mark.parametrize(
    ("watcher", "val", "words"),
    [
        (EarlyStopping("val/loss"), 0, "EarlyStopping's monitor is 'val/loss'.* since no image is held out"),
        (ModelCheckpoint(monitor="loss_by_sigma/1"), 0, "'loss_by_sigma/1'.* since no image is held out"),
        (EarlyStopping("rfd_pixels_1k"), 1, "'rfd_pixels_1k', which this run does not log; it logs"),
        (ModelCheckpoint(monitor="rfd_pixels_1k"), 3, "'rfd_pixels_1k', which this run does not log; .* rfd_pixels_3"),
        (ModelCheckpoint(monitor="rfd_pixels_3"), 3, None),
        (ModelCheckpoint(monitor="rfd_pixels_1k"), 1, None),  # told, and keeps no best one
        (EarlyStopping("val/loss"), 1, None),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_monitor_of_what_few_images_have_not_is_refused_before_the_first_step(watcher, val, words):
    trainer, module = trainer_of(train=9, val=val), Climber()
    measuring = ReconstructionFID(Pixels())
    trainer.callbacks, trainer.num_val_batches = [measuring, LossByNoiseLevel(), watcher], [val]
    Climber.__module__, before = "lightning.climber", Climber.__module__
    try:
        check_monitors(trainer, module)  # as long as the data are not read
        measuring.on_fit_start(trainer, Halfway())
        if words is None:
            check_monitors(trainer, module, begun=True)
        else:
            with pytest.raises(ValueError, match=words):
                check_monitors(trainer, module, begun=True)
    finally:
        Climber.__module__ = before
