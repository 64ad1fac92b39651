"""The denoiser: a network and a prediction type make D(x; sigma, label) -> x0_hat, the estimate of the clean image.

    D(x; sigma) = c_skip * x + c_out * net(c_in * x, c_noise, label)          x = x0 + sigma n

Samplers, guidance, likelihood and editing see a denoiser as a callable and nothing of the network. A network may also
predict the variance of a reverse step, which only the sampler `ddpm` uses, or be told a second noise level, `until`:
then D(x; sigma, until) is the estimate averaged over the way there, and one step of any length is

    x_until = (until / sigma) x + (1 - until / sigma) D(x; sigma, until)              D(x; sigma, sigma) = D(x; sigma)
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffusion_lit.diffusion.conversions import widen
from diffusion_lit.diffusion.preconditioning import Preconditioning
from diffusion_lit.diffusion.rng import send
from diffusion_lit.words import counted

DenoiserLike = Callable[..., Tensor]
"""Anything that is called as `denoiser(x, sigma, label) -> x0_hat`, with `condition=` where it is given an image."""


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """Reshapes one value per sample to broadcast over images.

    Args:
        value: Shape () or (B,).
        x: Shape (B, ...).

    Returns:
        `value` with shape (B, 1, ...) or (1, 1, ...), as many dimensions as x.
    """
    return value.reshape(-1, *[1] * (x.ndim - 1))


def move(x: Tensor, x0_hat: Tensor, sigma: Tensor | float, until: Tensor | float) -> Tensor:
    """The state at another noise level, for an estimate of the clean image that holds on the way there.

    Args:
        x: The state at sigma, shape (B, C, H, W).
        x0_hat: The estimate, of the same shape.
        sigma: Noise level, shape () or (B,).
        until: The other one, shape () or (B,).

    Returns:
        Shape (B, C, H, W); x itself at until = sigma, x0_hat at until = 0.
    """
    ratio = _ratio(x, sigma, until)
    return ratio * x + (1 - ratio) * x0_hat


def estimate_of_move(x: Tensor, moved: Tensor, sigma: Tensor | float, until: Tensor | float) -> Tensor:
    """The estimate of the clean image that took a state to another noise level; the inverse of `move`.

    Args:
        x: The state at sigma, shape (B, C, H, W).
        moved: The state at until, of the same shape.
        sigma: Noise level, shape () or (B,).
        until: The other one, shape () or (B,).

    Returns:
        Shape (B, C, H, W); x where until = sigma, which any estimate leaves as it is.
    """
    ratio = _ratio(x, sigma, until)
    return torch.where(ratio == 1, x, (moved - ratio * x) / torch.where(ratio == 1, 1.0, 1 - ratio))


def _ratio(x: Tensor, sigma: Tensor | float, until: Tensor | float) -> Tensor:
    return per_sample(_level(x, until) / _level(x, sigma), x)


def _level(x: Tensor, value: Tensor | float) -> Tensor:
    """A noise level in x's precision, at least float32, and on its device."""
    return send(widen(value).to(torch.promote_types(x.dtype, torch.float32)), x.device)


