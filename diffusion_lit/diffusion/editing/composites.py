"""Images of several conditions at once: denoisers that combine the estimates of one denoiser, for any sampler.

    anagram   x0_hat = mean_v  v^-1 D(v x; sigma, label_v)                        over views v
    hybrid    x0_hat = B D(x; sigma, label_low) + (1 - B) D(x; sigma, label_high)   with a blur B

The same combinations hold for the noise estimates eps = (x - x0_hat) / sigma of the sources, since views and blur are
linear and the operations on x sum to the identity. A label is a row of conditions, shape (B, V).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from diffusion_lit.checks import check_count, check_number
from diffusion_lit.diffusion.denoiser import DenoiserLike
from diffusion_lit.diffusion.editing.common import check_seeds, device_of, labels_for, need_pixels, settings
from diffusion_lit.diffusion.editing.image_views import ImageView
from diffusion_lit.diffusion.generate import Sampling, StepCallback
from diffusion_lit.diffusion.models import PixelModel
from diffusion_lit.diffusion.rng import SeededNoise
from diffusion_lit.diffusion.wrappers import Conditioned, DenoiserWrapper, Evaluate


def _evaluate_each(
    evaluate: Evaluate, images: Sequence[Tensor], sigma: Tensor | float, label: Tensor | None
) -> list[list[Tensor]]:
    """Evaluates V batches of one size, each under its column of the labels (B, V), in one forward.

    Returns:
        For each of what `evaluate` gives, V tensors (B, C, H, W).
    """
    count = len(images)
    if label is not None and label.shape != (len(images[0]), count):
        raise ValueError(
            f"{count} conditions at once need labels of shape ({len(images[0])}, {count}), not {tuple(label.shape)}."
        )
    if isinstance(sigma, Tensor) and sigma.ndim:
        sigma = sigma.repeat(count)
    rows = torch.arange(len(images[0])).repeat(count)
    outputs = evaluate(torch.cat(list(images)), sigma, None if label is None else label.T.flatten(), rows)
    return [list(output.chunk(count)) for output in outputs]


class Anagram(DenoiserWrapper):
    """A denoiser whose estimate is the mean of those under several views, each with its own condition.

    A learned variance is averaged too, without the signs that a view may flip.

    Args:
        denoiser: Any denoiser; it is called with V times the batch and labels (V * B,).
        views: V orthogonal changes of an image.

    Raises:
        ValueError: If there is no view.

    Source: Visual Anagrams, arXiv 2311.17919, equation 4.
    """

    def __init__(self, denoiser: DenoiserLike, views: Sequence[ImageView]) -> None:
        super().__init__(denoiser)
        if not views:
            raise ValueError("An anagram needs at least one view; give two, such as identity and rotate_180.")
        self.views = list(views)

    def transform(
        self, evaluate: Evaluate, x: Tensor, sigma: Tensor | float, label: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Averages the estimates under the views, with one condition per view; see `DenoiserWrapper.transform`."""
        x0_hats, *rest = _evaluate_each(evaluate, [view.apply(x) for view in self.views], sigma, label)
        seen = [view.inverse(x0_hat) for view, x0_hat in zip(self.views, x0_hats, strict=True)]
        shares = [
            [view.inverse(v).abs() for view, v in zip(self.views, each, strict=True)] for each in rest
        ]  # v is in [0, 1]; where a view turns signs, a variance has none
        return (torch.stack(seen).mean(0), *(torch.stack(each).mean(0) for each in shares))


