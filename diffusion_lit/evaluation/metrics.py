"""Distances between distributions of features, by torch-fidelity's own functions, and figures of nearest neighbours.

Fréchet distance (Heusel 2017, arXiv 1706.08500): `|mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2))` of the Gaussians with
the features' means and covariances. Kernel distance (Bińkowski 2018, arXiv 1801.01401): the unbiased squared MMD under
the kernel `(x.y / d + 1)^3`, averaged over random subsets. Precision, recall, density and coverage: see `neighbours`.
MIND: see `monge`. Inception score (Salimans 2016, arXiv 1606.03498): `exp E KL(p(y|x) || p(y))`. All statistics are
taken in float64.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from diffusion_lit.evaluation.extrapolation import LEAST, FrechetTo
from diffusion_lit.evaluation.features import FeatureExtractor, Features
from diffusion_lit.evaluation.kernels import gaussian_mmd
from diffusion_lit.evaluation.monge import monge_distance
from diffusion_lit.evaluation.neighbours import neighbour_figures
from diffusion_lit.words import counted

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
ISC_SPLITS = 10
SUBSET_SEED = 2020  # torch-fidelity's own, for KID's subsets and the order of the Inception score's splits


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features.

    Args:
        mu: Float64 mean of shape (d,).
        sigma: Float64 unbiased covariance of shape (d, d).
    """

    mu: np.ndarray[Any, np.dtype[np.float64]]
    sigma: np.ndarray[Any, np.dtype[np.float64]]

    @staticmethod
    def of(features: Tensor) -> "Statistics":
        """Takes the statistics of features.

        Args:
            features: Features of shape (N, d), N at least 2.

        Returns:
            Their statistics.

        Raises:
            ValueError: If there are fewer than 2 or some are not finite.
        """
        if len(features) < 2:
            raise ValueError(f"A covariance needs at least 2 images, not {len(features)}; raise num_samples.")
        if not torch.isfinite(features).all():
            raise ValueError("Some features are not finite: the model or the extractor makes NaN; look at its images.")
        made = fid_features_to_statistics(features.double())
        return Statistics(made["mu"], np.atleast_2d(made["sigma"]))


@dataclass(frozen=True)
class Reference:
    """What generated images are compared with.

    Args:
        features: The features of real images, or None where only their statistics are known.
        known: Statistics that are not to be taken from the features, such as those of a file.
        labels: Classes int64 (N,) of the images, or None.
        record: All that determines it, for receipts.
    """

    features: Features | None
    known: Statistics | None = None
    labels: Tensor | None = None
    record: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def statistics(self) -> Statistics:
        """Mean and covariance of the features.

        Raises:
            ValueError: If there are fewer than 2 images.
        """
        if self.known is not None:
            return self.known
        if self.features is None:
            raise ValueError("Give the reference's features or its statistics.")
        if "split" in self.record:
            check_split(self.record["split"], len(self.features), least=2)
        return Statistics.of(self.features.features)

    @property
    def count(self) -> int | None:
        """Number of the images that the statistics are of; None where nobody says it."""
        return None if self.known is not None or self.features is None else len(self.features)


def check_split(split: str, count: int, least: int) -> None:
    """Refuses a split of too few images."""
    if count < least:
        raise ValueError(
            f"The split {split} has {counted(count, 'image')}, too few to compare with; take another split, or hold "
            "out more images."
        )


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """The Fréchet distance of two Gaussians.

    Args:
        first: One mean and covariance.
        second: The other.

    Returns:
        The squared distance, 0 for equal ones.

    Raises:
        ValueError: If they have different dimensions, or the distance is not finite.
    """
    if first.mu.shape != second.mu.shape:
        raise ValueError(
            f"Statistics of {first.mu.shape[0]} and {second.mu.shape[0]} features cannot be compared; both must come "
            "from the same extractor."
        )
    made = fid_statistics_to_metric(vars(first), vars(second), verbose=False)
    value = float(made["frechet_inception_distance"])
    return check_figures({"The Fréchet distance": value})["The Fréchet distance"]


def kernel_distance(generated: Tensor, reference: Tensor) -> float:
    """The kernel distance, averaged over subsets.

    Args:
        generated: Features (N, d).
        reference: Features (M, d).

    Returns:
        The squared MMD; values slightly below 0 are possible, since the estimate is unbiased.
    """
    made = kid_features_to_metric(
        generated.double(),
        reference.double(),
        kid_subsets=KID_SUBSETS,
        kid_subset_size=kid_subset_size(len(generated), len(reference)),
        rng_seed=SUBSET_SEED,
        verbose=False,
    )
    return float(made["kernel_inception_distance_mean"])


