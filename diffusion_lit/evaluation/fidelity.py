"""torch-fidelity's extractors behind this project's interface: Inception, VGG, CLIP, DINOv2.

Their arithmetic is torch-fidelity's own, resize included (TensorFlow 1's bilinear, without antialiasing), so that
figures compare with the literature. torch-fidelity reads weights with an unrestricted unpickler; here they are read by
`weights.read_state` first, and what torch-fidelity gets is a clean copy. Grey images go in as three equal channels.
"""

import os
import tempfile
import warnings
from abc import abstractmethod
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch_fidelity import feature_extractor_clip as clip
from torch_fidelity import feature_extractor_dinov2 as dinov2
from torch_fidelity import feature_extractor_inceptionv3 as inception
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.utils import create_feature_extractor
from torchvision.models import VGG16_Weights

from diffusion_lit.evaluation.features import FeatureExtractor, Features, MissingWeights
from diffusion_lit.modules.protocols import ImageSource
from diffusion_lit.modules.weights import fetch, hub_folder, read_state

OPTION = "--extractor_weights FILE (feature_extractor_weights_path in a config)"


class TorchFidelityExtractor(FeatureExtractor):
    """A network of torch-fidelity.

    Args:
        feature_extractor_weights_path: Local file of weights (a plain state dict, .pth or .safetensors); by default
            PyTorch's cache, and the internet where they are not there.
    """

    registered: str
    layers: tuple[str, ...]

    def __init__(self, feature_extractor_weights_path: str | None = None) -> None:
        self.feature_extractor_weights_path = feature_extractor_weights_path

    def load(self, data: ImageSource | None = None) -> None:
        """Reads the weights and builds the network."""
        if self.network is not None:
            return
        given = self.feature_extractor_weights_path
        what = f"the extractor {self.name}"
        state = read_state(Path(given), what) if given is not None else self.published()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                network = self.build(state)
        except (RuntimeError, KeyError, AttributeError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise ValueError(f"The weights {given or 'published'} do not fit {what}: {reason}") from error
        self.network = network.requires_grad_(False).eval()

    @abstractmethod
    def published(self) -> dict[str, Tensor]:
        """The published weights, from PyTorch's cache or the internet."""

    def build(self, state: dict[str, Tensor]) -> nn.Module:
        """Has torch-fidelity build the network from clean weights.

        Args:
            state: Names and tensors.

        Returns:
            The network.
        """
        with tempfile.TemporaryDirectory() as folder:
            clean = os.path.join(folder, "weights.pth")
            torch.save(state, clean)
            network: nn.Module = create_feature_extractor(
                self.registered, list(self.layers), cuda=False, feature_extractor_weights_path=clean, verbose=False
            )
        return network

    def _around(self, kind: Any, **attributes: Any) -> nn.Module:
        """An extractor of torch-fidelity with a model, without its constructor, which would read a file by itself."""
        network: nn.Module = kind.__new__(kind)
        FeatureExtractorBase.__init__(network, self.registered, list(self.layers))
        for name, value in {"feature_extractor_internal_dtype": torch.float32, **attributes}.items():
            setattr(network, name, value)
        return network

    def compute(self, images: Tensor) -> Features:
        """Features, and logits where the network has them."""
        made = self.loaded(images)(images.expand(-1, 3, -1, -1))
        return Features(made[0], made[1] if len(made) > 1 else None)

    @property
    def transform(self) -> str:  # type: ignore[override]
        """What is done to an image."""
        size = getattr(self.network, "resolution", getattr(self.network, "INPUT_IMAGE_SIZE", "?"))
        return f"torch-fidelity {version('torch-fidelity')} {self.registered}: TF1 bilinear to {size}, no antialiasing"


class Inception(TorchFidelityExtractor):
    """Inception-v3 as FID has it (2,048 features, 1,008 logits), from torch-fidelity.

    Args:
        feature_extractor_weights_path: Local file of weights; by default PyTorch's cache, and the internet where they
            are not there.
    """

    name = "inception"
    registered = "inception-v3-compat"
    layers = ("2048", "logits_unbiased")

    @staticmethod
    def is_here() -> bool:
        """Whether the published weights lie in PyTorch's cache."""
        name: str = inception.URL_INCEPTION_V3.rsplit("/", 1)[1]
        return (hub_folder() / name).is_file()

    def published(self) -> dict[str, Tensor]:
        """The weights that the field's FID uses, 95 MB."""
        url = inception.URL_INCEPTION_V3
        return read_state(fetch(url, url.rsplit("/", 1)[1], "6726825d", "Inception", OPTION), "Inception")


class VGG(TorchFidelityExtractor):
    """VGG-16 (4,096 features), the usual one for precision and recall, from torch-fidelity.

    Args:
        feature_extractor_weights_path: Local file of torchvision's weights; by default PyTorch's cache, and the
            internet where they are not there.
    """

    name = "vgg16"
    registered = "vgg16"
    layers = ("fc2_relu",)

    def published(self) -> dict[str, Tensor]:
        """The weights of torchvision, 528 MB."""
        url = VGG16_Weights.IMAGENET1K_V1.url
        name = url.rsplit("/", 1)[1]
        return read_state(fetch(url, name, name.rsplit("-", 1)[1][:8], "VGG-16", OPTION), "VGG-16")


class CLIP(TorchFidelityExtractor):
    """The image half of CLIP, from torch-fidelity.

    Args:
        variant: Name of the network, as torch-fidelity has it without `clip-`: `vit-b-32`, `vit-l-14`, `rn50`, ...
        feature_extractor_weights_path: Local file, a plain state dict of OpenAI's network; by default PyTorch's cache,
            and the internet where it is not there.

    Raises:
        ValueError: If there is no such variant.
    """

    layers = ("clip",)
    mmd_sigma = 10.0

    def __init__(self, variant: str = "vit-b-32", feature_extractor_weights_path: str | None = None) -> None:
        super().__init__(feature_extractor_weights_path)
        self.registered = f"clip-{variant}"
        self.name = f"clip_{variant}".replace("-", "_")
        _known(self.registered, clip.MODEL_METADATA)

    def published(self) -> dict[str, Tensor]:
        """OpenAI's weights, a TorchScript archive, which is opened only when its hash is the published one."""
        digest = clip.MODEL_METADATA[self.registered]["hash"]
        path = fetch(clip.MODEL_URLS[self.registered], f"{self.registered}-{digest}.pt", digest, "CLIP", OPTION)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state: dict[str, Tensor] = torch.jit.load(str(path), map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
        return state

    def build(self, state: dict[str, Tensor]) -> nn.Module:
        """Builds the network and fills it."""
        model = clip.build_model(dict(state), torch.float32)
        return self._around(clip.FeatureExtractorCLIP, model=model, resolution=model.visual.input_resolution)


class DINOv2(TorchFidelityExtractor):
    """DINOv2 (Stein 2023, arXiv 2306.04675, uses `vit-l-14`), from torch-fidelity.

    The network's code is that of facebookresearch/dinov2, which torch.hub fetches; the weights are read separately.

    Args:
        variant: `vit-s-14`, `vit-b-14`, `vit-l-14` or `vit-g-14`.
        feature_extractor_weights_path: Local file, a plain state dict; by default PyTorch's cache, and the internet
            where it is not there.

    Raises:
        ValueError: If there is no such variant.
    """

    layers = ("dinov2",)

    def __init__(self, variant: str = "vit-l-14", feature_extractor_weights_path: str | None = None) -> None:
        super().__init__(feature_extractor_weights_path)
        self.registered = f"dinov2-{variant}"
        self.name = f"dinov2_{variant}".replace("-", "_")
        self.model_name = _known(self.registered, dinov2.MODEL_METADATA)

    def published(self) -> dict[str, Tensor]:
        """Meta's weights."""
        name = f"{self.model_name}_pretrain.pth"
        url = f"https://dl.fbaipublicfiles.com/dinov2/{self.model_name}/{name}"
        return read_state(fetch(url, name, "", "DINOv2", OPTION), "DINOv2")

    def build(self, state: dict[str, Tensor]) -> nn.Module:
        """Builds the network without weights and loads the clean ones."""
        try:
            model = torch.hub.load("facebookresearch/dinov2", self.model_name, pretrained=False, trust_repo=True)  # type: ignore[no-untyped-call]
        except OSError as error:
            raise MissingWeights(
                f"The code of DINOv2 is not in {torch.hub.get_dir()} and could not be fetched ({error}); run once on a "
                "machine with internet: python -c \"import torch; torch.hub.load('facebookresearch/dinov2', "
                f"'{self.model_name}')\", and copy that folder."
            ) from error
        model.load_state_dict(state)
        return self._around(dinov2.FeatureExtractorDinoV2, model=model.float())


def _known(name: str, table: Any) -> Any:
    """The table's entry, or a sentence that lists what there is."""
    if name not in table:
        raise ValueError(f"torch-fidelity has no extractor {name!r}; choose one of {', '.join(table)}.")
    return table[name]
