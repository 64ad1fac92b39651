"""Perceptual distances: between deep features of a network that was trained for something else.

With f_l(x) the features of layer l at each position, scaled to unit length,

    d(x_hat, x) = sum over l of the mean over positions of |f_l(x_hat) - f_l(x)|^2        (Zhang 2018)

`ClassifierPerceptual` takes them from a classifier of the data set at hand, which needs no download, and
`EfficientNetPerceptual` from a network trained on ImageNet in a package of the registry, for photographs without
classes. `LPIPS` takes them from a larger one and weights each channel as people judge.

Source: Zhang 2018, arXiv 1801.03924, equation 1.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_lit.checks import check_number
from diffusion_lit.modules.data_classifier import MissingWeights, classifier_from_checkpoint, classifier_of
from diffusion_lit.modules.efficientnet import efficientnet_lite0, stages
from diffusion_lit.modules.latent_space import Frozen
from diffusion_lit.modules.protocols import ImageSource
from diffusion_lit.nets.classifier import ConvClassifier

NETWORKS = ("vgg", "alex", "squeeze")
OWN_KEY = "perceptual classifier"  # of weights and order, so that it is not the classifier that measures


class Perceptual(ABC):
    """Base class of perceptual distances. Light to make: the network is read or trained by `load`.

    Args:
        weight: Weight of the distance in the loss, positive.

    Raises:
        ValueError: If the weight is not positive.
    """

    def __init__(self, weight: float = 1.0) -> None:
        check_number(above=0, weight=weight)
        self.weight = weight
        self.frozen: Frozen | None = None

    def load(self, data: ImageSource) -> None:
        """Gets the network, once; further calls do nothing. Called on all ranks, rank 0 first.

        Args:
            data: The data module, set up.

        Raises:
            ValueError: If it is not available.
        """
        if self.frozen is None:
            self.frozen = Frozen(self.network(data))

    @abstractmethod
    def network(self, data: ImageSource) -> nn.Module:
        """A network from images (B, C, H, W) in [-1, 1], in pairs, to their distances (B,)."""

    def __call__(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """The distance, in full float32.

        Args:
            x_hat: Reconstructions (B, C, H, W) in [-1, 1] up to overshoot.
            x: Images of the same shape.

        Returns:
            Distances (B,).

        Raises:
            ValueError: If the network was not loaded.
        """
        if self.frozen is None:
            raise ValueError(f"The network of {type(self).__name__} is not loaded; call load(data) first.")
        with torch.autocast(x.device.type, enabled=False):
            distance: Tensor = self.frozen.on(x.device)(x_hat.float(), x.float())
        return distance

    def __deepcopy__(self, memo: dict[int, Any]) -> "Perceptual":
        return self  # an average of the module shares it


class ClassifierPerceptual(Perceptual):
    """The distance of the features of a classifier of the same data.

    The classifier is trained on the spot, in seconds to a minute, and kept in the user's cache. Its initial weights and
    its order of images are its own, so that it is not the one that Fréchet distances are measured by.

    Args:
        weight: Weight of the distance in the loss, positive.
        ckpt_path: Checkpoint of a `diffusion_lit.modules.Classifier` instead.
    """

    def __init__(self, weight: float = 1.0, ckpt_path: str | None = None) -> None:
        super().__init__(weight)
        self.ckpt_path = ckpt_path

    def network(self, data: ImageSource) -> nn.Module:
        """The stages of the classifier.

        Raises:
            ValueError: If there is no checkpoint and the data has no classes to learn from.
        """
        if self.ckpt_path is not None:
            return StageDistance(classifier_from_checkpoint(Path(self.ckpt_path)))
        try:
            return StageDistance(classifier_of(data, OWN_KEY))
        except MissingWeights as error:
            raise ValueError(
                "ClassifierPerceptual looks through a classifier of the data, which has no classes to tell apart; take "
                "EfficientNetPerceptual or LPIPS, or give a classifier's ckpt_path."
            ) from error


class EfficientNetPerceptual(Perceptual):
    """The distance of the features of EfficientNet-Lite0, trained on ImageNet, from the extra `features`.

    Args:
        weight: Weight of the distance in the loss, positive.
    """

    def network(self, data: ImageSource) -> nn.Module:
        """The resolutions of the network.

        Raises:
            ValueError: If the extra is not installed, or the images are neither grey nor in colour.
        """
        if data.image_shape[0] not in (1, 3):
            raise ValueError(
                f"EfficientNetPerceptual takes grey or RGB images, not {data.image_shape[0]} channels; take "
                "ClassifierPerceptual."
            )
        return EfficientNetDistance(efficientnet_lite0(None, "the perceptual distance EfficientNetPerceptual"))


class LPIPS(Perceptual):
    """LPIPS by torchmetrics; torchvision downloads its backbone's weights once.

    Args:
        weight: Weight of the distance in the loss, positive.
        net: `vgg`, `alex` or `squeeze`.

    Raises:
        ValueError: If there is no such network.

    Source: Zhang 2018, arXiv 1801.03924.
    """

    def __init__(self, weight: float = 1.0, net: str = "vgg") -> None:
        if net not in NETWORKS:
            raise ValueError(f"lpips_net is {net!r}; choose one of {', '.join(NETWORKS)}.")
        super().__init__(weight)
        self.net = net

    def network(self, data: ImageSource) -> nn.Module:
        """Torchmetrics' network.

        Raises:
            ValueError: If its weights cannot be had.
        """
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        try:
            metric = LearnedPerceptualImagePatchSimilarity(net_type=self.net)  # type: ignore[arg-type]
        except Exception as error:  # a download may raise anything
            raise ValueError(
                f"The weights of LPIPS ({self.net}) are neither in torch's cache nor could be downloaded; take "
                "ClassifierPerceptual or EfficientNetPerceptual as perceptual, set lpips_weight to 0, or run once with "
                "internet access."
            ) from error
        return OfColour(metric.net)


class FeatureDistance(nn.Module, ABC):
    """The distance above; a subclass has the network.

    Attributes:
        name: Of the network, for receipts.
    """

    name: str

    @abstractmethod
    def layers(self, x: Tensor) -> Sequence[Tensor]:
        """What each layer makes of images (B, C, H, W) in [-1, 1]."""

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Distances (B,) of images (B, C, H, W)."""
        with torch.no_grad():
            targets = self._unit(x)
        pairs = zip(self._unit(x_hat), targets, strict=True)
        return torch.stack([(a - b).square().sum(1).mean((1, 2)) for a, b in pairs]).sum(0)

    def _unit(self, x: Tensor) -> list[Tensor]:
        """The layers' features, scaled to unit length at each position."""
        return [F.normalize(made, dim=1, eps=1e-6) for made in self.layers(x)]


class StageDistance(FeatureDistance):
    """With the stages of a classifier as layers.

    Args:
        classifier: The classifier.
    """

    name = "classifier"

    def __init__(self, classifier: ConvClassifier) -> None:
        super().__init__()
        self.stages = classifier.stages

    def layers(self, x: Tensor) -> list[Tensor]:
        """What each stage makes of images."""
        made = []
        for stage in self.stages:
            x = stage(x)
            if not isinstance(stage, nn.MaxPool2d):
                made.append(x)
        return made


class EfficientNetDistance(FeatureDistance):
    """With the resolutions of EfficientNet-Lite0 as layers.

    Args:
        network: The network.
    """

    name = "efficientnet_lite0"

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def layers(self, x: Tensor) -> list[Tensor]:
        """What the network makes of images at each resolution."""
        return stages(self.network, x.clamp(-1, 1))


class OfColour(nn.Module):
    """A distance of colour images, given grey or colour ones.

    Args:
        net: torchmetrics' network.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Distances (B,) of images (B, 1 or 3, H, W)."""
        x_hat, x = (image.expand(-1, 3, -1, -1) for image in (x_hat, x))
        distance: Tensor = self.net(x_hat.clamp(-1, 1), x)
        return distance.flatten()
