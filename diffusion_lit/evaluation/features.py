"""Feature extractors, by which images are compared.

A distance between distributions of images is one between distributions of features, so that its value means nothing
without the extractor's name, its weights' hash and what is done to an image before it goes in. All extractors take
uint8 images (N, C, H, W) in [0, 255] and give float32 features (N, d), computed in full float32 arithmetic.

`Pixels` is here, `ClassifierFeatures` in `classifiers`, torch-fidelity's networks (Inception, CLIP, VGG, DINOv2) in
`fidelity`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_lit.checks import check_count
from diffusion_lit.evaluation.neighbours import radii
from diffusion_lit.modules.data_classifier import MissingWeights as MissingWeights
from diffusion_lit.modules.protocols import ImageSource
from diffusion_lit.runtime.precision import use_tf32
from diffusion_lit.storage.hashing import weights_hash


@dataclass(frozen=True)
class Features:
    """The features of images, and logits if the extractor has them.

    Args:
        features: Float32 features of shape (N, d).
        logits: Logits of shape (N, k) of the extractor's own classes, or None where it has none.
    """

    features: Tensor
    logits: Tensor | None = None

    @cached_property
    def radii(self) -> Tensor:
        """How far the neighbours of each image are, see `neighbours.radii`; for all figures against this set, once."""
        return radii(self.features)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: slice | Tensor) -> "Features":
        return Features(self.features[rows], None if self.logits is None else self.logits[rows])

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, as they are stored."""
        return {"features": self.features} | ({} if self.logits is None else {"logits": self.logits})

    @staticmethod
    def cat(parts: Sequence["Features"]) -> "Features":
        """Joins features along the images.

        Args:
            parts: At least one, all of the same extractor.

        Returns:
            The features of all images, in order.
        """
        logits = [part.logits for part in parts if part.logits is not None]
        return Features(torch.cat([part.features for part in parts]), torch.cat(logits) if logits else None)


