"""Measures the samples of a study, with the code of `diffusion-lit evaluate`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from diffusion_lit.diffusion.images import from_uint8, take
from diffusion_lit.evaluation.choose import make_extractor
from diffusion_lit.evaluation.features import FeatureExtractor, Features, MissingWeights
from diffusion_lit.evaluation.generation import Samples
from diffusion_lit.evaluation.metrics import Reference, Statistics, frechet_distance
from diffusion_lit.evaluation.neighbours import PRECISION_NEIGHBOURS, neighbour_figures
from diffusion_lit.evaluation.reference import real_pairs, reference_of
from diffusion_lit.modules.data_classifier import training_labels
from diffusion_lit.words import counted

BATCH = 250  # images that are measured at a time
MOST_NEIGHBOURS = 5000  # the distances between all images of a large set would take minutes, for each figure


def first_images(data: Any, split: str, count: int) -> Tensor:
    """The first images of a split, at most `count` of them, (N, C, H, W) in [-1, 1]."""
    images = data.reference_images(split)
    return from_uint8(take(images, torch.arange(min(count, len(images)))))


def spread_images(data: Any, split: str = "train", count: int = 2000) -> Tensor:
    """At most `count` images of a split, evenly spread, uint8 (N, C, H, W)."""
    images = data.reference_images(split)
    count = min(count, len(images))
    return take(images, torch.arange(count) * len(images) // count)


class Thumbnails(FeatureExtractor):
    """Colours and layout alone: images shrunk to at most 8x8, for data without classes where Inception is missing."""

    name = "thumbnails"
    transform = "uint8 / 255, mean over the parts of an 8x8 grid, flattened"

    def compute(self, images: Tensor) -> Features:
        """At most C * 64 features."""
        side = min(8, images.shape[-1])
        return Features(adaptive_avg_pool2d(images.float() / 255, side).flatten(1))


class Evaluator:
    """Measures samples: a feature extractor and the reference images, from the cache or computed now.

    Args:
        data: The data set, set up.
        extractor: The loaded extractor.
        count: Number of samples.
        held_out: Most held-out images that the floor is taken of; `count` by default.

    Attributes:
        reference: Features of the training images.
        floor: The distance of real images to real ones, and at what number; None where there are too few.
    """

    def __init__(self, data: Any, extractor: FeatureExtractor, count: int, held_out: int | None = None) -> None:
        self.data, self.extractor = data, extractor
        self.reference = reference_of(data, "train", extractor, BATCH)
        _ = self.reference.statistics  # or refuses a single image, before the held-out ones are read
        some = len(data.reference_images("val")) > 0
        spare = reference_of(data, "val", extractor, BATCH, held_out or count).features if some else None
        pairs = real_pairs(self.reference, spare, count)
        self.floor: tuple[float, int] | None = None
        if pairs:
            drawn, rest = pairs[0]
            self.floor = self.between(drawn, rest), len(drawn)

    @property
    def metric(self) -> str:
        """Name of the Fréchet distance, such as `fd_classifier`."""
        return self.extractor.metric

    def measure(self, samples: "Samples | Features | Tensor") -> dict[str, float]:
        """Quality and variety of samples.

        Args:
            samples: From `Study.draw`, their features, or uint8 images (N, C, H, W).

        Returns:
            The Fréchet distance to the training images under the name of `metric`, and `precision` and `recall` among
            at most `MOST_NEIGHBOURS` of them, evenly spread.

        Raises:
            ValueError: If there are 3 samples or training images at the most.
        """
        if isinstance(samples, Tensor):
            samples = self.extractor.extract(samples, BATCH)
        features = samples.features if isinstance(samples, Samples) else samples
        assert self.reference.features is not None
        real = self.reference.features.features
        count = min(MOST_NEIGHBOURS, len(real))
        if min(len(features), count) <= PRECISION_NEIGHBOURS:
            raise ValueError(
                f"{counted(len(features), 'sample')} and {counted(count, 'training image')} are too few for precision "
                "and recall; raise --num_samples."
            )
        found = neighbour_figures(features.features, real[torch.arange(count) * len(real) // count])
        return {self.metric: self.distance(features), "precision": found["precision"], "recall": found["recall"]}

    def distance(self, samples: Features | Tensor) -> float:
        """The distance of samples, their features or uint8 images (N, C, H, W), to the training images."""
        features = self.extractor.extract(samples, BATCH) if isinstance(samples, Tensor) else samples
        return self.between(features, self.reference)

    def between(self, drawn: Features, real: Reference) -> float:
        """The Fréchet distance of samples to real images; a subclass may have another."""
        return frechet_distance(Statistics.of(drawn.features), real.statistics)

    def draw_floor(self, axes: Any) -> None:
        """Marks the distance of real images in a plot of the Fréchet distance."""
        if self.floor is not None:
            axes.axhline(self.floor[0], color="grey", linestyle="--", label=f"real against real, n = {self.floor[1]:,}")


def choose_extractor(data: Any, name: str, weights: str | None, tell: Callable[[str], object]) -> FeatureExtractor:
    """The extractor that was asked for, or one that fits the data where none was.

    Args:
        data: The data set, set up.
        name: As in `diffusion-lit evaluate`; auto is a classifier of the data set where it has classes, else that of
            `diffusion-lit evaluate`, and thumbnails where that cannot be had.
        weights: Local file of its weights, or None.
        tell: Called with a sentence where thumbnails stand in.

    Raises:
        MissingWeights: If the one that was asked for cannot be had.
    """
    chosen = "classifier" if name == "auto" and training_labels(data) is not None else name
    extractor = make_extractor(chosen, weights, data.image_shape)
    try:
        extractor.load(data)
    except MissingWeights as error:
        if chosen != "auto":
            raise
        tell(f"Measuring by thumbnails, since there is nothing better: {error}")
        return Thumbnails()
    return extractor
