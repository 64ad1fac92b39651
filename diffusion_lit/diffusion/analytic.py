"""Exact denoisers: distributions whose D(x; sigma) = E[x0 | x = x0 + sigma n] is known in closed form.

They replace a trained network in tests, studies and teaching. For a mixture of Gaussians of weights w_k, means m_k and
covariances C_k, with r_k the posterior probability of a component,

    D(x; s) = sum_k r_k(x; s) * (m_k + C_k (C_k + s² I)^-1 (x - m_k)),    r_k ~ w_k N(x; m_k, C_k + s² I).

One Gaussian is a mixture of one component, and a data set of N images is a mixture of N components of variance 0. In
all of them D(x; s) = x + s² grad log p(x; s), Tweedie's formula, by which a denoiser gives the score.
"""

import math

import torch
from torch import Tensor, nn

from diffusion_lit.words import counted


class GaussianMixtureDenoiser(nn.Module):
    """The exact denoiser of a Gaussian mixture; its classes are the components.

    Sums are computed in float64, results have x's dtype.

    Args:
        weights: The components' probabilities, up to a factor, shape (K,).
        means: The components' means, shape (K, *S) for images of shape S and D pixels.
        covariances: Per component a variance, shape (K,), one for each pixel, (K, D), or a matrix, (K, D, D).

    Raises:
        ValueError: If shapes do not fit, a weight is negative, or a covariance is not symmetric or has a negative
            variance.
    """

    weights: Tensor
    means: Tensor
    variances: Tensor
    axes: Tensor | None

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        super().__init__()
        self.image_shape = tuple(means.shape[1:])
        flat = means.to(torch.float64).flatten(1)
        count, size = flat.shape
        if weights.shape != (count,) or not bool((weights >= 0).all()) or not bool(weights.sum() > 0):
            raise ValueError(
                f"The weights {weights.tolist()} do not fit {count} means; give one number from 0 up for each."
            )
        variances, axes = _principal_axes(covariances.to(torch.float64), count, size)
        self.num_classes = count
        self.register_buffer("weights", weights.to(torch.float64) / weights.to(torch.float64).sum())
        self.register_buffer("means", flat)
        self.register_buffer("variances", variances)
        self.register_buffer("axes", axes)

    def forward(self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None) -> Tensor:
        """The posterior mean of the clean image.

        Args:
            x: Noisy images, shape (B, *S).
            sigma: The noise level, above 0, shape () or (B,).
            label: Component of each image, shape (B,), K for any; None is any for all.

        Returns:
            x0_hat of x's shape and dtype.

        Raises:
            ValueError: If a label is outside 0 to K.
        """
        centred, variance = self._centred(x)
        share = self._log_weights(centred, variance, sigma, label).softmax(1)
        shrunk = centred * (variance / (variance + _square(sigma, centred)))
        if self.axes is not None:
            shrunk = torch.einsum("bkd,ked->bke", shrunk, self.axes)
        x0_hat = torch.einsum("bk,bkd->bd", share, shrunk + self.means)
        return x0_hat.reshape(x.shape).to(x.dtype)

    def log_prob(self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None) -> Tensor:
        """The logarithm of the density of x0 + sigma n at x, in nats.

        Args:
            x: Where, shape (B, *S).
            sigma: The noise level, shape () or (B,); 0 is the density of the data, where all variances are above 0.
            label: As in `forward`.

        Returns:
            Shape (B,), float64.
        """
        return self._log_weights(*self._centred(x), sigma, label).logsumexp(1)

    def sample(self, num: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draws clean images.

        Args:
            num: How many.
            generator: What to draw with; None is torch's own generator.

        Returns:
            The images, shape (num, *S), float64, and their components, shape (num,).
        """
        label = torch.multinomial(self.weights, num, replacement=True, generator=generator)
        normal = torch.randn(
            num, self.means.shape[1], dtype=torch.float64, device=self.means.device, generator=generator
        )
        spread = normal * self.variances[label].sqrt()
        if self.axes is not None:
            spread = torch.einsum("bd,bed->be", spread, self.axes[label])
        return (self.means[label] + spread).reshape(num, *self.image_shape), label

    def _centred(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The image minus each mean along the principal axes, (B, K, D), and the variances along them, (1, K, D)."""
        centred = x.to(torch.float64).flatten(1)[:, None] - self.means
        if self.axes is not None:
            centred = torch.einsum("bkd,kde->bke", centred, self.axes)
        return centred, self.variances[None]

    def _log_weights(self, centred: Tensor, variance: Tensor, sigma: Tensor | float, label: Tensor | None) -> Tensor:
        """log(w_k N(x; m_k, C_k + sigma² I)), shape (B, K); -inf for components that a label rules out."""
        total = variance + _square(sigma, centred)
        log_normal = -0.5 * (centred.square() / total + total.log() + math.log(2 * math.pi)).sum(2)
        prior = self.weights.log().expand_as(log_normal)
        if label is not None:
            label = label.to(centred.device)
            components = torch.arange(self.num_classes, device=label.device)
            known = _check_labels(label, self.num_classes)[:, None] < self.num_classes
            prior = torch.where(known, torch.where(label[:, None] == components, 0.0, -math.inf), prior)
        return prior + log_normal


class GaussianDenoiser(GaussianMixtureDenoiser):
    """The exact denoiser of a Gaussian, D(x; s) = m + C (C + s² I)^-1 (x - m).

    Args:
        mean: The mean, shape S, of D pixels.
        covariance: A variance, shape (), one for each pixel, shape (D,), or a matrix, shape (D, D).

    Raises:
        ValueError: If shapes do not fit, or the covariance is not symmetric and positive semidefinite.
    """

    def __init__(self, mean: Tensor, covariance: Tensor | float) -> None:
        super().__init__(torch.ones(1), mean[None], torch.as_tensor(covariance)[None])
        self.num_classes = 0

    def forward(self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None) -> Tensor:
        """The posterior mean of the clean image; see `GaussianMixtureDenoiser.forward`.

        Args:
            x: Noisy images, shape (B, *S).
            sigma: The noise level, shape () or (B,).
            label: None; a Gaussian has no classes.

        Raises:
            ValueError: If there is a label.
        """
        if label is not None:
            raise ValueError("A Gaussian has no classes; leave the label out, or make a mixture.")
        return super().forward(x, sigma)

    def probability_flow(self, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """The exact solution of the probability-flow ODE dx/ds = (x - D(x; s)) / s.

        Along each principal axis of variance v the distance to the mean goes as sqrt(v + s²).

        Args:
            x: The state at sigma, shape (B, *S).
            sigma: The level to start from, 0 or more.
            sigma_next: The level to go to, 0 or more, on either side.

        Returns:
            The state at sigma_next, of x's shape and dtype.
        """
        centred, variance = self._centred(x)
        moved = centred * ((variance + sigma_next**2) / (variance + sigma**2)).sqrt()
        if self.axes is not None:
            moved = torch.einsum("bkd,ked->bke", moved, self.axes)
        return (moved + self.means)[:, 0].reshape(x.shape).to(x.dtype)


class EmpiricalDenoiser(nn.Module):
    """The exact denoiser of a data set, which a network approaches as it memorises its training set.

    D(x; s) is the mean of the images y, weighted by exp(-|x - y|² / 2s²). The data set and all sums are in float64;
    results have x's dtype.

    Args:
        images: The data set, shape (N, *S).
        labels: Class of each image, shape (N,), or None.

    Raises:
        ValueError: If there is no image, or labels do not fit.

    Source: arXiv 2206.00364, appendix B.3, eq. 57.
    """

    images: Tensor
    labels: Tensor | None

    def __init__(self, images: Tensor, labels: Tensor | None = None) -> None:
        super().__init__()
        if len(images) == 0:
            raise ValueError("The data set holds no image; give at least one.")
        if labels is not None and (labels.shape != images.shape[:1] or bool((labels < 0).any())):
            raise ValueError(
                f"Labels of shape {tuple(labels.shape)} do not fit {counted(len(images), 'image')}; give one from 0 "
                "up each."
            )
        self.num_classes = 0 if labels is None else int(labels.max()) + 1
        self.register_buffer("images", images.to(torch.float64).flatten(1))
        self.register_buffer("labels", labels)

    def forward(self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None) -> Tensor:
        """The weighted mean of the data.

        Args:
            x: Noisy images, shape (B, *S).
            sigma: The noise level, above 0, shape () or (B,).
            label: Class of each image, shape (B,), num_classes for any; None is any for all.

        Returns:
            x0_hat of x's shape and dtype.

        Raises:
            ValueError: If the data has no labels or none of that class.
        """
        flat = x.to(torch.float64).flatten(1)
        logits = flat @ self.images.T - 0.5 * self.images.square().sum(1)
        logits = logits / _square(sigma, flat)
        if label is not None:
            if self.labels is None:
                raise ValueError("The data set has no labels; leave the label out, or make the denoiser with labels.")
            label = label.to(flat.device)
            other = (_check_labels(label, self.num_classes)[:, None] != self.labels) & (label < self.num_classes)[
                :, None
            ]
            if bool(other.all(1).any()):
                raise ValueError(f"A label of {label.tolist()} has no image in the data set; give a class that has.")
            logits = logits.masked_fill(other, -math.inf)
        return (logits.softmax(1) @ self.images).reshape(x.shape).to(x.dtype)


def _square(sigma: Tensor | float, like: Tensor) -> Tensor:
    """sigma² in float64, shaped to broadcast with a batch of like's number of dimensions."""
    square = torch.as_tensor(sigma, dtype=torch.float64, device=like.device) ** 2
    return square.reshape(-1, *[1] * (like.ndim - 1))


def _check_labels(label: Tensor, num_classes: int) -> Tensor:
    """The labels, refused outside 0 to num_classes, which stands for any class."""
    if bool(((label < 0) | (label > num_classes)).any()):
        raise ValueError(f"A label of {label.tolist()} is outside 0 to {num_classes}, which stands for any class.")
    return label


def _principal_axes(covariances: Tensor, count: int, size: int) -> tuple[Tensor, Tensor | None]:
    """Variances along the principal axes, (K, D), and the axes as columns, (K, D, D); None: they are the pixels."""
    if covariances.shape not in ((count,), (count, size), (count, size, size)):
        raise ValueError(
            f"Covariances of shape {tuple(covariances.shape)} do not fit {count} means of {size} pixels; "
            f"give shape ({count},), ({count}, {size}) or ({count}, {size}, {size})."
        )
    axes = None
    if covariances.ndim == 3:
        if not torch.allclose(covariances, covariances.mT):
            raise ValueError("A covariance matrix is not symmetric; give C = A A^T.")
        variances, axes = torch.linalg.eigh(covariances)
        variances = torch.where(variances.abs() < 1e-12 * variances.amax(1, keepdim=True), 0.0, variances)
    else:
        variances = covariances.reshape(count, -1).expand(count, size).clone()
    if not bool((variances >= 0).all()):
        raise ValueError("A covariance has a negative variance; give variances from 0 up, or a matrix C = A A^T.")
    return variances, axes
