"""Extractors by the names that a command line gives them."""

from collections.abc import Callable

from diffusion_lit.evaluation.classifiers import ClassifierFeatures
from diffusion_lit.evaluation.efficientnet import EfficientNetLite0
from diffusion_lit.evaluation.features import FeatureExtractor, Pixels
from diffusion_lit.evaluation.fidelity import CLIP, VGG, DINOv2, Inception

NAMES = "auto, inception, efficientnet_lite0, classifier, pixels, vgg16, clip, clip-VARIANT, dinov2 or dinov2-VARIANT"
OF_ONE_KIND: dict[str, Callable[[str | None], FeatureExtractor]] = {
    "inception": Inception,
    "efficientnet_lite0": EfficientNetLite0,
    "vgg16": VGG,
    "classifier": ClassifierFeatures,
}


def make_extractor(name: str, weights: str | None, image_shape: tuple[int, int, int]) -> FeatureExtractor:
    """An extractor, not loaded yet.

    Args:
        name: One of `NAMES`; `auto` is classifier for images that are not RGB, else inception, and efficientnet_lite0
            where Inception's weights are not here and the extra `features` is installed.
        weights: Local file of its weights, or None.
        image_shape: Shape (C, H, W) of the images.

    Returns:
        The extractor.

    Raises:
        ValueError: If there is no such extractor.
    """
    if name == "auto":
        name = "inception" if image_shape[0] == 3 else "classifier"
        if name == "inception" and weights is None and not Inception.is_here() and EfficientNetLite0.is_installed():
            name = "efficientnet_lite0"
    kind, _, variant = name.partition("-")
    if name == "pixels":
        if weights is not None:
            raise ValueError("The extractor pixels has no weights; leave --extractor_weights out.")
        return Pixels()
    if name in OF_ONE_KIND:
        return OF_ONE_KIND[name](weights)
    if kind == "clip":
        return CLIP(variant or "vit-b-32", weights)
    if kind == "dinov2":
        return DINOv2(variant or "vit-l-14", weights)
    raise ValueError(f"There is no extractor {name!r}; choose {NAMES}.")
