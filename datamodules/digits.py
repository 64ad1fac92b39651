"""scikit-learn's 8x8 handwritten digits: real data that needs no download and no file."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from datamodules.base import ImageDataModule
from datamodules.loaders import Split

HELD_OUT = 360


class Digits(ImageDataModule):
    """1,797 grey digits of 8x8 pixels and ten classes, which come with scikit-learn.

    A fixed stratified 1,437 are for training and 360 are held out. There are too few for a third part: "val" and "test"
    are the same 360. The 17 grey levels 0..16 are spread over 0..255.

    Args:
        batch_size: Images per training step over all ranks.
        use_labels: Whether batches carry the digit, and the model is made conditional.
        random_flip: Whether half of the training images are mirrored; mirrored digits are no digits.
        on_device: Whether the images live on the training device; by default they do on a GPU.
    """

    def __init__(
        self,
        batch_size: int = 128,
        use_labels: bool = True,
        random_flip: bool = False,
        on_device: bool | None = None,
    ) -> None:
        super().__init__(batch_size, 0, use_labels, random_flip, on_device)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (1, 8, 8)."""
        return (1, 8, 8)

    @property
    def class_names(self) -> list[str]:
        """The digits "0" to "9"."""
        return [str(digit) for digit in range(10)] if self.use_labels else []

    def read(self, split: str) -> Split:
        """Reads a split; see `ImageDataModule.read`.

        Returns:
            Images (N, 1, 8, 8) and digits.
        """
        values, digits = load_digits(return_X_y=True)
        rows = train_test_split(range(len(digits)), test_size=HELD_OUT, stratify=digits, random_state=0)
        kept = torch.tensor(sorted(rows[0] if split == "train" else rows[1]))
        images = torch.from_numpy(values).mul(255 / 16).round().to(torch.uint8).reshape(-1, 1, 8, 8)
        return Split(images[kept], torch.from_numpy(digits).to(torch.int64)[kept])
