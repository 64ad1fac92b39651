"""Classifiers to measure with: read from a checkpoint, or trained on the spot.

The training on the spot is short and a function of the data alone: AdamW with a one-cycle learning rate over
`IMAGES_SEEN` training images, order and initial weights from a fixed key, on the CPU. Its result is kept as a
safetensors file under a key of the data's fingerprint and the recipe.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffusion_lit.diffusion.images import take
from diffusion_lit.diffusion.rng import keyed_generator, keyed_seed
from diffusion_lit.evaluation.features import FeatureExtractor, Features, ImageSource, MissingWeights
from diffusion_lit.nets.classifier import ConvClassifier
from diffusion_lit.storage.cache import cache_folder
from diffusion_lit.storage.checkpoints import read_checkpoint
from diffusion_lit.storage.hashing import key_of
from diffusion_lit.storage.tensors import kept_tensors

IMAGES_SEEN = 50_000  # at the most; less for data sets below 2,500 images
MOST_EPOCHS = 20
BATCH_SIZE = 128
LEARNING_RATE = 4e-3
RECIPE = f"v1: {IMAGES_SEEN} images or {MOST_EPOCHS} epochs, batch {BATCH_SIZE}, AdamW {LEARNING_RATE}, one cycle"


class ClassifierFeatures(FeatureExtractor):
    """Penultimate layer of a small classifier of the data set at hand, for images that Inception never saw.

    With `ckpt_path` it is one trained by `lightning fit --config configs/classifier_NAME.yaml`; without, a small one is
    trained on the spot from the data set's own training images, in seconds to a minute, the same each time, and kept
    in the user's cache. Distances compare only under the same weights, whose hash is in every receipt.

    Args:
        ckpt_path: Checkpoint of a `diffusion_lit.modules.Classifier`, or None.
        name: Name in the metrics' names.
    """

    transform = "uint8 / 127.5 - 1"

    def __init__(self, ckpt_path: str | None = None, name: str = "classifier") -> None:
        self.ckpt_path = ckpt_path
        self.name = name
        self._network: nn.Module | None = None

    def load(self, data: ImageSource | None = None) -> None:
        """Reads the checkpoint, or finds or trains the data set's own classifier."""
        if self._network is not None:
            return
        if self.ckpt_path is not None:
            self._network = classifier_from_checkpoint(Path(self.ckpt_path))
        elif data is None:
            raise MissingWeights("The classifier has neither a checkpoint nor data to train on; give it ckpt_path.")
        else:
            self._network = classifier_of(data)

    @property
    def network(self) -> nn.Module | None:
        """The classifier."""
        return self._network

    def compute(self, images: Tensor) -> Features:
        """Features and logits.

        Raises:
            ValueError: If the images have another shape than those that the classifier was trained on.
        """
        network: Any = self._network
        if network is None:
            raise ValueError("The classifier is not loaded; call load() first.")
        expected = (network.in_channels, network.image_size, network.image_size)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"The classifier was trained on images of shape {expected} and was given {tuple(images.shape[1:])}; "
                "use one that was trained on this data set."
            )
        features = network.features(images.float() / 127.5 - 1)
        return Features(features, network.logits(features))


def classifier_from_checkpoint(path: Path) -> ConvClassifier:
    """Reads a classifier trained by `lightning fit --config configs/classifier_NAME.yaml`.

    Args:
        path: The checkpoint file.

    Returns:
        The network in eval mode, on the CPU.

    Raises:
        MissingWeights: If there is no such file.
        ValueError: If the file is no checkpoint of a classifier.
    """
    if not path.exists():
        raise MissingWeights(
            f"There is no classifier {path}; train it with lightning fit --config configs/classifier_NAME.yaml, or "
            "leave ckpt_path out to train a small one on the spot."
        )
    checkpoint = read_checkpoint(path)
    if "classifier" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of a Classifier; give one of configs/classifier_NAME.yaml.")
    state = {name.removeprefix("net."): value for name, value in checkpoint["state_dict"].items()}
    try:
        network = ConvClassifier(**checkpoint["classifier"])
        network.load_state_dict(state)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"The classifier in {path} cannot be built: {error}.") from error
    return network.eval().requires_grad_(False)


@torch.inference_mode(False)  # also where it is first asked for within a validation
@torch.enable_grad()
def classifier_of(data: ImageSource) -> ConvClassifier:
    """The data set's own classifier, from the cache or trained now.

    Args:
        data: The data set, set up; its training split is used.

    Returns:
        The network in eval mode, on the CPU.

    Raises:
        MissingWeights: If the data set has no labels to learn from.
    """
    labels = training_labels(data)
    if labels is None:
        raise MissingWeights(
            "The data set has no labels to train a classifier on; choose the extractor pixels or inception, or give a "
            "classifier's ckpt_path."
        )
    channels, size, _ = data.image_shape
    network = _fresh(channels, size, int(labels.max()) + 1)
    record = {"recipe": RECIPE, "network": network.config, "fingerprint": data.fingerprint("train")}
    path = cache_folder() / "classifiers" / f"{key_of(record)[:32]}.safetensors"

    def trained() -> dict[str, Tensor]:
        train_classifier(network, data.reference_images("train"), labels)
        return network.state_dict()

    network.load_state_dict(kept_tensors(path, record, trained))
    return network.eval().requires_grad_(False)


def training_labels(data: ImageSource) -> Tensor | None:
    """The classes of the training images, also where the model at hand is to be trained without them.

    Args:
        data: The data set, set up.

    Returns:
        Class indices int64 (N,), or None where the data set has none.
    """
    labels = data.reference_labels("train")
    read = getattr(data, "read", None)
    if labels is None and read is not None:
        labels = read("train")[1]
    return labels


def _fresh(channels: int, size: int, num_classes: int) -> ConvClassifier:
    """A new network from a fixed key, leaving the process's own random state alone."""
    with torch.random.fork_rng():
        torch.manual_seed(keyed_seed("classifier", "weights"))
        return ConvClassifier(channels, size, max(2, num_classes))


@torch.enable_grad()
def train_classifier(network: ConvClassifier, images: Any, labels: Tensor) -> None:
    """Trains a classifier in place, the same way each time.

    Args:
        network: The network, without dropout, since its draws would not be keyed.
        images: Array-like uint8 images (N, C, H, W).
        labels: Their classes, int64 (N,).
    """
    count, batch = len(labels), min(BATCH_SIZE, len(labels))
    steps = max(1, min(IMAGES_SEEN, MOST_EPOCHS * count) // batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.2)
    generator = keyed_generator("classifier", "order")
    network.train().requires_grad_(True)
    order = torch.empty(0, dtype=torch.int64)
    for _ in tqdm(range(steps), desc="training a classifier to measure with", leave=False, delay=1):
        if len(order) < batch:
            order = torch.randperm(count, generator=generator)
        rows, order = order[:batch].sort().values, order[batch:]
        inputs = take(images, rows).float() / 127.5 - 1
        loss = nn.functional.cross_entropy(network(inputs), labels[rows], label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    network.eval()
