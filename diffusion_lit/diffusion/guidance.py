"""Guidance: wrappers that push a denoiser's estimate away from a worse one, or towards a class or an image.

    classifier-free   D = D(x; sigma, null) + cfg_scale (D(x; sigma, label) - D(x; sigma, null))
    autoguidance      D = D_guide(x; sigma, label) + scale (D(x; sigma, label) - D_guide(x; sigma, label))
    classifier        D = D(x; sigma) + scale sigma^2 grad_x log p(label | x)

In the first two, scale 1 is the plain conditional model and 0 the other branch, and only that branch is evaluated.
Guidance acts on x0_hat; every prediction is linear in x0_hat at a given x, so it is the same for all types. Outside a
guidance interval (low, high] of sigma the plain conditional model is used, at its cost.

Source of the interval: Kynkäänniemi et al. 2024 (arXiv 2404.07724).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusion_lit.checks import check_numbers, check_share
from diffusion_lit.diffusion.conversions import SAME, widen
from diffusion_lit.diffusion.denoiser import Denoiser, DenoiserLike, per_sample
from diffusion_lit.diffusion.rng import send
from diffusion_lit.diffusion.wrappers import DenoiserWrapper, Evaluate, at_rows
from diffusion_lit.words import counted

Interval = tuple[float, float]


def _check_interval(interval: Interval | None) -> None:
    check_numbers("The guidance interval", interval, infinite=True)
    if interval is not None and not 0 <= interval[0] <= interval[1]:
        raise ValueError(
            f"The guidance interval is {interval}, but must be (low, high) with 0 <= low <= high, in sigma."
        )


def _check_scale(name: str, scale: float | Tensor) -> Tensor:
    """One scale or several as a tensor, all finite."""
    scales = torch.as_tensor(scale)
    check_numbers(name, scales.flatten().tolist(), empty=False)
    return scales


def _scales(
    scale: float | Tensor, sigma: Tensor | float, interval: Interval | None, x: Tensor, neutral: float
) -> Tensor:
    """The scale of each sample, shape (B,), neutral where sigma is outside the interval.

    It stays on the CPU, where branches are chosen, so that no accelerator has to be waited for unless there is an
    interval.
    """
    scales = torch.as_tensor(scale, dtype=torch.float64, device="cpu")
    if scales.shape not in ((), (len(x),)):
        raise ValueError(
            f"The guidance scale has shape {tuple(scales.shape)} for {counted(len(x), 'image')}; give one number or "
            "one each."
        )
    scales = scales.expand(len(x))
    if interval is None:
        return scales
    levels = widen(sigma).cpu()
    low, high = (end * (1 + SAME) for end in interval)  # a level within rounding of an end counts as that end
    return torch.where((levels > low) & (levels <= high), scales, neutral)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Selects rows; returns the tensor itself if all are selected in order (a copy would lose the memory format)."""
    return x if len(rows) == len(x) else x[send(rows, x.device)]


def _put(share: Tensor, rows: Tensor, count: int) -> Tensor:
    """The rows in their places among `count`, zeros in the others."""
    if len(rows) == count:
        return share
    return share.new_zeros(count, *share.shape[1:]).index_copy(0, send(rows, share.device), share)


def _rescaled(guided: Tensor, conditional: Tensor, rescale: float) -> Tensor:
    """The guided estimate with its standard deviation moved towards the conditional one's."""
    if rescale == 0:
        return guided
    ratio = conditional.flatten(1).std(1) / guided.flatten(1).std(1)
    return guided * per_sample(rescale * ratio + (1 - rescale), guided)