class Denoiser(nn.Module):
    """A network under the preconditioning of a prediction type.

    Preconditioning is computed in float32, or in float64 if x is float64, whatever the network's precision. Images are
    cast to the precision of the network's parameters.

    Args:
        net: Called as `net(c_in * x (B, C, H, W), c_noise (B,), label (B,) or None)`, with `augment=` and `condition=`
            only when given; gives (B, C, H, W). Its attributes, where it has them: `num_classes`, the number of classes
            (0: unconditional), `condition_channels`, the channels C' of the image that it is given (0: none), and
            `augment_dim`, the length of augmentation labels (0: none). If its attribute `takes_until` is true, it is
            called with `until=` (B,) too, the c_noise of the second noise level; without, that is c_noise itself.
        scaling: The prediction type.

    Raises:
        ValueError: If the network takes a second noise level, and the prediction type cannot say 0 to it.
    """

    def __init__(self, net: nn.Module, scaling: Preconditioning) -> None:
        super().__init__()
        self.net = net
        self.scaling = scaling
        self.guide: DenoiserLike | None = None  # a worse model, beside it and no part of it: `guidance.Guide`
        self.num_classes = int(getattr(net, "num_classes", 0))
        self.condition_channels = int(getattr(net, "condition_channels", 0))
        self.augment_dim = int(getattr(net, "augment_dim", 0))
        if self.takes_until and not bool(scaling.coefficients(torch.zeros(1))[3].isfinite()):
            raise ValueError(
                f"The network takes a second noise level (takes_until), but {type(scaling).__name__} has no c_noise "
                "for the level 0, where sampling ends; use FlowPreconditioning, or X0Preconditioning with no schedule."
            )

    @property
    def takes_until(self) -> bool:
        """Whether `until` may be given: the network was built for a second noise level."""
        return bool(getattr(self.net, "takes_until", False))

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        label: Tensor | None = None,
        augment: Tensor | None = None,
        condition: Tensor | None = None,
        *,
        until: Tensor | float | None = None,
    ) -> Tensor:
        """Estimates the clean image, or takes x to another noise level.

        Args:
            x: Noisy image x0 + sigma n, shape (B, C, H, W).
            sigma: Noise level, shape () or (B,), in the support of the scaling.
            label: Class indices, shape (B,), in [0, num_classes], where num_classes is the null class; none means the
                null class for all.
            augment: Augmentation labels, shape (B, augment_dim), for networks that take them.
            condition: The image that the network is given, shape (B, condition_channels, H, W); none means the null
                condition, zeros.
            until: A second noise level, shape () or (B,), from 0 to sigma, for networks that take it.

        Returns:
            x0_hat, shape (B, C, H, W), in float64 for float64 x, else float32. With `until` the state at that level, in
            one call of the network however far it is: x itself, without a call, where until = sigma for all.

        Raises:
            ValueError: If sigma is outside the support, a shape does not fit, a label is outside the classes, a label
                or a condition is given to a model that takes none, or `until` above sigma or to a network that does not
                take it.
        """
        if until is None:
            return self.average(x, sigma, None, label, augment, condition)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        self._check_until(x, sigma, until)
        if not torch.compiler.is_compiling() and bool((widen(until).to(x.dtype) == widen(sigma).to(x.dtype)).all()):
            return x
        return move(x, self.average(x, sigma, until, label, augment, condition), sigma, until)

    def average(
        self,
        x: Tensor,
        sigma: Tensor | float,
        until: Tensor | float | None,
        label: Tensor | None = None,
        augment: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Estimates the clean image as `move` needs it: averaged over the way from sigma to another noise level.

        Args:
            x: As for `forward`.
            sigma: As for `forward`.
            until: The other noise level, shape () or (B,); none means sigma, the plain estimate.
            label: As for `forward`.
            augment: As for `forward`.
            condition: As for `forward`.

        Returns:
            Shape (B, C, H, W).

        Raises:
            ValueError: As for `forward`.
        """
        x, output, c_skip, c_out = self._evaluate(x, sigma, label, augment, condition, until)
        if output.shape != x.shape:
            raise ValueError(
                f"The network gave shape {tuple(output.shape)} for images of shape {tuple(x.shape)}; set its "
                "out_channels to the number of image channels (twice as many need a LearnedVarianceDenoiser)."
            )
        return c_skip * x + c_out * output

    def _evaluate(
        self,
        x: Tensor,
        sigma: Tensor | float,
        label: Tensor | None,
        augment: Tensor | None,
        condition: Tensor | None = None,
        until: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The image and the network's output in working precision, and c_skip and c_out shaped to broadcast."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        # Looking at a value on an accelerator stalls its queue, and the loss has moved sigma into the support.
        trusted = self.training and x.device.type != "cpu"
        sigma = self._noise_level(x, sigma, trusted)
        coefficients = self.scaling.coefficients(sigma.to(torch.promote_types(sigma.dtype, x.dtype)))
        c_skip, c_out, c_in, c_noise = (per_sample(c.to(x), x) for c in coefficients)
        label = self._check_label(x, label, trusted)
        extra = {} if augment is None else {"augment": augment}
        if condition is not None:
            extra["condition"] = self._check_condition(x, condition).to(self._net_dtype(x))
        if until is not None:
            self._refuse_until()
            c_until = self.scaling.coefficients(_level(x, until))[3]
            extra["until"] = c_until.to(x).expand(len(x)).contiguous()
        output = self.net(
            (c_in * x).to(self._net_dtype(x)), c_noise.flatten().expand(len(x)).contiguous(), label, **extra
        )
        return x, output.to(x.dtype), c_skip, c_out

    def _check_condition(self, x: Tensor, condition: Tensor) -> Tensor:
        if self.condition_channels == 0:
            raise ValueError(
                "A condition image was given to a model that takes none; leave it out, or train with condition."
            )
        shape = (len(x), self.condition_channels, *x.shape[2:])
        if condition.shape != shape:
            raise ValueError(
                f"The condition has shape {tuple(condition.shape)} for images of shape {tuple(x.shape)}; give {shape}."
            )
        return condition.to(x.device)

    def _net_dtype(self, x: Tensor) -> torch.dtype:
        parameter = next(self.net.parameters(), None)
        return x.dtype if parameter is None else parameter.dtype

    def _noise_level(self, x: Tensor, sigma: Tensor | float, trusted: bool) -> Tensor:
        sigma = sigma if isinstance(sigma, Tensor) else widen(sigma)
        if sigma.shape not in ((), (len(x),)):
            raise ValueError(
                f"sigma has shape {tuple(sigma.shape)} for a batch of {counted(len(x), 'image')}; give one level, or "
                "one for each."
            )
        if not trusted:
            self.scaling.check(sigma)
        if x.device.type == "mps":  # which has no float64
            sigma = sigma.to(x.dtype)
        return send(sigma, x.device)

    def _refuse_until(self) -> None:
        """Refuses a second noise level where the network takes none."""
        if not self.takes_until:
            raise ValueError(
                "A second noise level (until) was given to a network that takes none; train one with takes_until, as "
                "the MeanFlow configs do, or use another sampler than meanflow."
            )

    def _check_until(self, x: Tensor, sigma: Tensor | float, until: Tensor | float) -> None:
        """Refuses a second noise level that is none of this network, has another shape or lies above sigma."""
        self._refuse_until()
        level = widen(until)
        if level.shape not in ((), (len(x),)):
            raise ValueError(
                f"until has shape {tuple(level.shape)} for a batch of {counted(len(x), 'image')}; give one level, or "
                "one for each."
            )
        if torch.compiler.is_compiling():
            return
        outside = ((level < 0) | (level.to(x.dtype) > widen(sigma).to(x.dtype))).expand(len(x))
        if bool(outside.any()):
            worst = level.expand(len(x))[outside][0].item()
            raise ValueError(f"until {worst:.6g} is not between 0 and sigma, from which the map falls; lower it.")

    def _check_label(self, x: Tensor, label: Tensor | None, trusted: bool) -> Tensor | None:
        if label is None:
            return None
        if self.num_classes == 0:
            raise ValueError(
                "A label was given to an unconditional model; leave it out, or train with num_classes above 0."
            )
        if label.shape != (len(x),) or label.is_floating_point():
            raise ValueError(
                f"Labels must be {counted(len(x), 'integer')}, one per image, not {label.dtype} of shape "
                f"{tuple(label.shape)}."
            )
        if not trusted and not torch.compiler.is_compiling():
            outside = (label < 0) | (label > self.num_classes)
            if bool(outside.any()):
                raise ValueError(
                    f"Label {label[outside][0].item()} is outside the classes 0 to {self.num_classes - 1}; choose one "
                    f"of these ({self.num_classes} is the null class, which means no class)."
                )
        return send(label, x.device)


class LearnedVarianceDenoiser(Denoiser):
    """A denoiser whose network also predicts the variance of each reverse step.

    The network outputs 2 C channels: the first C are the prediction, the others are v, which interpolates the log
    variance of a step between the posterior variance and beta. Only the sampler `ddpm` uses it.

    Args:
        net: As for `Denoiser`, giving (B, 2 C, H, W).
        scaling: The prediction type, on a schedule.

    Source: Nichol and Dhariwal 2021 (arXiv 2102.09672), equation 15.
    """

    @property
    def takes_until(self) -> bool:
        """No: the variance is that of a step of the reverse process, which has no second noise level."""
        return False

    def average(
        self,
        x: Tensor,
        sigma: Tensor | float,
        until: Tensor | float | None,
        label: Tensor | None = None,
        augment: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Estimates the clean image; see `Denoiser.average`."""
        if until is not None:
            self._refuse_until()
        return self._both(x, sigma, label, augment, condition)[0]

    def learned_variance(
        self,
        x: Tensor,
        sigma: Tensor | float,
        sigma_next: Tensor | float,
        label: Tensor | None = None,
        augment: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Estimates the clean image and the variance of the step to sigma_next, in one forward of the network.

        Args:
            x: As for `Denoiser.forward`.
            sigma: As for `Denoiser.forward`.
            sigma_next: The noise level that the step goes to. The interpolation that this network predicts is the same
                for every length of step, so it is not looked at here.
            label: As for `Denoiser.forward`.
            augment: As for `Denoiser.forward`.
            condition: As for `Denoiser.forward`.

        Returns:
            x0_hat and v, both (B, C, H, W). Variance = beta^v * posterior^(1 - v): 0 is the posterior variance, 1 is
            beta. As in the source nothing holds v inside [0, 1]; a trained network stays near it.

        Raises:
            ValueError: As for `Denoiser.forward`.
        """
        return self._both(x, sigma, label, augment, condition)

    def _both(
        self,
        x: Tensor,
        sigma: Tensor | float,
        label: Tensor | None,
        augment: Tensor | None,
        condition: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        x, output, c_skip, c_out = self._evaluate(x, sigma, label, augment=augment, condition=condition)
        if output.shape != (len(x), 2 * x.shape[1], *x.shape[2:]):
            raise ValueError(
                f"The network gave shape {tuple(output.shape)} for images {tuple(x.shape)}; a learned variance "
                f"needs out_channels {2 * x.shape[1]}, twice the number of image channels."
            )
        prediction, v = output.chunk(2, dim=1)
        return c_skip * x + c_out * prediction, (v + 1) / 2
