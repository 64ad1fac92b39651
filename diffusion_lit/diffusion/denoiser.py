"""The denoiser: a network and a prediction type make D(x; sigma, label) -> x0_hat, the estimate of the clean image.

    D(x; sigma) = c_skip * x + c_out * net(c_in * x, c_noise, label)          x = x0 + sigma n

Samplers, guidance, likelihood and editing see a denoiser as a callable and nothing of the network. A network may also
predict the variance of a reverse step, which only the sampler `ddpm` uses.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffusion_lit.diffusion.conversions import widen
from diffusion_lit.diffusion.preconditioning import Preconditioning

DenoiserLike = Callable[..., Tensor]
"""Anything that is called as `denoiser(x, sigma, label) -> x0_hat`."""


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """Reshapes one value per sample to broadcast over images.

    Args:
        value: Shape () or (B,).
        x: Shape (B, ...).

    Returns:
        `value` with shape (B, 1, ...) or (1, 1, ...), as many dimensions as x.
    """
    return value.reshape(-1, *[1] * (x.ndim - 1))


class Denoiser(nn.Module):
    """A network under the preconditioning of a prediction type.

    Preconditioning is computed in float32, or in float64 if x is float64, whatever the network's precision. Images are
    cast to the precision of the network's parameters.

    Args:
        net: Called as `net(c_in * x (B, C, H, W), c_noise (B,), label (B,) or None)`, with `augment=` only when given;
            gives (B, C, H, W). Its attribute `num_classes`, where it has one, is the number of classes (0:
            unconditional).
        scaling: The prediction type.
    """

    def __init__(self, net: nn.Module, scaling: Preconditioning) -> None:
        super().__init__()
        self.net = net
        self.scaling = scaling
        self.num_classes = int(getattr(net, "num_classes", 0))

    def forward(
        self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        """Estimates the clean image.

        Args:
            x: Noisy image x0 + sigma n, shape (B, C, H, W).
            sigma: Noise level, shape () or (B,), in the support of the scaling.
            label: Class indices, shape (B,), in [0, num_classes], where num_classes is the null class; none means the
                null class for all.
            augment: Augmentation labels, shape (B, augment_dim), for networks that take them.

        Returns:
            x0_hat, shape (B, C, H, W), in float64 for float64 x, else float32.

        Raises:
            ValueError: If sigma is outside the support, a shape does not fit, a label is outside the classes, or a
                label is given to an unconditional model.
        """
        x, output, c_skip, c_out = self._evaluate(x, sigma, label, augment)
        if output.shape != x.shape:
            raise ValueError(
                f"The network gave shape {tuple(output.shape)} for images of shape {tuple(x.shape)}; set its "
                "out_channels to the number of image channels (twice as many need a LearnedVarianceDenoiser)."
            )
        return c_skip * x + c_out * output

    def _evaluate(
        self, x: Tensor, sigma: Tensor | float, label: Tensor | None, augment: Tensor | None
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
        output = self.net(
            (c_in * x).to(self._net_dtype(x)), c_noise.flatten().expand(len(x)).contiguous(), label, **extra
        )
        return x, output.to(x.dtype), c_skip, c_out

    def _net_dtype(self, x: Tensor) -> torch.dtype:
        parameter = next(self.net.parameters(), None)
        return x.dtype if parameter is None else parameter.dtype

    def _noise_level(self, x: Tensor, sigma: Tensor | float, trusted: bool) -> Tensor:
        sigma = sigma if isinstance(sigma, Tensor) else widen(sigma)
        if sigma.shape not in ((), (len(x),)):
            raise ValueError(
                f"sigma has shape {tuple(sigma.shape)} for a batch of {len(x)} images; give one level, or one for each."
            )
        if not trusted:
            self.scaling.check(sigma)
        if x.device.type == "mps":  # which has no float64
            sigma = sigma.to(x.dtype)
        return sigma.to(x.device, non_blocking=True)

    def _check_label(self, x: Tensor, label: Tensor | None, trusted: bool) -> Tensor | None:
        if label is None:
            return None
        if self.num_classes == 0:
            raise ValueError(
                "A label was given to an unconditional model; leave it out, or train with num_classes above 0."
            )
        if label.shape != (len(x),) or label.is_floating_point():
            raise ValueError(
                f"Labels must be {len(x)} integers, one per image, not {label.dtype} of shape {tuple(label.shape)}."
            )
        if not trusted and not torch.compiler.is_compiling():
            outside = (label < 0) | (label > self.num_classes)
            if bool(outside.any()):
                raise ValueError(
                    f"Label {label[outside][0].item()} is outside the classes 0 to {self.num_classes - 1}; choose one "
                    f"of these ({self.num_classes} is the null class, which means no class)."
                )
        return label.to(x.device)


class LearnedVarianceDenoiser(Denoiser):
    """A denoiser whose network also predicts the variance of each reverse step.

    The network outputs 2 C channels: the first C are the prediction, the others are v, which interpolates the log
    variance of a step between the posterior variance and beta. Only the sampler `ddpm` uses it.

    Args:
        net: As for `Denoiser`, giving (B, 2 C, H, W).
        scaling: The prediction type, on a schedule.

    Source: Nichol and Dhariwal 2021 (arXiv 2102.09672), equation 15.
    """

    def forward(
        self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        """Estimates the clean image; see `Denoiser.forward`."""
        return self._both(x, sigma, label, augment)[0]

    def learned_variance(
        self,
        x: Tensor,
        sigma: Tensor | float,
        sigma_next: Tensor | float,
        label: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Estimates the clean image and the variance of the step to sigma_next, in one forward of the network.

        Args:
            x: As for `Denoiser.forward`.
            sigma: As for `Denoiser.forward`.
            sigma_next: The noise level that the step goes to. The interpolation that this network predicts is the same
                for every length of step, so it is not looked at here.
            label: As for `Denoiser.forward`.
            augment: As for `Denoiser.forward`.

        Returns:
            x0_hat and v, both (B, C, H, W). Variance = beta^v * posterior^(1 - v): 0 is the posterior variance, 1 is
            beta. As in the source nothing holds v inside [0, 1]; a trained network stays near it.

        Raises:
            ValueError: As for `Denoiser.forward`.
        """
        return self._both(x, sigma, label, augment)

    def _both(
        self, x: Tensor, sigma: Tensor | float, label: Tensor | None, augment: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, output, c_skip, c_out = self._evaluate(x, sigma, label, augment)
        if output.shape != (len(x), 2 * x.shape[1], *x.shape[2:]):
            raise ValueError(
                f"The network gave shape {tuple(output.shape)} for images {tuple(x.shape)}; a learned variance "
                f"needs out_channels {2 * x.shape[1]}, twice the number of image channels."
            )
        prediction, v = output.chunk(2, dim=1)
        return c_skip * x + c_out * prediction, (v + 1) / 2