class ClassifierFreeGuidance(DenoiserWrapper):
    """Classifier-free guidance in one batched forward.

    Samples whose scale is 1, or whose sigma is outside the interval, are evaluated with their label only, those whose
    scale is 0 without it only. Without labels it is the plain denoiser.

    Args:
        denoiser: A class-conditional denoiser with the attribute `num_classes`.
        cfg_scale: One number, or a tensor: one for each sample of the batch, shape (B,), or with `per_class` one for
            each class, shape (num_classes,).
        interval: (low, high] of sigma where guidance acts; none means everywhere.
        rescale: Share in [0, 1] by which the standard deviation of each guided x0_hat is drawn to that of the
            conditional one, against over-exposure. The source rescales the network's output; x0_hat makes it the same
            for every prediction type.
        per_class: Whether `cfg_scale` is looked up by the label; the null class is not guided.

    Raises:
        ValueError: If an argument is out of range, or the denoiser is unconditional and the scale not 1.

    Source: Ho and Salimans 2022 (arXiv 2207.12598), equation 6 with cfg_scale = w + 1; rescaling: Lin et al. 2023
    (arXiv 2305.08891), equations 15 and 16.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        cfg_scale: float | Tensor = 1.0,
        interval: Interval | None = None,
        rescale: float = 0.0,
        per_class: bool = False,
    ) -> None:
        super().__init__(denoiser)
        _check_interval(interval)
        check_share(rescale=rescale, hint="; 0.7 is the usual one, 0 is off")
        scales = _check_scale("cfg_scale", cfg_scale)
        if self.num_classes == 0 and not bool((scales == 1).all()):
            raise ValueError("An unconditional model has no classes to guide by; leave cfg_scale at 1.")
        if per_class and scales.shape != (self.num_classes,):
            raise ValueError(
                f"A scale per class needs {self.num_classes} numbers, one per class, not shape {tuple(scales.shape)}."
            )
        self.cfg_scale, self.interval, self.rescale, self.per_class = cfg_scale, interval, rescale, per_class

    def _scale_of(self, label: Tensor) -> float | Tensor:
        """The scale of each label where there is one per class."""
        if not self.per_class:
            return self.cfg_scale
        table = torch.as_tensor(self.cfg_scale, device=label.device)
        return torch.cat([table, table.new_ones(1)])[label]

    def transform(
        self, evaluate: Evaluate, x: Tensor, sigma: Tensor | float, label: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Evaluates the branches that matter and combines them; see `DenoiserWrapper.transform`.

        A learned variance comes from the conditional branch, if that is evaluated.
        """
        if label is None:
            return evaluate(x, sigma, None)
        scale = _scales(self._scale_of(label), sigma, self.interval, x, neutral=1.0)
        null = torch.full_like(label, self.num_classes)
        return _mixed(evaluate, x, sigma, scale, self.rescale, (label, {}), (null, {}))


def _mixed(
    evaluate: Evaluate,
    x: Tensor,
    sigma: Tensor | float,
    scale: Tensor,
    rescale: float,
    told: tuple[Tensor | None, dict[str, Tensor]],
    null: tuple[Tensor | None, dict[str, Tensor]],
) -> tuple[Tensor, ...]:
    """Evaluates the branches that matter, in one batch, and combines them.

    Args:
        evaluate: The wrapped denoiser.
        x: Shape (B, C, H, W).
        sigma: Shape () or (B,).
        scale: Of each sample, float64 (B,).
        rescale: See `ClassifierFreeGuidance`.
        told: Label and further conditions of the conditional branch, a row per sample.
        null: Those of the unconditional branch.

    Returns:
        As `evaluate`; what comes beside x0_hat is the conditional branch's, where that is evaluated.
    """
    if bool((scale == 1).all()):
        return evaluate(x, sigma, told[0], **told[1])
    if bool((scale == 0).all()):
        return evaluate(x, sigma, null[0], **null[1])
    conditioned, without = ((scale != other).nonzero()[:, 0] for other in (0, 1))

    def both(ours: Tensor, theirs: Tensor) -> Tensor:
        return torch.cat([_take(ours, conditioned), _take(theirs, without)])

    rows = torch.cat([conditioned, without])
    outputs = evaluate(
        both(x, x),
        at_rows(sigma, rows),
        None if told[0] is None or null[0] is None else both(told[0], null[0]),
        rows,
        **{name: both(value, null[1][name]) for name, value in told[1].items()},
    )
    weight = per_sample(send(scale.to(outputs[0].dtype), x.device), x)
    merged = []
    for index, output in enumerate(outputs):
        shares = torch.split(output, [len(conditioned), len(without)])
        conditional, unconditional = (
            _put(share, which, len(x)) for which, share in zip((conditioned, without), shares, strict=True)
        )
        mixed = conditional
        if index == 0:
            mixed = unconditional + weight * (conditional - unconditional)
            mixed = _rescaled(mixed, conditional, rescale)
        merged.append(torch.where(weight == 1, conditional, torch.where(weight == 0, unconditional, mixed)))
    return tuple(merged)