class FeatureExtractor(ABC):
    """Turns uint8 images into features. Light to make: weights are read, downloaded or trained by `load`.

    Attributes:
        name: Part of the name of every figure that is computed with it.
        transform: What is done to an image before the network sees it, in words, for receipts.
        mmd_sigma: Width of the Gaussian kernel on features of length 1, where such a distance is usual.
        network: The loaded network; None before it is loaded, or where there is none.
    """

    mmd_sigma: float | None = None
    name: str
    transform: str
    network: nn.Module | None = None

    def load(self, data: ImageSource | None = None) -> None:  # noqa: B027 (an extractor without weights has nothing to do)
        """Gets the weights, once; further calls do nothing, nor does one of an extractor that has none.

        Args:
            data: The data set, set up, for an extractor that is trained on it.

        Raises:
            MissingWeights: If the weights cannot be had.
        """

    def loaded(self, images: Tensor) -> Any:
        """The network, for grey or colour images.

        Raises:
            ValueError: If it is not loaded, or the images have another number of channels than 1 or 3.
        """
        if self.network is None:
            raise ValueError(f"The extractor {self.name} is not loaded; call load() first.")
        if images.shape[1] not in (1, 3):
            raise ValueError(
                f"The extractor {self.name} takes grey or RGB images, not {images.shape[1]} channels; choose pixels."
            )
        return self.network

    @abstractmethod
    def compute(self, images: Tensor) -> Features:
        """Features of checked uint8 images (N, C, H, W) on the network's device."""

    @property
    def metric(self) -> str:
        """Name of the Fréchet distance: `fid_inception`, by which the field means Inception alone, else `fd_NAME`."""
        return f"{'fid' if self.name == 'inception' else 'fd'}_{self.name}"

    def to(self, device: torch.device | str) -> "FeatureExtractor":
        """Moves the network.

        Args:
            device: Where the features shall be computed.

        Returns:
            The extractor itself.
        """
        if self.network is not None:
            self.network.to(device)
        return self

    @torch.no_grad()
    def features(self, images: Tensor) -> Features:
        """Features of one batch.

        Args:
            images: Images (N, C, H, W), uint8 in [0, 255], on any device.

        Returns:
            The features on the CPU.

        Raises:
            ValueError: If the images are not uint8, look scaled to 0 to 1, or the network is in training mode.
        """
        check_pixels(images)
        network = self.network
        device = images.device
        if network is not None:
            if any(module.training for module in network.modules()):
                raise ValueError(
                    f"The extractor {self.name} is in training mode, where its batch statistics would change the "
                    "features; call eval() on its network."
                )
            device = next(network.parameters()).device
        with full_precision():
            made = self.compute(images.to(device))
        logits = None if made.logits is None else made.logits.float().cpu()
        return Features(made.features.float().cpu(), logits)

    def extract(self, images: Any, batch_size: int = 64, progress: Callable[[int], object] | None = None) -> Features:
        """Features of any number of images.

        Args:
            images: Array-like of uint8 images (N, C, H, W), such as a tensor or a memory map.
            batch_size: Images at a time; it changes the features by no more than floating-point rounding.
            progress: Called with the number of images after each batch.

        Returns:
            The features on the CPU, in the order of the images.

        Raises:
            ValueError: As `features`, or if there are no images.
        """
        check_count(batch_size=batch_size)
        if len(images) == 0:
            raise ValueError("There are no images to compute features of; check the split and the folder.")
        parts = []
        for start in range(0, len(images), batch_size):
            batch = torch.as_tensor(images[start : start + batch_size])
            parts.append(self.features(batch))
            if progress is not None:
                progress(len(batch))
        return Features.cat(parts)

    def identity(self) -> dict[str, Any]:
        """The record that identifies this extractor, in receipts and keys of caches.

        Returns:
            Its name, the hash of its weights and what it does to an image.
        """
        weights = None if self.network is None else weights_hash(self.network.state_dict())
        return {"name": self.name, "weights_sha256": weights, "transform": self.transform}


MOST_PIXELS = 2**14  # features of `Pixels`, whose covariance takes 2 GiB


class Pixels(FeatureExtractor):
    """The raw pixels in [0, 1], flattened: a distance that needs no network and sees no content."""

    name = "pixels"
    transform = "uint8 / 255, flattened"

    def load(self, data: ImageSource | None = None) -> None:
        """Refuses images whose pixels are too many for their covariance.

        Raises:
            ValueError: If there are more than 16,384.
        """
        count = 0 if data is None else math.prod(data.image_shape)
        if count > MOST_PIXELS:
            raise ValueError(
                f"The extractor pixels would make {count:,} features of an image, whose covariance takes "
                f"{8 * count**2 / 2**30:.0f} GiB; it is for up to {MOST_PIXELS:,}: choose efficientnet_lite0, "
                "inception or classifier."
            )

    def compute(self, images: Tensor) -> Features:
        """The pixels, C * H * W features."""
        return Features(images.flatten(1).float() / 255)


def check_pixels(images: Tensor) -> None:
    """Checks that images are a uint8 batch in [0, 255].

    Args:
        images: To be uint8 of shape (N, C, H, W).

    Raises:
        ValueError: If it has another dtype or shape, or its values are 0 and 1, as of images in [0, 1].
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"Images are {images.dtype}; extractors take uint8 in [0, 255]: round (x + 1) * 127.5.")
    if images.dim() != 4:
        raise ValueError(f"Images have shape {tuple(images.shape)}; extractors take (N, C, H, W).")
    if len(images) and int(images.max()) == 1:
        raise ValueError("Images have values 0 and 1 only, as if scaled to [0, 1]; extractors take [0, 255].")


@contextmanager
def full_precision() -> Iterator[None]:
    """Full float32 within: no TF32, no autocast, so that features do not depend on the settings of a training run."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    use_tf32(False)
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn
