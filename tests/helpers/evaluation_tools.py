"""What the evaluation tests share: a data source without files, and a small network known to torch-fidelity."""

import hashlib

import torch
from torch import nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from diffusion_lit.evaluation.fidelity import TorchFidelityExtractor


def make_images(count, shape=(3, 8, 8), seed=0, classes=2):
    """Images whose brightness tells their class, and the classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    noise = torch.randint(0, 120, (count, *shape), generator=generator)
    return (noise + 120 * labels[:, None, None, None] // max(1, classes - 1)).to(torch.uint8), labels


class Source:
    """A data set in memory with the methods that evaluation asks for."""

    def __init__(self, train=60, test=30, shape=(3, 8, 8), labels=True):
        self.image_shape = shape
        self.num_classes = 2 if labels else 0
        made = {
            "train": make_images(train, shape, 1),
            "val": make_images(test, shape, 2),
            "test": make_images(test, shape, 3),
        }
        self.images = {name: images for name, (images, _) in made.items()}
        self.labels = {name: classes if labels else None for name, (_, classes) in made.items()}

    def reference_images(self, split):
        return torch.cat([self.images[name] for name in split.split("+")])

    def reference_labels(self, split):
        parts = [self.labels[name] for name in split.split("+")]
        return None if parts[0] is None else torch.cat(parts)

    def fingerprint(self, split):
        return hashlib.sha256(self.reference_images(split).numpy().tobytes()).hexdigest()


class TinyFidelityNetwork(FeatureExtractorBase):
    """As torch-fidelity's own extractors: uint8 in, its resize, a network with batch norm, features and logits."""

    INPUT_IMAGE_SIZE = 13

    def __init__(self, name, features_list, feature_extractor_weights_path=None, **kwargs):
        super().__init__(name, features_list)
        self.conv = nn.Conv2d(3, 12, 5, stride=2)
        self.norm = nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 7)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, x):
        x = interpolate_bilinear_2d_like_tensorflow1x(x.float(), size=(13, 13), align_corners=False)
        x = self.norm(self.conv((x - 128) / 128)).relu().mean((2, 3))
        made = {"12": x, "logits": self.head(x)}
        return tuple(made[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list():
        return "12", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "12"

    @staticmethod
    def can_be_compiled():
        return False


if "tiny" not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor("tiny", TinyFidelityNetwork)


class Tiny(TorchFidelityExtractor):
    """The small network behind this project's interface."""

    name = "tiny"
    registered = "tiny"
    layers = ("12", "logits")

    def published(self):
        raise AssertionError("the tests give a file")


def tiny_weights(path):
    """Seeded random weights of the small network in a file."""
    torch.manual_seed(0)
    modules = {"conv": nn.Conv2d(3, 12, 5, stride=2), "norm": nn.BatchNorm2d(12), "head": nn.Linear(12, 7)}
    state = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    state["conv.weight"] = state["conv.weight"] * 6
    state["head.weight"] = state["head.weight"] * 6
    torch.save(state, path)
    return path
