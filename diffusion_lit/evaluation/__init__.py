"""Feature extractors, metrics and receipts."""

from diffusion_lit.evaluation.classifiers import ClassifierFeatures
from diffusion_lit.evaluation.efficientnet import EfficientNetLite0
from diffusion_lit.evaluation.features import FeatureExtractor, Features, MissingWeights, Pixels
from diffusion_lit.evaluation.fidelity import CLIP, VGG, DINOv2, Inception

__all__ = [
    "CLIP",
    "VGG",
    "ClassifierFeatures",
    "DINOv2",
    "EfficientNetLite0",
    "FeatureExtractor",
    "Features",
    "Inception",
    "MissingWeights",
    "Pixels",
]