def kid_subset_size(generated: int, reference: int) -> int:
    """Size of the kernel distance's subsets: torch-fidelity's 1,000 where there are enough images.

    Args:
        generated: Number of generated images.
        reference: Number of reference images.

    Returns:
        The size.
    """
    return min(KID_SUBSET_SIZE, generated, reference)


def inception_score(logits: Tensor) -> float:
    """The Inception score, the mean over splits.

    Args:
        logits: Logits of shape (N, k).

    Returns:
        The score, between 1 and k.
    """
    splits = min(ISC_SPLITS, len(logits))
    return float(isc_features_to_metric(logits, splits, True, SUBSET_SEED)["inception_score_mean"])


def compute_metrics(extractor: FeatureExtractor, generated: Features, reference: Reference) -> dict[str, float]:
    """All figures of one set of generated images.

    Args:
        extractor: What made the features; its name goes into the figures' names.
        generated: Features of the generated images.
        reference: What they are compared with.

    Returns:
        Figures by name: the Fréchet distance, and as far as there is what they need its extrapolation to infinitely
        many samples, the kernel distance, precision, recall, density, coverage, MIND, the distance under a Gaussian
        kernel and the Inception score.

    Raises:
        ValueError: If neither the reference's features nor its statistics are given, or a figure is not finite.
    """
    name, real, statistics = extractor.name, reference.features, reference.statistics
    figures = {extractor.metric: frechet_distance(Statistics.of(generated.features), statistics)}
    if len(generated) >= LEAST:
        to_reference = FrechetTo(statistics.mu, statistics.sigma)
        figures[f"{extractor.metric}_infinity"] = to_reference.infinity(generated.features)
    if real is not None:
        figures[kernel_name(name)] = kernel_distance(generated.features, real.features)
        near = neighbour_figures(generated.features, real.features, real.radii)
        figures |= {f"{figure}_{name}": value for figure, value in near.items()}
        figures[f"mind_{name}"] = monge_distance(generated.features, real.features)
        if extractor.mmd_sigma is not None:
            figures[f"mmd_{name}"] = gaussian_mmd(generated.features, real.features, extractor.mmd_sigma)
    if generated.logits is not None:
        figures[f"isc_{name}"] = inception_score(generated.logits)
    return check_figures(figures)


def kernel_name(name: str) -> str:
    """Name of the kernel distance on an extractor's features: KID is Inception's alone."""
    return f"{'kid' if name == 'inception' else 'kd'}_{name}"


def check_figures(figures: dict[str, float]) -> dict[str, float]:
    """Refuses figures that are no numbers.

    Args:
        figures: Figures by name.

    Returns:
        The same.

    Raises:
        ValueError: If one is not finite.
    """
    for name, value in figures.items():
        if not math.isfinite(value):
            raise ValueError(
                f"{name} is {value}, which is no figure: the model's or the extractor's values are not finite, or too "
                "large for it; look at the samples, and take an earlier checkpoint if its weights are ruined."
            )
    return figures


def too_few(count: int, dimension: int) -> str | None:
    """The warning for too few images for a covariance.

    Args:
        count: Number of images.
        dimension: Number of features d.

    Returns:
        A warning, or None where there are more images than features.
    """
    if count > dimension:
        return None
    return (
        f"{counted(count, 'image')} against {dimension:,} features: the covariance has rank {count - 1:,} at the "
        "most, and the Fréchet distance is biased upwards by much; compare it only at the same number, and look at "
        "the kernel distance."
    )


def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation.

    Args:
        values: At least one.

    Returns:
        The mean, and the standard deviation or None for a single value.
    """
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def summarise(
    blocks: Sequence[dict[str, float]], errors: Mapping[str, float] | None = None
) -> dict[str, dict[str, Any]]:
    """Figures of several blocks as mean, standard deviation, minimum and the values themselves.

    Args:
        blocks: Figures by name, one dictionary per block.
        errors: How much a figure scatters over draws of both sides, by name.

    Returns:
        For each name `mean`, `std` (over the blocks; None for one), `error` (of a block, the reference's own scatter
        included; None where it is not known), `min` and `blocks`.
    """
    summary = {}
    for name in blocks[0]:
        values = [block[name] for block in blocks]
        mean, deviation = mean_and_deviation(values)
        error = (errors or {}).get(name)
        summary[name] = {"mean": mean, "std": deviation, "error": error, "min": min(values), "blocks": values}
    return summary
