"""The features of a classifier of the data set at hand; `modules.data_classifier` reads or trains it."""

from pathlib import Path

from torch import Tensor

from diffusion_lit.diffusion.images import from_uint8
from diffusion_lit.evaluation.features import FeatureExtractor, Features, MissingWeights
from diffusion_lit.modules.data_classifier import classifier_from_checkpoint, classifier_of
from diffusion_lit.modules.protocols import ImageSource


class ClassifierFeatures(FeatureExtractor):
    """Penultimate layer of a small classifier of the data set at hand, for images that Inception never saw.

    With `ckpt_path` it is one trained by `diffusion-lit fit --config configs/classifier_NAME.yaml`; without, a small
    one is trained on the spot from the data set's own training images, in seconds to a minute, the same each time, and
    kept in the user's cache. Distances compare only under the same weights, whose hash is in every receipt.

    Args:
        ckpt_path: Checkpoint of a `diffusion_lit.modules.Classifier`, or None.
        name: Name in the metrics' names.
    """

    transform = "uint8 / 127.5 - 1"

    def __init__(self, ckpt_path: str | None = None, name: str = "classifier") -> None:
        self.ckpt_path = ckpt_path
        self.name = name

    def load(self, data: ImageSource | None = None) -> None:
        """Reads the checkpoint, or finds or trains the data set's own classifier."""
        if self.network is not None:
            return
        if self.ckpt_path is not None:
            self.network = classifier_from_checkpoint(Path(self.ckpt_path))
        elif data is None:
            raise MissingWeights("The classifier has neither a checkpoint nor data to train on; give it ckpt_path.")
        else:
            self.network = classifier_of(data)

    def compute(self, images: Tensor) -> Features:
        """Features and logits.

        Raises:
            ValueError: If the images have another shape than those that the classifier was trained on.
        """
        network = self.loaded(images)
        expected = (network.in_channels, network.image_size, network.image_size)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"The classifier was trained on images of shape {expected} and was given {tuple(images.shape[1:])}; "
                "use one that was trained on this data set."
            )
        features = network.features(from_uint8(images))
        return Features(features, network.logits(features))
