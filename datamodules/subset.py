"""A subset of another data set: fewer training images, or without some of its classes."""

from typing import Any

import torch
from torch import Tensor

from datamodules.base import ImageDataModule
from datamodules.loaders import Split
from diffusion_lit.checks import check_count

EPOCH = 4096  # minimum number of images in an epoch; fewer are repeated


class Subset(ImageDataModule):
    """Some training images of another data set, or its images without some classes.

    With `count` the training images are spread evenly over the training split; validation and test images stay. Classes
    that are left out are left out of every split, and the others are numbered anew in their order. Fewer than a few
    thousand training images are repeated up to a minimal length of an epoch; reference images are not repeated.

    Args:
        data: The data set.
        count: Number of training images, at least 1; all by default.
        without: Names of classes to leave out.

    Raises:
        ValueError: If there is no image, or the data set changes its training images by more than mirroring.
    """

    def __init__(self, data: ImageDataModule, count: int | None = None, without: list[str] | None = None) -> None:
        super().__init__(data.batch_size, data.num_workers, data.use_labels, data.random_flip, data.on_device)
        if isinstance(self.hparams.get("data"), ImageDataModule):  # made in Python: an object is no plain value
            self.hparams.pop("data")
        check_count(count=count)
        if type(data).augment is not ImageDataModule.augment:
            raise ValueError(f"{type(data).__name__} makes its training images itself, so that there are no fewer.")
        self.data = data
        self.count = count
        self.without = [str(name) for name in without or []]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of the data set's images."""
        return self.data.image_shape

    @property
    def class_names(self) -> list[str]:
        """Names of its classes, without those that are left out."""
        return [name for name in self.data.class_names if name not in self.without]

    def write_nowhere(self, but_root: bool) -> None:
        """See `ImageDataModule.write_nowhere`."""
        super().write_nowhere(but_root)
        self.data.write_nowhere(but_root)

    def number_classes(self, names: list[str]) -> bool:
        """Renumbers the classes, if the data set can; see `ImageDataModule.number_classes`."""
        self.data.match_classes([*names, *self.without])
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
            ValueError: If there are fewer images than are asked for, a class is unknown, or none is left.
        """
        whole = self.data.split(split)
        images, labels = whole.images, whole.labels
        rows = self._of_classes(labels)
        if split == "train" and self.count is not None:
            size = len(images) if rows is None else len(rows)
            if self.count > size:
                raise ValueError(f"count is {self.count}, but the training split has {size} images.")
            places = torch.arange(self.count) * size // self.count
            rows = places if rows is None else rows[places]
        if rows is None:
            return whole
        kept = images[rows] if isinstance(images, Tensor) else torch.from_numpy(images[rows.numpy()])
        labels = None if labels is None else labels[rows]
        return whole._replace(
            images=kept, labels=self._numbers()[labels] if labels is not None and self.without else labels
        )

    def _of_classes(self, labels: Tensor | None) -> Tensor | None:
        """The rows of a split whose class is not left out; None for all."""
        if not self.without:
            return None
        known = self.data.class_names
        for name in self.without:
            if name not in known or labels is None:
                classes = ", ".join(known) if known else "none: the data's labels are not used"
                raise ValueError(f"without names the class {name!r}, but the classes are {classes}; name some of them.")
        if not self.class_names:
            raise ValueError(f"without names all classes, {', '.join(self.without)}; leave at least one.")
        assert labels is not None
        return (self._numbers()[labels] >= 0).nonzero()[:, 0]

    def _numbers(self) -> Tensor:
        """The new number of each of the data set's classes, -1 for one that is left out; int64 (classes,)."""
        mine = self.class_names
        return torch.tensor([mine.index(name) if name in mine else -1 for name in self.data.class_names])

    def _loader_arguments(self, name: str) -> dict[str, Any]:
        """The arguments of a loader, of training images repeated."""
        arguments = super()._loader_arguments(name)
        if name == "train":
            split = arguments["split"]
            images, labels = split.images, split.labels
            rows = torch.arange(len(images), device=images.device).repeat(
                -(-max(EPOCH, self.batch_size) // len(images))
            )
            arguments["split"] = split._replace(
                images=images[rows], labels=None if labels is None else labels[rows.cpu()]
            )
        return arguments
