"""EfficientNet-Lite0 on ImageNet as features, for machines without a hub; see `modules.efficientnet` for the network.

An image is resized as `transform` says, since the network was trained on 224 pixels and sees nothing in 32; the
features are the 1,280 channels before its classifier, averaged over positions.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffusion_lit.evaluation.features import FeatureExtractor, Features
from diffusion_lit.modules.efficientnet import DEVIATION, MEAN, SIDE, efficientnet_lite0, is_installed
from diffusion_lit.modules.protocols import ImageSource


class EfficientNetLite0(FeatureExtractor):
    """EfficientNet-Lite0 (1,280 features) on ImageNet, for colour images; grey ones go in as three equal channels.

    Args:
        feature_extractor_weights_path: Local file of the same weights (a plain state dict, .pth or .safetensors); by
            default those of the package.
    """

    name = "efficientnet_lite0"
    transform = (
        f"uint8 / 255, bilinear to {SIDE}x{SIDE} with antialiasing (torch's interpolate, corners not aligned), clamped "
        "to [0, 1], (x - 127/255) / (128/255); mean over positions of the last convolution after ReLU6"
    )

    def __init__(self, feature_extractor_weights_path: str | None = None) -> None:
        self.feature_extractor_weights_path = feature_extractor_weights_path

    @staticmethod
    def is_installed() -> bool:
        """Whether network and weights are there."""
        return is_installed()

    def load(self, data: ImageSource | None = None) -> None:
        """Reads the weights and builds the network."""
        if self.network is None:
            self.network = efficientnet_lite0(self.feature_extractor_weights_path, f"the extractor {self.name}")

    def compute(self, images: Tensor) -> Features:
        """Features (N, 1280)."""
        return Features(self.loaded(images).extract_features(prepared(images)).mean((2, 3)))


def prepared(images: Tensor) -> Tensor:
    """The network's input.

    Args:
        images: Images uint8 (N, 1 or 3, H, W).

    Returns:
        Shape (N, 3, 128, 128), float32.
    """
    x = images.expand(-1, 3, -1, -1).to(torch.float32) / 255
    if x.shape[-2:] != (SIDE, SIDE):
        x = interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
    return (x - MEAN) / DEVIATION
