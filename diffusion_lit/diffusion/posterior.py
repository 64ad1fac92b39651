"""Posterior sampling: a denoiser of x0 becomes one of x0 given a noisy linear measurement y = A x0 + sigma_y n.

By Tweedie's formula for both distributions, with J = dD/dx and r = y - A D(x; sigma),

    E[x0 | x, y] = D(x; sigma) + sigma^2 grad_x log p(y | x),    grad_x log p(y | x) = J^T A^T u,

and u = (A V A^T + sigma_y^2 I)^-1 r where x0 given x is Gaussian with mean D and covariance V. The methods differ in V:

    DPS      V = 0, and sigma_y^2 replaced by sigma_y times the root mean square of r
    PiGDM    V = s^2 I,  s^2 = sigma^2 sd^2 / (sigma^2 + sd^2)
    MMPS     V = sigma^2 J^T, the covariance itself

So for Gaussian data MMPS is exact, PiGDM where all variances are sd^2, and DPS where V is small beside sigma_y^2.
J^T and A^T are vector-Jacobian products, and systems are solved by conjugate gradients for each sample apart, so that
any denoiser and any linear function A serve. Each evaluation costs one backward pass of the network (DPS, PiGDM), or
one more than its iterations (MMPS).

Source: Chung et al. 2023 (arXiv 2209.14687); Song et al. 2023 (openreview 9_gsMA8MRKQ); Rozet et al. 2024 (arXiv
2405.13712).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_lit.checks import check_count, check_number
from diffusion_lit.diffusion.conversions import widen
from diffusion_lit.diffusion.denoiser import DenoiserLike, per_sample
from diffusion_lit.diffusion.wrappers import DenoiserWrapper, Evaluate

Linear = Callable[[Tensor], Tensor]
"""A linear function of images (B, C, H, W), row by row: what is measured."""


def conjugate_gradients(product: Linear, right: Tensor, iterations: int, tolerance: float = 1e-6) -> Tensor:
    """Solves a symmetric positive definite system for each sample apart.

    A sample whose residual has fallen to the tolerance, or along whose direction the matrix is not positive, keeps what
    it has.

    Args:
        product: Multiplies (B, ...) by the matrix, row by row.
        right: The right-hand side, shape (B, ...).
        iterations: Most products, 1 or more.
        tolerance: Norm of a residual, relative to the right-hand side's, from which on it counts as solved.

    Returns:
        The solution, of `right`'s shape; after n iterations exact for a matrix of n distinct eigenvalues.

    Source: Hestenes and Stiefel 1952.
    """
    solution, residual, direction = torch.zeros_like(right), right, right
    square = _dot(right, right)
    enough = tolerance**2 * square
    for _ in range(iterations):
        along = product(direction)
        curvature = _dot(direction, along)
        moves = (square > enough) & (curvature > 0)
        step = torch.where(moves, square / torch.where(moves, curvature, 1.0), 0.0)
        solution = solution + step * direction
        residual = residual - step * along
        last, square = square, torch.where(moves, _dot(residual, residual), square)
        direction = torch.where(moves, residual + square / torch.where(moves, last, 1.0) * direction, direction)
    return solution


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The scalar product of each sample, shaped to broadcast."""
    return per_sample((a * b).flatten(1).sum(1), a)


