"""Wrappers of a denoiser that are denoisers: what they share, bound labels, and clipped estimates.

A wrapper changes x0_hat and nothing else, so that samplers never see what wraps. Guidance, in its own file, is one.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffusion_lit.checks import check_number
from diffusion_lit.diffusion.denoiser import DenoiserLike, estimate_of_move, move, per_sample
from diffusion_lit.diffusion.preconditioning import Preconditioning
from diffusion_lit.diffusion.rng import send


class Evaluate:
    """One evaluation of a denoiser under conditions that wrappers pass on: (x, sigma, label) -> (x0_hat,).

    With `until` x0_hat is the estimate averaged over the way to that noise level (`Denoiser.average`), so that what a
    wrapper does to estimates it does to the map as well.

    Args:
        denoiser: Called with the label and `until` only where there is one, so that any `denoise(x, sigma)` fits.
        until: A second noise level, shape () or (B,), for denoisers that take it.
    """

    def __init__(self, denoiser: DenoiserLike, until: Tensor | float | None = None) -> None:
        self.denoiser, self.until = denoiser, until

    def __call__(
        self, x: Tensor, sigma: Tensor | float, label: Tensor | None, rows: Tensor | None = None, **told: Tensor
    ) -> tuple[Tensor, ...]:
        """Evaluates.

        Args:
            x: Shape (N, C, H, W).
            sigma: Shape () or (N,).
            label: Shape (N,), or none.
            rows: The sample of the batch, shape (N,), that each of x belongs to, where they are not the batch itself.
            told: Further inputs of the denoiser by its keywords, a row for each of x.

        Returns:
            (x0_hat,) or (x0_hat, v).
        """
        given: tuple[Tensor, ...] = () if label is None else (label,)
        if self.until is None:
            return (self.denoiser(x, sigma, *given, **told),)
        until = self.until if rows is None else at_rows(self.until, rows)
        moved = self.denoiser(x, sigma, *given, **told, until=until)
        return (estimate_of_move(x, moved, sigma, until),)

    def of(self, denoiser: DenoiserLike) -> "Evaluate":
        """Another denoiser under the same conditions."""
        return Evaluate(denoiser, self.until)


class _EvaluateVariance(Evaluate):
    """One evaluation of `LearnedVarianceDenoiser.learned_variance`: (x, sigma, label) -> (x0_hat, v)."""

    def __init__(
        self, denoiser: DenoiserLike, learned_variance: Callable[..., tuple[Tensor, ...]], sigma_next: Tensor | float
    ) -> None:
        super().__init__(denoiser)
        self.learned_variance, self.sigma_next = learned_variance, sigma_next

    def __call__(
        self, x: Tensor, sigma: Tensor | float, label: Tensor | None, rows: Tensor | None = None, **told: Tensor
    ) -> tuple[Tensor, ...]:
        """Evaluates; see `Evaluate.__call__`."""
        return self.learned_variance(x, sigma, self.sigma_next, *(() if label is None else (label,)), **told)


def at_rows(value: Tensor | float, rows: Tensor) -> Tensor | float:
    """A value per sample at the given samples; one for all is itself."""
    return value[send(rows, value.device)] if isinstance(value, Tensor) and value.ndim else value


class DenoiserWrapper(nn.Module):
    """Base class of denoiser wrappers.

    A subclass defines `transform`, which wraps the plain estimate and, where the wrapped denoiser has it,
    `learned_variance`.

    Args:
        denoiser: Any callable (x, sigma, label) -> x0_hat.
    """

    def __init__(self, denoiser: DenoiserLike) -> None:
        super().__init__()
        self.denoiser = denoiser

    @property
    def scaling(self) -> Preconditioning:
        """The prediction type of the wrapped denoiser."""
        scaling: Preconditioning = self.denoiser.scaling  # type: ignore[attr-defined]
        return scaling

    @property
    def num_classes(self) -> int:
        """The number of classes of the wrapped denoiser, 0 where it does not say."""
        return int(getattr(self.denoiser, "num_classes", 0))

    @property
    def takes_until(self) -> bool:
        """Whether the wrapped denoiser takes a second noise level."""
        return bool(getattr(self.denoiser, "takes_until", False))

    def transform(
        self, evaluate: Evaluate, x: Tensor, sigma: Tensor | float, label: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Evaluates and changes what comes back.

        Args:
            evaluate: The wrapped denoiser.
            x: Shape (B, C, H, W).
            sigma: Shape () or (B,).
            label: Shape (B,), or none.

        Returns:
            (x0_hat,) or (x0_hat, v), as `evaluate` gave.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it does to a denoiser.")

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        label: Tensor | None = None,
        *,
        until: Tensor | float | None = None,
    ) -> Tensor:
        """Estimates the clean image, or takes x to another noise level.

        Args:
            x: Noisy image x0 + sigma n, shape (B, C, H, W).
            sigma: Noise level, shape () or (B,).
            label: Class indices, shape (B,), or none.
            until: A second noise level, shape () or (B,), for denoisers that take it; see `Denoiser.forward`.

        Returns:
            x0_hat, or with `until` the state at that level, shape (B, C, H, W).
        """
        x0_hat = self.transform(Evaluate(self.denoiser, until), x, sigma, label)[0]
        return x0_hat if until is None else move(x, x0_hat, sigma, until)

    def unclipped(self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Estimates the clean image, after and before the threshold of `ClipX0`.

        Args:
            x: As for `forward`.
            sigma: As for `forward`.
            label: As for `forward`.

        Returns:
            x0_hat with and without the threshold, both (B, C, H, W). If another wrapper surrounds `ClipX0`, both are
            equal.
        """
        x0_hat = self.forward(x, sigma, label)
        return x0_hat, x0_hat

    @property
    def learned_variance(self) -> Callable[..., tuple[Tensor, ...]]:
        """The wrapped `LearnedVarianceDenoiser.learned_variance`, with what this wrapper does to x0_hat."""
        inner: Callable[..., tuple[Tensor, ...]] = self.denoiser.learned_variance  # type: ignore[attr-defined]

        def learned_variance(
            x: Tensor, sigma: Tensor | float, sigma_next: Tensor | float, label: Tensor | None = None
        ) -> tuple[Tensor, ...]:
            return self.transform(_EvaluateVariance(self.denoiser, inner, sigma_next), x, sigma, label)

        return learned_variance


