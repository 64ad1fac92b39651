"""EfficientNet-Lite0 from the package registry: what it sees, and what it is known by."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch.nn.functional import avg_pool2d, cosine_similarity

from diffusion_lit.evaluation.choose import make_extractor
from diffusion_lit.evaluation.classifiers import ClassifierFeatures
from diffusion_lit.evaluation.efficientnet import EfficientNetLite0, prepared
from diffusion_lit.evaluation.features import MissingWeights, Pixels
from diffusion_lit.evaluation.fidelity import Inception
from diffusion_lit.evaluation.reconstruction import perceptual_distance
from diffusion_lit.modules import EfficientNetPerceptual, efficientnet
from diffusion_lit.modules.efficientnet import stages
from diffusion_lit.modules.perceptual import EfficientNetDistance

installed = pytest.mark.skipif(not EfficientNetLite0.is_installed(), reason="needs the extra features")


def photograph(name):
    image = Image.fromarray(load_sample_image(name)).crop((107, 0, 534, 427))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


@installed
def test_features_are_those_that_its_own_classifier_reads():
    """The packaged network tells a Chinese palace from a flower by them."""
    extractor = EfficientNetLite0()
    extractor.load()
    network = extractor.network
    china, flower = photograph("china.jpg"), photograph("flower.jpg")
    features = extractor.features(torch.cat([china, flower])).features
    assert features.shape == (2, 1280) and features.min() >= 0
    logits = network._fc(features)
    assert torch.allclose(logits, network(prepared(torch.cat([china, flower]))), atol=1e-4)
    assert int(logits[0].argmax()) in (442, 663, 668, 698)  # bell cote, monastery, mosque, palace
    assert logits.argmax(1)[0] != logits.argmax(1)[1]


def test_what_the_network_sees_is_as_the_transform_says():
    """An image of 128 pixels passes as it is; a larger one as Pillow's bilinear filter shrinks it."""
    image = torch.randint(0, 256, (1, 3, 128, 128), dtype=torch.uint8)
    assert torch.allclose(prepared(image), (image.float() - 127) / 128, atol=1e-6)
    large = photograph("flower.jpg")
    small = Image.fromarray(large[0].permute(1, 2, 0).numpy()).resize((128, 128), Image.Resampling.BILINEAR)
    expected = (torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].float() - 127) / 128
    assert (prepared(large) - expected).abs().max() < 1.5 / 128  # Pillow rounds to whole levels, twice
    grey = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    assert prepared(grey).shape == (2, 3, 128, 128) and torch.equal(prepared(grey)[:, 0], prepared(grey)[:, 2])


@installed
def test_it_is_known_by_name_hash_and_transform_and_refuses_other_weights(tmp_path, monkeypatch):
    extractor = make_extractor("efficientnet_lite0", None, (3, 32, 32))
    assert extractor.metric == "fd_efficientnet_lite0"
    extractor.load()
    identity = extractor.identity()
    assert len(identity["weights_sha256"]) == 64 and "128x128" in identity["transform"]
    with pytest.raises(ValueError, match="grey or RGB"):
        extractor.features(torch.randint(0, 256, (1, 2, 32, 32), dtype=torch.uint8))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="do not fit the extractor efficientnet_lite0"):
        make_extractor("efficientnet_lite0", str(tmp_path / "other.pth"), (3, 32, 32)).load()
    torch.save({"a": object}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="only running code would make"):
        make_extractor("efficientnet_lite0", str(tmp_path / "code.pth"), (3, 32, 32)).load()
    monkeypatch.setattr(efficientnet, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match="not the file that was published"):
        EfficientNetLite0().load()


def test_auto_takes_it_where_inceptions_weights_are_not_here(monkeypatch):
    def chosen(shape, here, there, weights=None):
        monkeypatch.setattr(Inception, "is_here", staticmethod(lambda: here))
        monkeypatch.setattr(EfficientNetLite0, "is_installed", staticmethod(lambda: there))
        return type(make_extractor("auto", weights, shape))

    assert chosen((3, 32, 32), False, True) is EfficientNetLite0
    assert chosen((3, 32, 32), True, True) is Inception
    assert chosen((3, 32, 32), False, False) is Inception
    assert chosen((3, 32, 32), False, True, "weights.pth") is Inception
    assert chosen((1, 32, 32), False, True) is ClassifierFeatures
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: None)
    with pytest.raises(MissingWeights, match=r"diffusion-lit\[features\]"):
        EfficientNetLite0().load()


@installed
def test_a_perceptual_loss_looks_through_its_resolutions():
    """The deepest is what its classifier reads; the distance grows with blur, and its gradient takes the blur back."""
    torch.manual_seed(0)
    loss, images = EfficientNetPerceptual(2.0), torch.cat([photograph("china.jpg"), photograph("flower.jpg")])
    loss.load(SimpleNamespace(image_shape=(3, 128, 128)))
    network, sharp = loss.frozen.net.network, (prepared(images) * 128 + 127) / 127.5 - 1
    layers = stages(network, sharp)
    sides = [len(layer[0, 0]) for layer in layers]
    assert sides == [64, 32, 16, 8, 4]
    head = network._swish(network._bn1(network._conv_head(layers[-1])))
    torch.testing.assert_close(head, network.extract_features(prepared(images)), rtol=1e-3, atol=1e-3)
    blurred = [avg_pool2d(sharp, side, 1, side // 2) for side in (1, 3, 7)]
    near, nearer, far = (loss(image, sharp) for image in blurred)
    assert torch.equal(near, torch.zeros(2)) and bool((nearer > 0.05).all()) and bool((far > 1.2 * nearer).all())
    # by hand: squared distances of unit vectors, averaged over positions, summed over layers
    pairs = zip(stages(network, blurred[2].clamp(-1, 1)), layers, strict=True)
    torch.testing.assert_close(
        far, sum((2 - 2 * cosine_similarity(a, b)).mean((1, 2)) for a, b in pairs), rtol=1e-3, atol=1e-3
    )
    x = blurred[1].clone().requires_grad_()
    loss(x, sharp).sum().backward()
    step = 0.01 * x.grad / x.grad.abs().amax()
    assert bool((loss(x.detach() - step, sharp) < nearer).all())
    assert loss(sharp[:, :1, ::4, ::4], sharp[:, :1, ::4, ::4]).shape == (2,), "grey, of 32 pixels"
    assert not any(parameter.requires_grad for parameter in network.parameters())
    with pytest.raises(ValueError, match="EfficientNetPerceptual takes grey or RGB images, not 2 channels"):
        EfficientNetPerceptual().load(SimpleNamespace(image_shape=(2, 128, 128)))


@installed
@pytest.mark.parametrize("labels", [None, torch.zeros(4, dtype=torch.int64)], ids=["none", "one"])
def test_receipts_of_data_without_classes_measure_reconstructions_by_it(labels, monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFUSION_LIT_CACHE", str(tmp_path))
    extractor = EfficientNetLite0()
    extractor.load()
    data = SimpleNamespace(reference_labels=lambda split: labels)
    assert isinstance(perceptual_distance(data, extractor, torch.device("cpu")), EfficientNetDistance)
    assert perceptual_distance(data, Pixels(), torch.device("cpu")) is None