class PosteriorDenoiser(DenoiserWrapper):
    """Base class: a denoiser of x0 given a measurement. A subclass says `solve`.

    Args:
        denoiser: Any denoiser, through which gradients flow.
        measure: A: images (B, C, H, W) to measurements (B, ...), linear, each row of its own image.
        y: The measurements, of the shape that `measure` gives.
        sigma_y: Standard deviation of their noise, positive, in the images' units.

    Raises:
        ValueError: If `sigma_y` is not positive.
    """

    y: Tensor

    def __init__(self, denoiser: DenoiserLike, measure: Linear, y: Tensor, sigma_y: float) -> None:
        super().__init__(denoiser)
        check_number(above=0, sigma_y=sigma_y, hint="; 0.01 stands for almost none, images being in [-1, 1]")
        self.measure, self.sigma_y = measure, sigma_y
        self.register_buffer("y", y, persistent=False)

    def solve(self, residual: Tensor, x0_hat: Tensor, level: Tensor, back: Linear) -> Tensor:
        """The residual, divided by the covariance that it is expected to have.

        Args:
            residual: r = y - A D(x; sigma), shape (B, ...).
            x0_hat: D(x; sigma), shape (B, C, H, W).
            level: sigma, shape (B, 1, 1, 1).
            back: v -> J^T A^T v, from measurements to images.

        Returns:
            u, of the residual's shape.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it weighs a residual.")

    def weighed(self, residual: Tensor, covariance: Linear, iterations: int) -> Tensor:
        """A residual weighed by (A V A^T + sigma_y^2 I)^-1, by conjugate gradients.

        Args:
            residual: r, shape (B, ...).
            covariance: v -> V A^T v, from measurements to images.
            iterations: Most products.

        Returns:
            u, of the residual's shape.
        """

        def product(v: Tensor) -> Tensor:
            return self.measure(covariance(v)).detach() + self.sigma_y**2 * v

        return conjugate_gradients(product, residual, iterations)

    def transform(
        self, evaluate: Evaluate, x: Tensor, sigma: Tensor | float, label: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Evaluates and moves x0_hat towards the measurement; see `DenoiserWrapper.transform`."""
        # Samplers run without gradients, even in inference mode, whose tensors must be copied to take part.
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            label = None if label is None else label.clone()
            outputs = evaluate(x, sigma.clone() if isinstance(sigma, Tensor) else sigma, label)
            measured = self.measure(outputs[0])

            def back(v: Tensor) -> Tensor:
                return torch.autograd.grad(measured, x, v, retain_graph=True)[0]

            x0_hat, *rest = (output.detach() for output in outputs)
            residual = self._given(measured) - measured.detach()
            level = per_sample(widen(sigma).to(x0_hat), x0_hat)
            pull = back(self.solve(residual, x0_hat, level, back))
        return (x0_hat + level.square() * pull.to(x0_hat), *rest)

    def _given(self, measured: Tensor) -> Tensor:
        """The measurements, in the precision of the model's own."""
        if self.y.shape != measured.shape:
            raise ValueError(
                f"The measurements have shape {tuple(self.y.shape)} and those of the model's images "
                f"{tuple(measured.shape)}; give one for each image."
            )
        return self.y.to(measured, copy=True)


