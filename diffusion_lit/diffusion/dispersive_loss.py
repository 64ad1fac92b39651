"""The dispersive loss: features inside the network are pushed apart, as a regulariser that needs no other encoder.

    loss = denoising loss + share log mean_ij exp(-|z_i - z_j|^2 / (d temperature))

z_i are the d features of sample i of the batch behind a layer, and all pairs count, a sample with itself too. A batch
whose features are alike has 0, the greatest value.

Source: Wang and He 2025 (arXiv 2506.09027), algorithm 1 with equation 6.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_lit.checks import check_number
from diffusion_lit.diffusion.denoiser import Denoiser
from diffusion_lit.diffusion.loss import DenoisingLoss, LossWeight


class DispersiveLoss(DenoisingLoss):
    """The denoising loss and, in training alone, the dispersion of a layer's features.

    On several ranks each disperses its own share of the batch.

    Args:
        layer: Name of the layer in the network, such as middle.1 of a `UNet` and blocks.2 of a `DiT`.
        share: Share of the dispersion, 0 or more.
        temperature: How far apart features shall be, in units of the mean square of a feature's difference; positive.
        weight: The weight of the denoising loss; none means `PredictionWeight`.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self, layer: str, share: float = 0.5, temperature: float = 0.5, weight: LossWeight | None = None
    ) -> None:
        super().__init__(weight)
        check_number(least=0, share=share, hint="; 0.5 is the usual one")
        check_number(above=0, temperature=temperature, hint="; 0.5 is the usual one")
        self.layer, self.share, self.temperature = layer, share, temperature

    def forward(self, denoiser: Denoiser, *batch: Any, **told: Any) -> Tensor:
        """The loss of each sample; see `DenoisingLoss.forward`.

        Raises:
            ValueError: If the network has no such layer, or it gives no tensor.
        """
        if not self.training:
            return super().forward(denoiser, *batch, **told)
        with self._features(denoiser.net) as found:
            losses = super().forward(denoiser, *batch, **told)
        if not found or not isinstance(found[0], Tensor):
            raise ValueError(
                f"The layer {self.layer} of DispersiveLoss gives no features here; choose a block, and train without "
                "compilation."
            )
        return losses + self.share * self.dispersion(found[0])

    def dispersion(self, z: Tensor) -> Tensor:
        """The logarithm of the mean over pairs of exp(-distance), at most 0.

        Args:
            z: Features, shape (B, *).

        Returns:
            A scalar.
        """
        z = z.flatten(1).float()
        near = -torch.pdist(z).square() / (z.shape[1] * self.temperature)
        return torch.cat([near, near, near.new_zeros(len(z))]).logsumexp(0) - 2 * math.log(len(z))

    @contextmanager
    def _features(self, net: nn.Module) -> Iterator[list[object]]:
        """What the layer gives, for as long as the context is open."""
        try:
            layer = net.get_submodule(self.layer)
        except AttributeError:
            names = ", ".join(name for name, _ in net.named_modules() if name and name.count(".") < 2)
            raise ValueError(
                f"The {type(net).__name__} has no layer {self.layer!r} for DispersiveLoss; it has {names}."
            ) from None
        found: list[object] = []
        hook = layer.register_forward_hook(lambda module, given, made: found.append(made))
        try:
            yield found
        finally:
            hook.remove()
