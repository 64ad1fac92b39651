"""The classifier: shapes, keyed training, and its checkpoint as an extractor."""

from pathlib import Path

import pytest
import torch
import yaml
from helpers.project_files import write_idx

from diffusion_lit.evaluation.classifiers import ClassifierFeatures
from diffusion_lit.modules import Classifier
from diffusion_lit.modules.data_classifier import classifier_from_checkpoint
from diffusion_lit.nets import ConvClassifier

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("size", [4, 8, 28, 32, 64])
def test_images_of_any_size_give_features_and_logits(size):
    network = ConvClassifier(2, size, 5, width=4, blocks=2, feature_dim=6).eval()
    x = torch.randn(3, 2, size, size)
    features = network.features(x)
    assert features.shape == (3, 6)
    assert network(x).shape == (3, 5)
    torch.testing.assert_close(network.logits(features), network(x))
    assert ConvClassifier(**network.config).state_dict().keys() == network.state_dict().keys()


def test_what_no_classifier_can_be_is_refused():
    with pytest.raises(ValueError, match="num_classes is 0"):
        ConvClassifier(1, 8, 0)
    with pytest.raises(ValueError, match="image_size is 2"):
        ConvClassifier(1, 2, 10)
    with pytest.raises(ValueError, match="shift is -1"):
        Classifier(ConvClassifier(1, 8, 2), shift=-1)
    with pytest.raises(ValueError, match="label_smoothing is 1"):
        Classifier(ConvClassifier(1, 8, 2), label_smoothing=1)
    with pytest.raises(ValueError, match="needs labels"):
        Classifier(ConvClassifier(1, 8, 2)).training_step({"image": torch.zeros(2, 1, 8, 8)}, 0)


def test_images_are_shifted_by_whole_pixels_by_key_alone():
    module = Classifier(ConvClassifier(1, 8, 2), shift=2)
    images = torch.arange(64.0).reshape(1, 1, 8, 8).repeat(50, 1, 1, 1)
    moved = module._shifted(images, 0)
    assert torch.equal(module._shifted(images, 0), moved)
    assert not torch.equal(module._shifted(images, 1), moved)
    padded = torch.nn.functional.pad(images[0, 0], (2, 2, 2, 2), value=-1.0)
    windows = {tuple(padded[y : y + 8, x : x + 8].flatten().tolist()) for y in range(5) for x in range(5)}
    found = {tuple(image.flatten().tolist()) for image in moved}
    assert found <= windows
    assert len(found) > 10
    assert torch.equal(Classifier(ConvClassifier(1, 8, 2))._shifted(images, 0), images)


def test_ranks_shift_their_rows_of_the_global_batch():
    images = torch.arange(64.0).reshape(1, 1, 8, 8).repeat(12, 1, 1, 1)
    whole = Classifier(ConvClassifier(1, 8, 2), shift=2)._shifted(images, 3)

    class Rank(Classifier):
        ranks = (3, 1)

    assert torch.equal(Rank(ConvClassifier(1, 8, 2), shift=2)._shifted(images[:4], 3), whole[1::3])


def data_options(name, folder):
    if name == "CIFAR10":
        from helpers.data_fixtures import write_cifar10

        write_cifar10(folder, per_batch=10)
        return [f"--data.init_args.root={folder}", "--data.init_args.val_size=8"]
    return [f"--data.init_args.root={write_idx(folder)}", "--data.init_args.val_size=40"]


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("classifier_*.yaml")), ids=lambda path: path.stem)
def test_every_classifier_config_trains_to_an_extractor(config, lightning, tmp_path, monkeypatch):
    data = yaml.safe_load(config.read_text())["data"]["class_path"].rsplit(".", 1)[1]
    lightning(
        *["fit", "--config", config, "--trainer.max_epochs=-1", "--trainer.max_steps=12", "--trainer.accelerator=cpu"],
        *["--model.init_args.net.init_args.width=8", "--model.init_args.net.init_args.blocks=1"],
        *["--data.init_args.batch_size=20", "--trainer.val_check_interval=12"],
        *["--model.init_args.lr_scheduler.init_args.warmup_steps=1", "--model.init_args.optimizer.init_args.lr=0.01"],
        *["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"],
        *data_options(data, tmp_path / "images"),
    )
    path = tmp_path / f"runs/{config.stem}/version_0/checkpoints/last.ckpt"
    network = classifier_from_checkpoint(path)
    content = torch.load(path, weights_only=True)
    for name, value in network.state_dict().items():
        assert torch.equal(value, content["state_dict"][f"net.{name}"])
        assert torch.equal(value, content["current_model_state"][f"net.{name}"])  # no average beside batch norm

    extractor = ClassifierFeatures(str(path))
    extractor.load()
    shape = (3, 32, 32) if data == "CIFAR10" else (1, 32, 32)
    made = extractor.features(torch.randint(0, 256, (5, *shape), dtype=torch.uint8))
    assert made.features.shape == (5, network.feature_dim)
    assert made.logits.shape == (5, 10)


@pytest.mark.medium
def test_it_learns_images_whose_brightness_tells_their_class(lightning, tmp_path, capsys):
    folder = write_idx(tmp_path / "images", train=600, classes=3)
    lightning(
        *["fit", "--config", CONFIGS / "classifier_mnist.yaml", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"],
        *[f"--data.init_args.root={folder}", "--data.init_args.val_size=60", "--data.init_args.batch_size=20"],
        *["--trainer.val_check_interval=20", "--model.init_args.lr_scheduler.init_args.warmup_steps=5"],
        *["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"],
        *["--model.init_args.net.init_args.width=8", "--trainer.log_every_n_steps=1"],
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "runs/classifier_mnist/version_0"))
    events.Reload()
    assert events.Scalars("val/accuracy")[-1].value > 0.95
    assert len(events.Scalars("train/accuracy")) > 10


def test_other_checkpoints_are_no_classifiers(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="is not a checkpoint of a Classifier"):
        classifier_from_checkpoint(tmp_path / "other.ckpt")