class DPS(PosteriorDenoiser):
    """Diffusion posterior sampling: as if x0 were x0_hat.

    The source's algorithm moves the state against the gradient of |r| in each of 1,000 steps, by a tuned length. Here
    the estimate moves by that gradient, for any number of steps, by the length that agrees with the likelihood of its
    equation 16 once the residual is as large as the noise: the variance is sigma_y * rms(r). While the residual is
    larger the move is shorter, without which high noise levels overshoot.

    Args:
        denoiser: As for `PosteriorDenoiser`.
        measure: As for `PosteriorDenoiser`.
        y: As for `PosteriorDenoiser`.
        sigma_y: As for `PosteriorDenoiser`.
        scale: The source's zeta, a factor on the move, 0 or more.
        normalised: Whether the gradient is that of |r|, as in its algorithm 1; otherwise that of |r|^2, as in its
            equation 16.

    Raises:
        ValueError: If `sigma_y` is not positive or `scale` negative.

    Source: Chung et al. 2023 (arXiv 2209.14687), theorem 1, equation 16 and algorithm 1.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        measure: Linear,
        y: Tensor,
        sigma_y: float,
        scale: float = 1.0,
        normalised: bool = True,
    ) -> None:
        super().__init__(denoiser, measure, y, sigma_y)
        check_number(least=0, scale=scale, hint="; 1 is the usual one")
        self.scale, self.normalised = scale, normalised

    def solve(self, residual: Tensor, x0_hat: Tensor, level: Tensor, back: Linear) -> Tensor:
        """See `PosteriorDenoiser.solve`."""
        variance: Tensor | float = self.sigma_y**2
        if self.normalised:
            spread = residual.flatten(1).square().mean(1).sqrt().clamp(min=1e-6 * self.sigma_y)
            variance = self.sigma_y * per_sample(spread, residual)
        return self.scale * residual / variance


class PiGDM(PosteriorDenoiser):
    """Pseudoinverse-guided diffusion: x0 given x is Gaussian with one variance, that of data of variance sd^2.

    Args:
        denoiser: As for `PosteriorDenoiser`.
        measure: As for `PosteriorDenoiser`.
        y: As for `PosteriorDenoiser`.
        sigma_y: As for `PosteriorDenoiser`.
        sigma_data: Standard deviation sd of a pixel of the data, positive; 1 in the source.
        iterations: Most products with A A^T of the solver, which ask no network.

    Raises:
        ValueError: If `sigma_y` or `sigma_data` is not positive, or there is no iteration.

    Source: Song et al. 2023 (openreview 9_gsMA8MRKQ), section 3; its variance is that of sd = 1.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        measure: Linear,
        y: Tensor,
        sigma_y: float,
        sigma_data: float = 1.0,
        iterations: int = 50,
    ) -> None:
        super().__init__(denoiser, measure, y, sigma_y)
        check_number(above=0, sigma_data=sigma_data, hint="; 0.5 is the usual one of images in [-1, 1]")
        check_count(iterations=iterations)
        self.sigma_data, self.iterations = sigma_data, iterations

    def solve(self, residual: Tensor, x0_hat: Tensor, level: Tensor, back: Linear) -> Tensor:
        """See `PosteriorDenoiser.solve`."""
        variance = level.square() * self.sigma_data**2 / (level.square() + self.sigma_data**2)
        inputs = x0_hat.clone().requires_grad_()
        outputs = self.measure(inputs)

        def covariance(v: Tensor) -> Tensor:
            return variance * torch.autograd.grad(outputs, inputs, v, retain_graph=True)[0]

        return self.weighed(residual, covariance, self.iterations)


class MMPS(PosteriorDenoiser):
    """Moment-matching posterior sampling: x0 given x is Gaussian with its own covariance, sigma^2 J.

    Args:
        denoiser: As for `PosteriorDenoiser`.
        measure: As for `PosteriorDenoiser`.
        y: As for `PosteriorDenoiser`.
        sigma_y: As for `PosteriorDenoiser`.
        iterations: Products with the covariance, each a backward pass of the network; the more, the nearer to exact
            where the network's Jacobian is a covariance; a trained one is only nearly so, and 3 did better than 5.

    Raises:
        ValueError: If `sigma_y` is not positive, or there is no iteration.

    Source: Rozet et al. 2024 (arXiv 2405.13712), section 4.
    """

    def __init__(self, denoiser: DenoiserLike, measure: Linear, y: Tensor, sigma_y: float, iterations: int = 3) -> None:
        super().__init__(denoiser, measure, y, sigma_y)
        check_count(iterations=iterations, hint="; 1 to 5 are the usual ones")
        self.iterations = iterations

    def solve(self, residual: Tensor, x0_hat: Tensor, level: Tensor, back: Linear) -> Tensor:
        """See `PosteriorDenoiser.solve`."""
        return self.weighed(residual, lambda v: level.square() * back(v), self.iterations)


POSTERIORS: dict[str, type[PosteriorDenoiser]] = {"dps": DPS, "pigdm": PiGDM, "mmps": MMPS}
"""The methods by name."""
