"""The adversary of an autoencoder: a patch discriminator, in the same loss and the same optimizer.

With D the discriminator, x_hat the reconstruction and `stop` where no gradient passes,

    autoencoder      - w lambda mean D_stop(x_hat)
    discriminator    hinge = (mean relu(1 - D(x)) + mean relu(1 + D(stop(x_hat)))) / 2
    lambda           max(0, 1 - hinge) |grad of fidelity| / (|grad of mean D(x_hat)| + 1e-4)

are added to the loss. The first passes through D to x_hat but leaves D's weights alone, the second the other way round,
so that one backward pass and one optimizer train both: Lightning's automatic optimisation, with accumulation, clipping
and exact resuming, goes on to hold. Both gradients of lambda are with respect to the decoder's last layer and averaged
over ranks before their norms are taken, so that lambda is that of the global batch.

The hinge is 1 while D cannot tell images from reconstructions. Its gradient is noise then, which the ratio alone, as in
VQGAN, would blow up to the size of the fidelity's: here D counts by how well it tells them apart.

Source: Esser 2021 (VQGAN), arXiv 2012.09841, equations 6 and 7; Lim & Ye 2017, arXiv 1705.02894 (the hinge).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from diffusion_lit.checks import check_count, check_number
from diffusion_lit.nets.checks import require_image_size
from diffusion_lit.nets.discriminator import PatchDiscriminator

EPSILON, MOST = 1e-4, 1e4  # of lambda, as in VQGAN


class Contest(NamedTuple):
    """What an adversary adds to the loss of a batch, and its figures.

    Args:
        loss: A scalar to add.
        figures: Scalars by name, detached.
    """

    loss: Tensor
    figures: dict[str, Tensor]


class Adversary(nn.Module):
    """A patch discriminator that is trained against the autoencoder.

    Args:
        weight: Weight w of its judgement in the autoencoder's loss, positive.
        start_step: Training step from which it plays; until then neither is touched by the other. Reconstructions
            that are still blurred are told apart at once and teach nothing.
        adaptive: Whether w is multiplied by lambda.
        lr_ratio: Its learning rate relative to the autoencoder's, positive; with a rate of 1e-3 it may stay at chance.
        model_channels: Channels of its first level.
        levels: Its levels; see `diffusion_lit.nets.PatchDiscriminator`.

    Raises:
        ValueError: If a number is out of range.
    """

    net: PatchDiscriminator

    def __init__(
        self,
        weight: float = 0.5,
        start_step: int = 0,
        adaptive: bool = True,
        lr_ratio: float = 0.2,
        model_channels: int = 32,
        levels: int = 2,
    ) -> None:
        super().__init__()
        check_number(above=0, weight=weight, lr_ratio=lr_ratio)
        check_count(0, start_step=start_step)
        check_count(model_channels=model_channels, levels=levels)
        self.weight = weight
        self.start_step = start_step
        self.adaptive = adaptive
        self.lr_ratio = lr_ratio
        self._size = (model_channels, levels)

    def attach(self, image_shape: tuple[int, int, int]) -> None:
        """Makes the discriminator; the module that it belongs to calls it once, so that no late start fails.

        Args:
            image_shape: Shape (C, H, W) of the images, H = W.

        Raises:
            ValueError: If its levels do not divide them.
        """
        self.net = PatchDiscriminator(image_shape[0], *self._size)
        require_image_size(image_shape[1], self.net.factor, f"the adversary's levels are {self._size[1]}")

    def forward(
        self,
        image: Tensor,
        x_hat: Tensor,
        fidelity: Tensor,
        last: Tensor,
        step: int,
        mean_over_ranks: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> Contest:
        """Both terms of the loss.

        Args:
            image: Images (B, C, H, W) in [-1, 1].
            x_hat: Their reconstructions.
            fidelity: What lambda compares the judgement's gradient with, a scalar: distance to the images.
            last: The weight of the decoder's last layer.
            step: Training steps so far.
            mean_over_ranks: Averages a tensor over ranks.

        Returns:
            What is added to the loss.
        """
        if step < self.start_step:  # no figures, and no gradient but zeros, by which ranks know that none is missing
            idle = torch.stack([parameter.sum() for parameter in self.parameters()]).sum()
            return Contest(0 * idle, {})
        judged = -self.judge(x_hat).mean()
        real, made = self.net(torch.cat([image, x_hat.detach().to(image)])).chunk(2)
        told = (F.relu(1 - real).mean() + F.relu(1 + made).mean()) / 2
        scale = judged.new_ones(())
        if self.adaptive:
            grads = [torch.autograd.grad(one, last, retain_graph=True)[0].float() for one in (fidelity, judged)]
            scale = ratio(*mean_over_ranks(torch.stack(grads))) * (1 - mean_over_ranks(told.detach())).clamp(min=0)
        figures = {"adversarial": judged, "discriminator": told, "lambda": scale}
        return Contest(self.weight * scale * judged + told, {name: value.detach() for name, value in figures.items()})

    def judge(self, x_hat: Tensor) -> Tensor:
        """Logits of reconstructions, whose gradient reaches these but not the discriminator's weights.

        Args:
            x_hat: Reconstructions (B, C, H, W).

        Returns:
            Logits (B, 1, h, w).
        """
        stopped = {name: parameter.detach() for name, parameter in self.net.named_parameters()}
        logits: Tensor = functional_call(self.net, stopped, (x_hat,))
        return logits

    def rest(self, step: int) -> None:
        """Drops gradients before the adversary's start, so that the optimizer leaves its weights and moments unchanged.

        Args:
            step: Training steps so far.
        """
        if step < self.start_step:
            for parameter in self.parameters():
                parameter.grad = None


def ratio(fidelity: Tensor, judged: Tensor) -> Tensor:
    """The ratio of the norms of two gradients of one shape, in [0, 10^4]."""
    scale: Tensor = fidelity.norm() / (judged.norm() + EPSILON)
    return scale.clamp(0, MOST).detach()
