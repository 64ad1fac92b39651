"""Classifiers of a data set: read from a checkpoint, or trained on the spot.

The training on the spot is short and a function of the data and a key alone: AdamW with a one-cycle learning rate over
`IMAGES_SEEN` training images, order and initial weights from the key, on the CPU. Its result is kept as a safetensors
file under a hash of the data's fingerprint and the recipe. Another key gives another classifier as good: what a loss
looks through (`modules.perceptual`) must not be what the result is measured by (`evaluation.ClassifierFeatures`).
"""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from tqdm import tqdm

from diffusion_lit.diffusion.images import from_uint8, take
from diffusion_lit.diffusion.rng import keyed_generator, keyed_seed
from diffusion_lit.modules.autoencoders import part_of
from diffusion_lit.modules.protocols import ImageSource, ReadsSplits
from diffusion_lit.nets.classifier import ConvClassifier
from diffusion_lit.storage.checkpoints import read_checkpoint
from diffusion_lit.storage.size import no_larger_than
from diffusion_lit.storage.tensors import kept_tensors
from diffusion_lit.words import counted

IMAGES_SEEN = 50_000  # at the most; less for data sets below 2,500 images
MOST_EPOCHS = 20
BATCH_SIZE = 128
LEARNING_RATE = 4e-3
RECIPE = f"v1: {IMAGES_SEEN} images or {MOST_EPOCHS} epochs, batch {BATCH_SIZE}, AdamW {LEARNING_RATE}, one cycle"
FEW = 100  # images, of which a classifier learns little
MEASURING = "classifier"  # the key of the classifier that measures


class MissingWeights(ValueError):
    """The weights of an extractor are not here and cannot be had; the message says how to get them."""


def classifier_from_checkpoint(path: Path) -> ConvClassifier:
    """Reads a classifier trained by `diffusion-lit fit --config configs/classifier_NAME.yaml`.

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
            f"There is no classifier {path}; train it with diffusion-lit fit --config configs/classifier_NAME.yaml, or "
            "leave ckpt_path out to train a small one on the spot."
        )
    checkpoint = read_checkpoint(path)
    if "classifier" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of a Classifier; give one of configs/classifier_NAME.yaml.")
    try:
        with no_larger_than(checkpoint["state_dict"]):
            network = ConvClassifier(**checkpoint["classifier"])
        network.load_state_dict(part_of(checkpoint["state_dict"], "net"))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"The classifier in {path} cannot be built: {error}.") from error
    return network.eval().requires_grad_(False)


@torch.inference_mode(False)  # also where it is first asked for within a validation
@torch.enable_grad()
def classifier_of(data: ImageSource, key: str = MEASURING) -> ConvClassifier:
    """The data set's own classifier, from the cache or trained now.

    Args:
        data: The data set, set up; its training split is used.
        key: Of its initial weights and the order of images.

    Returns:
        The network in eval mode, on the CPU.

    Raises:
        MissingWeights: If the data set has no labels, or training images of one class alone.
    """
    labels = training_labels(data)
    if labels is None:
        raise MissingWeights(
            "The data set has no labels to train a classifier on; choose the extractor pixels or inception, or give a "
            "classifier's ckpt_path."
        )
    if len(labels) == 0 or bool((labels == labels[0]).all()):
        raise MissingWeights(
            f"A classifier learns from 2 classes or more, and all of the {counted(len(labels), 'training image')} are "
            "of one; choose the extractor efficientnet_lite0, inception or pixels, or give a classifier's ckpt_path."
        )
    if len(labels) < FEW:
        rank_zero_warn(
            f"The classifier that images are compared by has {counted(len(labels), 'image')} to learn from, so that "
            "its features mean little; the extractors efficientnet_lite0 and inception are trained already."
        )
    channels, size, _ = data.image_shape
    network = _fresh(channels, size, int(labels.max()) + 1, key)
    record = {"recipe": RECIPE, "network": network.config, "fingerprint": data.fingerprint("train")}
    if key != MEASURING:
        record["key"] = key

    def trained() -> dict[str, Tensor]:
        train_classifier(network, data.reference_images("train"), labels, key)
        return network.state_dict()

    network.load_state_dict(kept_tensors("classifiers", record, trained))
    return network.eval().requires_grad_(False)


def training_labels(data: ImageSource) -> Tensor | None:
    """The classes of the training images, also where the model at hand is to be trained without them.

    Args:
        data: The data set, set up.

    Returns:
        Class indices int64 (N,), or None where the data set has none.
    """
    labels = data.reference_labels("train")
    return data.read("train")[1] if labels is None and isinstance(data, ReadsSplits) else labels


def _fresh(channels: int, size: int, num_classes: int, key: str) -> ConvClassifier:
    """A new network from a key, leaving the process's own random state alone."""
    with torch.random.fork_rng():
        torch.manual_seed(keyed_seed(key, "weights"))
        return ConvClassifier(channels, size, max(2, num_classes))


@torch.enable_grad()
def train_classifier(network: ConvClassifier, images: Any, labels: Tensor, key: str = MEASURING) -> None:
    """Trains a classifier in place, the same way each time.

    Args:
        network: The network, without dropout, since its draws would not be keyed.
        images: Array-like uint8 images (N, C, H, W).
        labels: Their classes, int64 (N,).
        key: Of the order of images.
    """
    count, batch = len(labels), min(BATCH_SIZE, len(labels))
    steps = max(1, min(IMAGES_SEEN, MOST_EPOCHS * count) // batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.2)
    generator = keyed_generator(key, "order")
    network.train().requires_grad_(True)
    order = torch.empty(0, dtype=torch.int64)
    for _ in tqdm(range(steps), desc="training a classifier to measure with", leave=False, delay=1):
        if len(order) < batch:
            order = torch.randperm(count, generator=generator)
        rows, order = order[:batch].sort().values, order[batch:]
        inputs = from_uint8(take(images, rows))
        loss = nn.functional.cross_entropy(network(inputs), labels[rows], label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    network.eval()