class Hybrid(DenoiserWrapper):
    """A denoiser with the low frequencies of one condition's estimate and the high frequencies of another's.

    Args:
        denoiser: Any denoiser; it is called with twice the batch and labels (2 * B,).
        blur_sigma: Standard deviation of the low-pass in pixels.
        kernel_size: Side of its kernel, odd; by default as far as 4 sigma.

    Raises:
        ValueError: If the blur is out of range.

    Source: Factorized Diffusion, arXiv 2404.11615, equations 4 to 6.
    """

    def __init__(self, denoiser: DenoiserLike, blur_sigma: float, kernel_size: int | None = None) -> None:
        super().__init__(denoiser)
        check_number(above=0, blur_sigma=blur_sigma)
        check_count(kernel_size=kernel_size)
        self.blur_sigma, self.kernel_size = blur_sigma, kernel_size

    def transform(
        self, evaluate: Evaluate, x: Tensor, sigma: Tensor | float, label: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Combines the estimates under the conditions (low, high); see `DenoiserWrapper.transform`.

        A learned variance is that of the high-frequency branch, since most of a step's noise is of high frequency.
        """
        (low, high), *rest = _evaluate_each(evaluate, [x, x], sigma, label)
        x0_hat = high + gaussian_blur(low - high, self.blur_sigma, self.kernel_size)
        return (x0_hat, *(each[1] for each in rest))


@torch.no_grad()
def _draw(
    model: PixelModel,
    composite: nn.Module,
    conditions: int,
    labels: Tensor | None,
    count: int,
    seeds: Sequence[int] | None,
    sampling: Sampling,
    callback: StepCallback | None,
) -> Tensor:
    """Draws images from a composite of the model's denoiser."""
    if labels is not None:
        if labels.shape != (count, conditions):
            raise ValueError(
                f"{count} images of {conditions} conditions need labels of shape ({count}, {conditions}), not "
                f"{tuple(labels.shape)}."
            )
        flat = labels_for(model, labels.flatten(), labels.numel())
        assert flat is not None
        labels = flat.reshape(labels.shape)
    noise = SeededNoise(check_seeds(seeds, count))
    start = sampling.start(model.denoiser.scaling, noise(torch.empty(count, *model.x_shape, device=device_of(model))))
    x = sampling.run(Conditioned(composite, labels), start, noise=noise, callback=callback)
    return sampling.finish(model.denoiser.scaling, x)


def anagram(
    model: PixelModel,
    views: Sequence[ImageView],
    labels: Tensor | None,
    *,
    seeds: Sequence[int] | None = None,
    sampling: Sampling | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Draws images that show something else under each view.

    Args:
        model: A model of pixels.
        views: V views, such as identity and a rotation.
        labels: What each image shows under each view, shape (B, V); or None for a model without classes, whose
            images then look right under each view.
        seeds: One seed per image, 0, 1, ... by default; without labels they say how many images.
        sampling: Sampler, grid and guidance; the model's own by default.
        callback: Called as `callback(step, x, x0_hat, sigma)` at each step.

    Returns:
        Images (B, C, H, W); view v of them is `views[v].apply`.

    Raises:
        ValueError: If the model denoises latents, or labels, seeds or views do not fit.

    Source: arXiv 2311.17919, equation 4.
    """
    need_pixels(model, "An anagram")
    for view in views:
        if view.image_shape != tuple(model.image_shape):
            raise ValueError(
                f"The view {view.name} was made for images {view.image_shape}, but the model's are "
                f"{tuple(model.image_shape)}; make it for these."
            )
    sampling = settings(model, sampling)
    composite = Anagram(sampling.guide(model.denoiser, labels is not None), views)
    count = _count(labels, seeds)
    return _draw(model, composite, len(views), labels, count, seeds, sampling, callback)


def hybrid(
    model: PixelModel,
    labels: Tensor,
    *,
    blur_sigma: float | None = None,
    kernel_size: int | None = None,
    seeds: Sequence[int] | None = None,
    sampling: Sampling | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Draws images that show one thing from afar and another from near.

    Args:
        model: A model of pixels.
        labels: Conditions (low, high) of each image, shape (B, 2): the first is seen from afar.
        blur_sigma: Standard deviation of the low-pass in pixels; by default a 32nd of the image's height.
        kernel_size: Side of its kernel, odd; by default as far as 4 sigma.
        seeds: One seed per image, 0, 1, ... by default.
        sampling: Sampler, grid and guidance; the model's own by default.
        callback: Called as `callback(step, x, x0_hat, sigma)` at each step.

    Returns:
        Images (B, C, H, W).

    Raises:
        ValueError: If the model denoises latents or has no classes, or labels, seeds or the blur do not fit.

    Source: arXiv 2404.11615, equations 4 to 6.
    """
    need_pixels(model, "A hybrid")
    sampling = settings(model, sampling)
    sigma = model.image_shape[1] / 32 if blur_sigma is None else blur_sigma
    composite = Hybrid(sampling.guide(model.denoiser, True), sigma, kernel_size)
    return _draw(model, composite, 2, labels, len(labels), seeds, sampling, callback)


def _count(labels: Tensor | None, seeds: Sequence[int] | None) -> int:
    if labels is not None:
        return len(labels)
    return 1 if seeds is None else len(seeds)


def gaussian_blur(images: Tensor, sigma: float, kernel_size: int | None = None) -> Tensor:
    """Blurs by a normalised Gaussian kernel, mirrored at the borders.

    Args:
        images: Shape (B, C, H, W).
        sigma: Standard deviation in pixels, above 0.
        kernel_size: Side of the kernel in pixels, odd; by default it reaches out to 4 sigma, or as far as the image
            allows.

    Returns:
        Shape (B, C, H, W).

    Raises:
        ValueError: If sigma or the kernel is out of range, or the kernel reaches further than the image.
    """
    check_number(above=0, sigma=sigma, hint=", in pixels")
    check_count(kernel_size=kernel_size)
    most = 2 * min(images.shape[-2:]) - 1
    size = min(2 * int(4 * sigma + 0.5) + 1, most) if kernel_size is None else kernel_size
    if size % 2 == 0 or size > most:
        raise ValueError(f"The blur's kernel_size is {size}; give an odd number from 1 to {most} for these images.")
    places = torch.arange(size, device=images.device, dtype=images.dtype) - size // 2
    kernel = (-places.square() / (2 * sigma**2)).exp()
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, size)
    half, groups = size // 2, images.shape[1]
    images = conv2d(pad(images, (half, half, 0, 0), "reflect"), kernel, groups=groups)
    return conv2d(pad(images, (0, 0, half, half), "reflect"), kernel.transpose(2, 3), groups=groups)
