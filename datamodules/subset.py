"""A subset of another data set's training images, to study small data sets."""

from typing import Any

import torch
from torch import Tensor

from datamodules.base import ImageDataModule
from datamodules.loaders import Split
from diffusion_lit.checks import check_count

EPOCH = 4096  # images that an epoch has at least, fewer being repeated


class Subset(ImageDataModule):
    """Some training images of another data set; its validation and test images stay.

    The images are spread evenly over the training split. Fewer than a few thousand are repeated up to a minimal length
    of an epoch; reference images are not repeated.

    Args:
        data: The data set.
        count: Number of training images, at least 1.

    Raises:
        ValueError: If there is no image, or the data set changes its training images by more than mirroring.
    """

    def __init__(self, data: ImageDataModule, count: int) -> None:
        super().__init__(data.batch_size, data.num_workers, data.use_labels, data.random_flip, data.on_device)
        if isinstance(self.hparams.get("data"), ImageDataModule):  # made in Python: an object is no plain value
            self.hparams.pop("data")
        check_count(count=count)
        if type(data).augment is not ImageDataModule.augment:
            raise ValueError(f"{type(data).__name__} makes its training images itself, so that there are no fewer.")
        self.data = data
        self.count = count

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of the data set's images."""
        return self.data.image_shape

    @property
    def class_names(self) -> list[str]:
        """Names of its classes."""
        return self.data.class_names

    def write_nowhere(self, but_root: bool) -> None:
        """See `ImageDataModule.write_nowhere`."""
        super().write_nowhere(but_root)
        self.data.write_nowhere(but_root)

    def number_classes(self, names: list[str]) -> bool:
        """Renumbers the classes, if the data set can; see `ImageDataModule.number_classes`."""
        self.data.match_classes(names)
        return True

    def rule(self) -> dict[str, Any]:
        """The rule of the data set."""
        return self.data.rule()

    def follow(self, rule: dict[str, Any]) -> None:
        """Has the data set take the rule that a model was trained under; see `ImageDataModule.follow`."""
        self.data.follow(rule)
        self._forget()

    def prepare_data(self) -> None:
        """Gets the data set."""
        self.data.prepare_data()

    def read(self, split: str) -> Split:
        """Reads a split; see `ImageDataModule.read`.

        Raises:
            ValueError: If there are fewer images than are asked for.
        """
        images, labels = self.data.split(split)
        if split != "train":
            return Split(images, labels)
        if self.count > len(images):
            raise ValueError(f"count is {self.count}, but the training split has {len(images)} images.")
        rows = torch.arange(self.count) * len(images) // self.count
        kept = images[rows] if isinstance(images, Tensor) else torch.from_numpy(images[rows.numpy()])
        return Split(kept, None if labels is None else labels[rows])

    def _loader_arguments(self, name: str) -> dict[str, object]:
        """The arguments of a loader, of training images repeated."""
        arguments = super()._loader_arguments(name)
        if name == "train":
            images, labels = arguments["split"]
            rows = torch.arange(self.count, device=images.device).repeat(-(-max(EPOCH, self.batch_size) // self.count))
            arguments["split"] = Split(images[rows], None if labels is None else labels[rows.cpu()])
        return arguments