class GivenImage(DenoiserWrapper):
    """A denoiser with its condition images bound, and guided by them.

    The unconditional branch has the null condition, zeros, and the same labels.

    Args:
        denoiser: A denoiser that is given an image, `denoiser(x, sigma, label, condition=...)`.
        condition: Condition images, shape (B, C', H, W), in the order of the batch that will be denoised.
        cfg_scale: One number, or one for each sample, shape (B,): 1 is the plain conditional model, 0 the
            unconditional one.
        interval: (low, high] of sigma where guidance acts; none means everywhere.
        rescale: As for `ClassifierFreeGuidance`.

    Raises:
        ValueError: If an argument is out of range.

    Source: Ho and Salimans 2022 (arXiv 2207.12598), equation 6, with an image instead of the class.
    """

    condition: Tensor

    def __init__(
        self,
        denoiser: DenoiserLike,
        condition: Tensor,
        cfg_scale: float | Tensor = 1.0,
        interval: Interval | None = None,
        rescale: float = 0.0,
    ) -> None:
        super().__init__(denoiser)
        _check_interval(interval)
        check_share(rescale=rescale, hint="; 0.7 is the usual one, 0 is off")
        _check_scale("cfg_scale", cfg_scale)
        self.cfg_scale, self.interval, self.rescale = cfg_scale, interval, rescale
        self.register_buffer("condition", condition, persistent=False)

    def transform(
        self, evaluate: Evaluate, x: Tensor, sigma: Tensor | float, label: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Evaluates the branches that matter and combines them; see `DenoiserWrapper.transform`."""
        scale = _scales(self.cfg_scale, sigma, self.interval, x, neutral=1.0)
        condition = self.condition.to(x.device)
        told, null = {"condition": condition}, {"condition": torch.zeros_like(condition)}
        return _mixed(evaluate, x, sigma, scale, self.rescale, (label, told), (label, null))


class Guide:
    """The worse model of autoguidance, beside the denoiser that it guides (`Denoiser.guide`) and no part of it.

    It is in no state, optimizer or average, copies of the denoiser share it, and it follows the images to their device.

    Args:
        denoiser: The worse denoiser.
        file: What it was asked for by.
        sha256: Hash of its weights.
        content: What a checkpoint keeps to build it from, as plain values and tensors.
    """

    def __init__(self, denoiser: Denoiser, file: str, sha256: str, content: dict[str, Any] | None = None) -> None:
        self.denoiser = denoiser.eval().requires_grad_(False)
        self.file, self.sha256, self.content = file, sha256, content
        self.num_classes = denoiser.num_classes

    def __call__(self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None, **inputs: Any) -> Tensor:
        """Estimates the clean image; see `Denoiser.forward`."""
        parameter = next(self.denoiser.parameters(), None)
        if parameter is not None and parameter.device != x.device:
            self.denoiser.to(x.device)
        x0_hat: Tensor = self.denoiser(x, sigma, label, **inputs)
        return x0_hat

    def __deepcopy__(self, memo: Any) -> "Guide":
        """Itself: it never changes."""
        return self

    def identity(self) -> dict[str, str]:
        """What receipts name it by."""
        return {"file": self.file, "sha256": self.sha256}


class Autoguidance(DenoiserWrapper):
    """Guidance of a denoiser by a worse version of itself: a smaller network, an earlier checkpoint, or both.

    Args:
        denoiser: The good denoiser.
        guide: The worse one, on the same images. It gets the same labels, or none where it is unconditional.
        scale: One number, or one for each sample, shape (B,); 1 is the denoiser alone, 0 the guide alone.
        interval: (low, high] of sigma where guidance acts; none means everywhere.

    Raises:
        ValueError: If the interval is out of order.

    Source: Karras et al. 2024 (arXiv 2406.02507), section 3.
    """

    def __init__(
        self, denoiser: DenoiserLike, guide: DenoiserLike, scale: float | Tensor = 2.0, interval: Interval | None = None
    ) -> None:
        super().__init__(denoiser)
        _check_interval(interval)
        _check_scale("scale", scale)
        self.guide, self.scale, self.interval = guide, scale, interval

    def transform(
        self, evaluate: Evaluate, x: Tensor, sigma: Tensor | float, label: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Evaluates both denoisers where both matter; see `DenoiserWrapper.transform`."""
        scale = _scales(self.scale, sigma, self.interval, x, neutral=1.0)
        x0_hat, *rest = evaluate(x, sigma, label)
        rows = (scale != 1).nonzero()[:, 0]
        if len(rows) == 0:
            return (x0_hat, *rest)
        guide_label = None if label is None or getattr(self.guide, "num_classes", None) == 0 else _take(label, rows)
        (worse,) = evaluate.of(self.guide)(_take(x, rows), at_rows(sigma, rows), guide_label, rows)
        weight = per_sample(send(scale.to(x0_hat.dtype)[rows], x.device), x)
        guided = worse + weight * (_take(x0_hat, rows) - worse)
        if len(rows) < len(x):
            guided = x0_hat.index_copy(0, send(rows, x.device), guided)
        return (guided, *rest)


class ClassifierGuidance(DenoiserWrapper):
    """Guidance of any denoiser by the gradient of an image classifier.

    Labels choose the classifier's class; a denoiser that is conditional itself gets them too.

    Args:
        denoiser: Any denoiser; its gradient is needed unless `noisy`.
        classifier: Gives logits (B, classes), in eval mode. It sees the denoised image, `classifier(x0_hat)` in [-1,
            1], so that any classifier of images serves. With `noisy` it sees `classifier(x, sigma)`, x = x0 + sigma n
            and sigma of shape (B,), and must have been trained on noisy images.
        scale: One number, or one for each sample, shape (B,); 0 is the denoiser alone, 1 the exact posterior of a
            perfect classifier of noisy images.
        interval: (low, high] of sigma where guidance acts; none means everywhere.
        noisy: Whether the classifier takes noisy images.

    Raises:
        ValueError: If the interval is out of order.

    Source: Dhariwal and Nichol 2021 (arXiv 2105.05233), equation 14; through the denoised image: Bansal et al. 2023
    (arXiv 2302.07121), section 3.1.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        classifier: Callable[..., Tensor],
        scale: float | Tensor = 1.0,
        interval: Interval | None = None,
        noisy: bool = False,
    ) -> None:
        super().__init__(denoiser)
        _check_interval(interval)
        _check_scale("scale", scale)
        self.classifier, self.scale, self.interval, self.noisy = classifier, scale, interval, noisy

    def transform(
        self, evaluate: Evaluate, x: Tensor, sigma: Tensor | float, label: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Evaluates and follows the classifier where it acts; see `DenoiserWrapper.transform`."""
        own_label = label if self.num_classes > 0 else None
        if label is None:
            return evaluate(x, sigma, None)
        scale = _scales(self.scale, sigma, self.interval, x, neutral=0.0)
        if bool((scale == 0).all()):
            return evaluate(x, sigma, own_label)
        levels = send(widen(sigma).to(torch.promote_types(x.dtype, torch.float32)), x.device).expand(len(x))
        label = send(label, x.device)
        # Samplers and validation run without gradients, even in inference mode, whose tensors must be copied to take
        # part.
        with torch.inference_mode(False), torch.enable_grad():
            x, levels, label = x.detach().clone().requires_grad_(), levels.clone(), label.clone()
            outputs = evaluate(x, levels, None if own_label is None else label)
            logits = self.classifier(x, levels) if self.noisy else self.classifier(outputs[0])
            chosen = logits.log_softmax(1).gather(1, label[:, None])
            (slope,) = torch.autograd.grad(chosen.sum(), x)
        weight = per_sample(send(scale.to(outputs[0].dtype), x.device) * levels**2, x)
        x0_hat, *rest = (output.detach() for output in outputs)
        return (x0_hat + weight * slope, *rest)
