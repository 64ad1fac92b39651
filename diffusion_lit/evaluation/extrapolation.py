"""The Fréchet distance of infinitely many samples, extrapolated.

At N samples the expected distance is a + b / N + ..., so a line through distances of random subsets against 1 / N has
the distance of infinitely many samples as its intercept. The reference stays as it is, with its own number's bias.

The trace of (S1 S2)^(1/2) is the sum of the singular values of X F / sqrt(N - 1), X being the centred features and F F'
= S2, taken from the smaller of its two Gram matrices.

Source: Chong and Forsyth 2020 (arXiv 1911.07023), section 3.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_lit.diffusion.rng import keyed_generator

POINTS = 15  # subsets, of sizes from a tenth of the samples to all
LEAST = 100  # minimum number of samples

Array = np.ndarray[Any, np.dtype[np.float64]]


class FrechetTo:
    """Fréchet distances of many sets to one reference.

    Args:
        mu: Mean (d,) of the reference.
        sigma: Covariance (d, d).
    """

    def __init__(self, mu: Array, sigma: Array) -> None:
        self.mu = torch.from_numpy(mu)
        values, vectors = torch.linalg.eigh(torch.from_numpy(sigma))
        self.factor = vectors * values.clamp(min=0).sqrt()
        self.trace = float(self.factor.square().sum())

    @classmethod
    def of(cls, features: Tensor) -> "FrechetTo":
        """The distances to a set of features (M, d), M at least 2."""
        y = features.double()
        if len(y) > y.shape[1]:
            return cls(y.mean(0).numpy(), y.T.cov().reshape(y.shape[1], -1).numpy())
        made = cls.__new__(cls)
        made.mu = y.mean(0)
        made.factor = (y - made.mu).T / (len(y) - 1) ** 0.5
        made.trace = float(made.factor.square().sum())
        return made

    def __call__(self, features: Tensor) -> float:
        """The distance of features (N, d), N at least 2."""
        x = features.double()
        mean = x.mean(0)
        x = (x - mean) / (len(x) - 1) ** 0.5
        product = x @ self.factor
        wide = product.shape[0] < product.shape[1]
        values = torch.linalg.eigvalsh(product @ product.T if wide else product.T @ product)
        values = torch.where(values > values.max() * len(values) * torch.finfo(values.dtype).eps, values, 0.0)
        spread = float(x.square().sum()) + self.trace - 2 * float(values.sqrt().sum())
        return float((mean - self.mu).square().sum()) + spread

    def infinity(self, features: Tensor) -> float:
        """The distance extrapolated to infinitely many samples.

        Args:
            features: Features (N, d), in the order of their draw.

        Returns:
            The intercept of the line, which may lie slightly below 0.
        """
        count = len(features)
        sizes = [max(2, count * (10 + 90 * point // (POINTS - 1)) // 100) for point in range(POINTS)]
        generator = keyed_generator("extrapolation")
        values = [self(features[torch.randperm(count, generator=generator)[:size]]) for size in sizes]
        return float(np.polyfit(1 / np.array(sizes), np.array(values), 1)[1])
