"""The interfaces of models and data sets that commands, callbacks and figures use.

The protocols are structural: a user's module or data set conforms if it has the members. `Model`, `DataSet` and
`Settings` are what the type checker holds every use to. The small ones, which `isinstance` asks for where any class may
stand, name methods only: to look for a property would compute it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn

Shape = tuple[int, int, int]


class Settings(Protocol):
    """How a model draws: `Sampling` of denoisers, or its counterpart of other models."""

    @property
    def sampler(self) -> str:
        """Name of the sampler."""

    @property
    def num_steps(self) -> int | None:
        """Number of steps, None for as many as the model has."""

    @property
    def cfg_scale(self) -> float:
        """Scale of classifier-free guidance, 1 for none."""

    @property
    def nfe(self) -> int | None:
        """Calls of the model for a sample, None where they depend on it."""

    @property
    def guide_ckpt(self) -> str | None:
        """Checkpoint of a worse model that guides, None where there is none."""

    @property
    def autoguided(self) -> bool:
        """Whether that model guides."""

    def replace(self, **changes: Any) -> Self:
        """The same settings with some replaced, None meaning unchanged."""

    def record(self) -> dict[str, Any]:
        """The settings as plain values, for receipts."""


@runtime_checkable
class Generates(Protocol):
    """Draws images."""

    def generate(
        self,
        seeds: Sequence[int],
        labels: Tensor | None = None,
        sampling: Any = None,
        callback: Callable[..., Any] | None = None,
    ) -> Tensor:
        """Draws one image per seed; see `PixelModel.generate`."""


@runtime_checkable
class Encodes(Protocol):
    """An autoencoder."""

    def encode(self, images: Tensor, /) -> Any:
        """The posterior of the latents of images (B, C, H, W)."""

    def decode(self, z: Tensor, /) -> Tensor:
        """Images of latents."""


@runtime_checkable
class Reconstructs(Protocol):
    """Reconstructs images, as an autoencoder does."""

    def reconstruct(self, images: Tensor) -> Tensor:
        """The reconstructions of images (B, C, H, W) in [-1, 1]."""


@runtime_checkable
class Interpolates(Protocol):
    """Interpolates between images."""

    def interpolate(self, first: Tensor, second: Tensor, shares: Tensor) -> Tensor:
        """Images (B, len(shares), C, H, W) between two of shape (B, C, H, W)."""


class Model(Generates, Protocol):
    """A model that commands draw with: a module trained here, or one of another library."""

    @property
    def image_shape(self) -> Shape:
        """Shape (C, H, W) of the images that it makes."""

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 for an unconditional model."""

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes by their numbers; empty where they have none."""

    @property
    def prompts(self) -> Sequence[str] | None:
        """What label i asks a text model for; None where the model reads no text."""

    @property
    def label_dropout(self) -> float | None:
        """Share of the training without labels; None where it is not known."""

    @property
    def sampling(self) -> Settings:
        """How it draws unless told otherwise."""

    @property
    def init_from(self) -> dict[str, Any] | None:
        """Record of its initial weights, if the training did not draw them at random."""

    @property
    def net(self) -> nn.Module:
        """The network that is called for a sample."""

    # What every torch.nn.Module has.
    training: bool

    def to(self, device: torch.device | str, /) -> Any:
        """Moves it to a device."""

    def state_dict(self) -> Mapping[str, Any]:
        """Its weights by name."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its parameters."""


def is_model(module: object) -> TypeGuard[Model]:
    """Whether a module, which may be a user's own, is a model: one that draws."""
    return isinstance(module, Generates)


@runtime_checkable
class HasImages(Protocol):
    """A data set that gives the images of its splits, to be compared with."""

    def reference_images(self, split: str) -> Any:
        """The images of a split ("train", "val", "test" or several joined by "+"), array-like uint8 (N, C, H, W)."""


@runtime_checkable
class HasPairs(Protocol):
    """A data set that pairs its images with others."""

    def reference_pairs(self, split: str) -> Any:
        """What is paired with the images of a split, array-like uint8 (N, C', H, W)."""


@runtime_checkable
class ReadsSplits(Protocol):
    """A data set whose splits can be read with all their labels."""

    def read(self, split: str) -> tuple[Any, Tensor | None, int]:
        """Images, and classes where the source has them, even if they are not to be used; see `datamodules`."""


class ImageSource(HasImages, Protocol):
    """What figures ask of a data set that is prepared and set up."""

    def reference_labels(self, split: str) -> Tensor | None:
        """The classes of a split, int64 (N,), or None."""

    def fingerprint(self, split: str) -> str:
        """A hash of all that determines the images."""

    @property
    def image_shape(self) -> Shape:
        """Shape (C, H, W) of an image."""

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 for none."""


class DataSet(ImageSource, Protocol):
    """What commands ask of a data set: a LightningDataModule with images."""

    @property
    def class_names(self) -> Sequence[str]:
        """Name of each class; empty where there are no labels."""

    @property
    def random_flip(self) -> bool:
        """Whether half of the training images are mirrored, redrawn at each epoch."""

    def mirrored(self, epoch: int, batch: int) -> Tensor | None:
        """Which images of a training batch are mirrored, bool (B,); None where none ever is."""

    def prepare_data(self) -> None:
        """Downloads and unpacks, in one process."""

    def setup(self, stage: str | None = None) -> None:
        """Reads what a stage needs; None for all."""


def is_data_set(data: object) -> TypeGuard[DataSet]:
    """Whether data, which may be a user's own, is a data set: one that gives its images."""
    return isinstance(data, HasImages)


@runtime_checkable
class Continues(Protocol):
    """A data set that compares itself with the one that a checkpoint was trained on."""

    def identity(self) -> dict[str, Any]:
        """The record that identifies it, as plain values."""

    def continue_from(self, recorded: dict[str, Any], class_names: list[str]) -> None:
        """Goes on with the recorded data; other data is a ValueError."""
