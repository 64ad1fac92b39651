"""Extractors: what they refuse, whose weights they read and how, and that an image's features are its own."""

import pickle
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
import torch
from helpers.evaluation_tools import Source, Tiny, make_images, tiny_weights
from safetensors.torch import save_file
from torch import nn

from diffusion_lit.evaluation import fidelity
from diffusion_lit.evaluation.choose import make_extractor
from diffusion_lit.evaluation.classifiers import ClassifierFeatures
from diffusion_lit.evaluation.features import MissingWeights, Pixels, full_precision
from diffusion_lit.evaluation.fidelity import CLIP, VGG, DINOv2, Inception
from diffusion_lit.modules import weights
from diffusion_lit.modules.data_classifier import IMAGES_SEEN, classifier_of
from diffusion_lit.storage.hashing import weights_hash


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_LIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no internet in this test")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture
def tiny(tmp_path):
    extractor = Tiny(str(tiny_weights(tmp_path / "tiny.pth")))
    extractor.load()
    return extractor


def test_features_do_not_depend_on_the_batch(tiny):
    images, _ = make_images(30)
    whole = tiny.extract(images, 30)
    assert whole.features.dtype == torch.float32
    assert whole.features.shape == (30, 12)
    assert whole.logits.shape == (30, 7)
    for batch_size in (1, 7, 64):
        torch.testing.assert_close(tiny.extract(images, batch_size).features, whole.features, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tiny.extract(images.numpy(), 9).features, whole.features, rtol=1e-5, atol=1e-6)


def test_an_extractor_in_training_mode_is_refused(tiny):
    images, _ = make_images(8)
    tiny.network.norm.train()
    with pytest.raises(ValueError, match="training mode"):
        tiny.features(images)
    tiny.network.eval()
    tiny.features(images)


def test_images_in_another_range_or_type_are_refused(tiny):
    images, _ = make_images(8)
    with pytest.raises(ValueError, match=r"float32.*uint8"):
        tiny.features(images.float() / 255)
    with pytest.raises(ValueError, match="0 and 1 only"):
        tiny.features((images > 100).byte())
    with pytest.raises(ValueError, match="shape"):
        tiny.features(images[0])
    with pytest.raises(ValueError, match="no images"):
        tiny.extract(images[:0])


def test_a_resize_with_antialiasing_gives_other_features(tiny):
    images, _ = make_images(8, (3, 32, 32))
    small = nn.functional.interpolate(images.float(), size=(13, 13), mode="bilinear", antialias=True).byte()
    assert not torch.allclose(tiny.features(images).features, tiny.features(small).features, rtol=1e-2)
    assert "no antialiasing" in tiny.identity()["transform"]


def test_grey_images_go_in_as_three_equal_channels(tiny):
    grey, _ = make_images(5, (1, 8, 8))
    torch.testing.assert_close(tiny.features(grey).features, tiny.features(grey.repeat(1, 3, 1, 1)).features)
    with pytest.raises(ValueError, match="4 channels"):
        tiny.features(make_images(5, (4, 8, 8))[0])


def test_full_precision_is_switched_on_and_back(monkeypatch):
    torch.set_float32_matmul_precision("high")
    with full_precision(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")
    with torch.autocast("cpu", dtype=torch.bfloat16), full_precision():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32


def test_identity_tells_weights_apart(tmp_path, tiny):
    state = torch.load(tmp_path / "tiny.pth", weights_only=True)
    assert tiny.identity()["weights_sha256"] == weights_hash(tiny.network.state_dict())
    state["head.bias"][0] += 1e-6
    save_file(state, tmp_path / "other.safetensors")
    other = Tiny(str(tmp_path / "other.safetensors"))
    other.load()
    assert other.identity() != tiny.identity()
    assert (tiny.metric, Inception().metric, Pixels().metric) == ("fd_tiny", "fid_inception", "fd_pixels")


class Harm:
    """Runs code when unpickled freely."""

    def __reduce__(self):
        return (open, ("harm-was-done", "w"))


def test_weights_that_would_run_code_never_reach_the_library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"conv.weight": Harm()}, tmp_path / "evil.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Harm()))
    for name in ("evil.pth", "raw.pth"):
        with pytest.raises(ValueError, match=r"was not read as weights"):
            Tiny(name).load()
    assert not (tmp_path / "harm-was-done").exists()
    with pytest.raises(ValueError, match="more than names and tensors"):
        torch.save({"a": 1}, tmp_path / "odd.pth")
        Tiny("odd.pth").load()
    with pytest.raises(ValueError, match="do not fit"):
        torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
        Tiny("other.pth").load()


def test_the_library_gets_a_clean_copy_and_not_the_users_file(tmp_path, monkeypatch):
    path = tiny_weights(tmp_path / "tiny.pth")
    read = []
    original = torch.load

    def watched(file, *args, weights_only=None, **kwargs):
        read.append((str(getattr(file, "name", file)), weights_only))
        return original(file, *args, weights_only=weights_only, **kwargs)

    monkeypatch.setattr(torch, "load", watched)
    Tiny(str(path)).load()
    assert (str(path), True) in read
    assert (str(path), False) not in read


@pytest.mark.parametrize("extractor", [Inception, VGG, CLIP, DINOv2])
def test_missing_weights_offline_are_told_with_the_remedy(extractor, offline):
    with pytest.raises(
        MissingWeights, match=r"could not be downloaded.*internet, download https?://.*--extractor_weights"
    ):
        extractor().load()
    with pytest.raises(MissingWeights, match="no file nowhere.pth"):
        extractor(feature_extractor_weights_path="nowhere.pth").load()


def test_a_download_is_kept_and_a_wrong_one_refused(tmp_path, monkeypatch):
    content = b"weights"

    class Answer:
        def __init__(self):
            self.headers, self.parts = {"Content-Length": len(content)}, [content, b""]

        def read(self, size):
            return self.parts.pop(0)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            return None

    calls = []
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: calls.append(url) or Answer())
    digest = "9f77c2a3"  # of b"weights"
    import hashlib

    digest = hashlib.sha256(content).hexdigest()[:8]
    for _ in range(2):
        path = weights.fetch("https://example.org/w.pth", "w.pth", digest, "a network", "--weights")
    assert path.read_bytes() == content
    assert len(calls) == 1
    with pytest.raises(ValueError, match="hash differs"):
        weights.fetch("https://example.org/w.pth", "w.pth", "00000000", "a network", "--weights")


def test_clip_is_built_from_plain_weights(tmp_path):
    from torch_fidelity.feature_extractor_clip import CLIPVisual

    torch.manual_seed(0)
    state = CLIPVisual(16, 16, 1, 64, 8).state_dict()
    state["text_projection"] = torch.zeros(4, 16)
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "clip.safetensors")
    extractor = CLIP("vit-b-32", str(tmp_path / "clip.safetensors"))
    extractor.load()
    made = extractor.features(make_images(3)[0])
    assert made.features.shape == (3, 16)
    assert made.features.std() > 0
    assert extractor.metric == "fd_clip_vit_b_32"
    with pytest.raises(ValueError, match="no extractor 'clip-huge'"):
        CLIP("huge")


def test_dinov2_takes_its_code_from_the_hub_and_its_weights_apart(tmp_path, monkeypatch):
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            assert x.shape[-2:] == (224, 224)
            return x.mean((2, 3)) * self.scale

    asked = {}
    monkeypatch.setattr(torch.hub, "load", lambda repo, name, **options: asked.update(options, name=name) or Mean())
    torch.save({"scale": torch.tensor([1.0, 2.0, 3.0])}, tmp_path / "dino.pth")
    extractor = DINOv2("vit-s-14", str(tmp_path / "dino.pth"))
    extractor.load()
    assert asked == {"pretrained": False, "trust_repo": True, "name": "dinov2_vits14"}
    assert extractor.network.model.scale.tolist() == [1, 2, 3]
    assert extractor.features(make_images(2)[0]).features.shape == (2, 3)


def test_names_of_the_command_line():
    assert isinstance(make_extractor("auto", None, (1, 28, 28)), ClassifierFeatures)
    assert make_extractor("clip-vit-l-14", None, (3, 8, 8)).name == "clip_vit_l_14"
    assert make_extractor("dinov2", None, (3, 8, 8)).name == "dinov2_vit_l_14"
    assert isinstance(make_extractor("vgg16", None, (3, 8, 8)), VGG)
    for name in ("resnet", "inception-v4"):
        with pytest.raises(ValueError, match="no extractor"):
            make_extractor(name, None, (3, 8, 8))
    with pytest.raises(ValueError, match="no weights"):
        make_extractor("pixels", "file", (3, 8, 8))


def test_the_classifier_of_the_data_is_trained_once_and_the_same_each_time(monkeypatch, tmp_path):
    source = Source(train=200, test=60)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = classifier_of(source)
    assert torch.equal(torch.random.get_rng_state(), before)
    images, labels = source.reference_images("test"), source.reference_labels("test")
    extractor = ClassifierFeatures()
    extractor.load(source)
    made = extractor.features(images)
    assert (made.logits.argmax(1) == labels).float().mean() > 0.95
    assert made.features.shape == (60, 64)
    assert made.features.std(0).min() > 0

    assert len(list((tmp_path / "cache/classifiers").iterdir())) == 1
    monkeypatch.setattr("diffusion_lit.modules.data_classifier.train_classifier", None)  # the cache must serve
    assert weights_hash(classifier_of(source).state_dict()) == weights_hash(first.state_dict())
    monkeypatch.undo()
    monkeypatch.setenv("DIFFUSION_LIT_CACHE", "/proc/nowhere")  # cannot be written: trained again, to the same weights
    assert weights_hash(classifier_of(source).state_dict()) == weights_hash(first.state_dict())
    assert IMAGES_SEEN == 50_000


def test_other_data_get_another_classifier():
    first, second = Source(train=40), Source(train=44)
    assert weights_hash(classifier_of(first).state_dict()) != weights_hash(classifier_of(second).state_dict())


def test_a_classifier_needs_labels_and_its_own_shape():
    with pytest.raises(MissingWeights, match="no labels"):
        ClassifierFeatures().load(Source(labels=False))
    with pytest.raises(MissingWeights, match="no classifier nowhere.ckpt"):
        ClassifierFeatures("nowhere.ckpt").load()
    extractor = ClassifierFeatures()
    extractor.load(Source(train=20))
    with pytest.raises(ValueError, match=r"trained on images of shape \(3, 8, 8\)"):
        extractor.features(make_images(2, (3, 16, 16))[0])
    alike = Source(train=5)
    alike.labels["train"] = torch.ones(5, dtype=torch.int64)  # all of the other class are held out
    with pytest.raises(MissingWeights, match="all of the 5 training images are of one"):
        ClassifierFeatures().load(alike)
    with pytest.warns(UserWarning, match="has 4 images to learn from"):
        ClassifierFeatures().load(Source(train=4))


def test_unlabelled_training_can_still_be_measured_by_the_labels_of_the_data():
    source = Source(train=20, labels=False)
    source.read = lambda split: (source.images[split], torch.arange(20) % 2)
    assert classifier_of(source).num_classes == 2


def test_published_weights_are_named_by_the_option_of_the_command():
    assert "--extractor_weights" in fidelity.OPTION


def test_a_classifier_is_trained_where_gradients_are_off(tmp_path, monkeypatch):
    """As at the first validation of a command that trains nothing."""
    from datamodules import Digits
    from diffusion_lit.modules import data_classifier as classifiers

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(classifiers, "IMAGES_SEEN", 300)
    data = Digits(batch_size=16)
    data.setup("validate")
    with torch.inference_mode():
        network = classifiers.classifier_of(data)
    assert not next(network.parameters()).is_inference()


def test_pixels_that_are_too_many_for_a_covariance_are_refused():
    Pixels().load(SimpleNamespace(image_shape=(3, 64, 64)))
    with pytest.raises(ValueError, match="49,152 features .* takes 18 GiB.*choose efficientnet_lite0"):
        Pixels().load(SimpleNamespace(image_shape=(3, 128, 128)))