class Conditioned(DenoiserWrapper):
    """A denoiser with its labels bound: the `denoise(x, sigma)` that samplers take.

    Args:
        denoiser: Any denoiser.
        label: Class indices, shape (B,), in the order of the batch that will be sampled; none for unconditional
            sampling.
    """

    label: Tensor | None

    def __init__(self, denoiser: DenoiserLike, label: Tensor | None = None) -> None:
        super().__init__(denoiser)
        self.register_buffer("label", label, persistent=False)

    def transform(
        self, evaluate: Evaluate, x: Tensor, sigma: Tensor | float, label: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Evaluates at the bound labels; see `DenoiserWrapper.transform`."""
        if label is not None:
            raise ValueError("A label was given to a denoiser whose labels are bound already; leave it out.")
        return evaluate(x, sigma, self.label)

    def unclipped(self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the wrapped denoiser says at the bound labels; see `DenoiserWrapper.unclipped`."""
        if not isinstance(self.denoiser, DenoiserWrapper):
            return super().unclipped(x, sigma, label)
        return self.denoiser.unclipped(x, sigma, self.label)


class ClipX0(DenoiserWrapper):
    """A denoiser whose estimates stay in the range of images.

    Static: x0_hat is clamped to [-limit, limit]. Dynamic: with s the given percentile of |x0_hat| in each sample, at
    least `limit` and at most `ceiling`, x0_hat is clamped to [-s, s] and multiplied by limit / s, which saturates less
    under strong guidance.

    Args:
        denoiser: Any denoiser.
        dynamic: Whether the threshold follows each sample.
        percentile: Share of the pixels, in (0, 1], that a dynamic threshold leaves alone.
        limit: Largest magnitude of an image, positive.
        ceiling: Largest dynamic threshold s, at least `limit`.

    Raises:
        ValueError: If `percentile`, `limit` or `ceiling` is out of range.

    Source: Saharia et al. 2022 (arXiv 2205.11487), section 2.3 and appendix A.2.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        dynamic: bool = False,
        percentile: float = 0.995,
        limit: float = 1.0,
        ceiling: float = math.inf,
    ) -> None:
        super().__init__(denoiser)
        check_number(above=0, most=1, percentile=percentile, hint="; 0.995 is the usual one")
        check_number(above=0, limit=limit, hint="; it is 1 for images in [-1, 1]")
        check_number(least=limit, infinite=True, ceiling=ceiling, hint=", the limit being the least")
        self.dynamic, self.percentile, self.limit, self.ceiling = dynamic, percentile, limit, ceiling

    def transform(
        self, evaluate: Evaluate, x: Tensor, sigma: Tensor | float, label: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Evaluates and clips x0_hat; see `DenoiserWrapper.transform`."""
        x0_hat, *rest = evaluate(x, sigma, label)
        return (self.clip(x0_hat), *rest)

    def unclipped(self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `DenoiserWrapper.unclipped`."""
        (x0_hat,) = Evaluate(self.denoiser)(x, sigma, label)
        return self.clip(x0_hat), x0_hat

    def clip(self, x0_hat: Tensor) -> Tensor:
        """Clips estimates.

        Args:
            x0_hat: Shape (B, C, H, W).

        Returns:
            Of the same shape, in [-limit, limit].
        """
        if not self.dynamic:
            return x0_hat.clamp(-self.limit, self.limit)
        # One row at a time: torch.quantile refuses more than 2^24 values.
        extents = [torch.quantile(row.abs().flatten(), self.percentile) for row in x0_hat]
        extent = per_sample(torch.stack(extents).clamp(self.limit, self.ceiling), x0_hat)
        return x0_hat.clamp(-extent, extent) * (self.limit / extent)
