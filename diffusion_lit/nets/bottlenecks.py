"""What stands between an encoder and a decoder: a Gaussian (KL), or codes (FSQ, VQ).

A bottleneck makes the latents of an encoder's output, and brings latents from elsewhere, such as a diffusion model's
samples, to what the decoder knows:

    Gaussian    z = mean + std n                                     any z is a latent
    FSQ         z_c = round(f_c(h_c)) / floor(L_c / 2), L_c levels   the nearest level of each channel
    VQ          z = the nearest of K unit vectors to h / |h|         the nearest vector at each position

Rounding has no gradient, so that of its result is passed to its input (straight-through: stop(z) + h - stop(h)). With a
uniform prior over codes the divergence of a known code is its length, ln L per channel or ln K per position, so that
under a likelihood the loss remains a bound of the bits per dimension.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_lit.checks import check_count, check_counts, check_number

LOGVAR_RANGE = (-30.0, 20.0)  # beyond it exp overflows or the divergence loses its digits


class Posterior(NamedTuple):
    """A Gaussian over latents with independent entries.

    Args:
        mean: Shape (B, c, h, w).
        std: Standard deviations of the same shape, 0 for an autoencoder without noise.
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Draws latents.

        Args:
            noise: Standard normal, of the mean's shape.

        Returns:
            mean + std * noise.
        """
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """The divergence from the standard normal prior in nats, per entry; same shape as the mean."""
        variance = self.std.square()
        return 0.5 * (self.mean.square() + variance - 1 - variance.log())

    def penalty(self) -> Tensor:
        """What the bottleneck adds to the loss beside the divergence, shape (B,); nothing here."""
        return self.mean.new_zeros(len(self.mean))


class Codes(NamedTuple):
    """Latents that are codes: a `Posterior` without noise.

    Args:
        mean: The codes (B, c, h, w), with the gradient of what was rounded.
        std: 0, of the same shape.
        nats: Length of the code per entry, a float or a tensor (c, 1, 1).
        commitment: What the bottleneck adds to the loss, shape (B,).
    """

    mean: Tensor
    std: Tensor
    nats: Tensor
    commitment: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """The codes themselves, whatever the noise."""
        return self.mean

    def kl(self) -> Tensor:
        """The divergence from the uniform prior over codes in nats, per entry: the length of the code."""
        return self.nats.to(self.mean).expand_as(self.mean)

    def penalty(self) -> Tensor:
        """What the bottleneck adds to the loss, shape (B,)."""
        return self.commitment


class Bottleneck(nn.Module, ABC):
    """Base class of bottlenecks. An autoencoder calls `attach` once, with the channels of its latents.

    Attributes:
        config: The arguments that build it again.
        width: Channels of the encoder's output for each channel of a latent.
        count: Number of codes at a position; 0 where latents are no codes.
    """

    config: dict[str, Any]
    width = 1
    count = 0

    def attach(self, channels: int) -> None:
        """Takes the number of channels of a latent.

        Args:
            channels: The number.

        Raises:
            ValueError: If it does not fit.
        """

    @abstractmethod
    def forward(self, h: Tensor) -> Posterior | Codes:
        """The latents of an encoder's output h (B, width * c, h, w), in float32 or wider."""

    def nearest(self, z: Tensor) -> Tensor:
        """The latents that the decoder knows, nearest to z (B, c, h, w); gradients pass straight through."""
        return z

    def of_normal(self, noise: Tensor) -> Tensor:
        """A draw from the prior.

        Args:
            noise: Standard normal, shape (B, c, h, w).

        Returns:
            Latents of this shape.
        """
        return noise

    def index(self, z: Tensor) -> Tensor:
        """Numbers of codes, int64, from 0; what one counts to see how many are in use.

        Args:
            z: Codes (B, c, h, w).

        Returns:
            One per position of a codebook.
        """
        raise NotImplementedError


class GaussianBottleneck(Bottleneck):
    """Mean and log-variance of a Gaussian, as in Kingma & Welling 2014 (arXiv 1312.6114)."""

    width = 2

    def __init__(self) -> None:
        super().__init__()
        self.config = {}

    def forward(self, h: Tensor) -> Posterior:
        """See `Bottleneck.forward`."""
        mean, logvar = h.chunk(2, dim=1)
        return Posterior(mean, (0.5 * logvar.clamp(*LOGVAR_RANGE)).exp())


class FSQ(Bottleneck):
    """Finite scalar quantisation: each channel of a latent is rounded to one of a few levels in [-1, 1].

    Args:
        levels: Number of levels of each channel, at least 2; as many as `latent_channels`. [8, 5, 5, 5] is 1,000 codes
            per position.

    Raises:
        ValueError: If a number of levels is out of range.

    Source: Mentzer 2023, arXiv 2309.15505, section 3 and appendix A.1.
    """

    levels: Tensor

    def __init__(self, levels: list[int]) -> None:
        super().__init__()
        check_counts("levels", levels, least=2, empty=False)
        self.config = {"levels": list(levels)}
        self.count = math.prod(levels)
        self.register_buffer("levels", torch.tensor(levels).reshape(-1, 1, 1), persistent=False)

    def attach(self, channels: int) -> None:
        """See `Bottleneck.attach`."""
        given = len(self.levels)
        if given != channels:
            raise ValueError(
                f"FSQ has {given} levels, {self.config['levels']}, and the latents have {channels} channels; give one "
                f"number of levels per channel, or latent_channels {given}."
            )

    def forward(self, h: Tensor) -> Codes:
        """Squeezes each channel between its outermost levels and rounds."""
        levels = self.levels.to(h)
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0).to(h)  # an even number of levels has none at 0
        squeezed = torch.tanh(h + torch.atanh(offset / half)) * half - offset
        codes = _straight_through(squeezed, squeezed.round()) / self.reach
        return Codes(codes, torch.zeros_like(codes), levels.log(), codes.new_zeros(len(codes)))

    @property
    def reach(self) -> Tensor:
        """Half the number of levels of each channel, rounded down: the distance of levels is 1 / reach."""
        return self.levels // 2

    def nearest(self, z: Tensor) -> Tensor:
        """See `Bottleneck.nearest`."""
        step = (z * self.reach).round()
        step = torch.maximum(torch.minimum(step, (self.levels - 1) - self.reach), -self.reach)
        return _straight_through(z, (step / self.reach).to(z.dtype))

    def of_normal(self, noise: Tensor) -> Tensor:
        """Each level equally often, through the normal distribution function; see `Bottleneck.of_normal`."""
        share = torch.special.ndtr(noise)
        step = torch.minimum((share * self.levels).floor(), self.levels - 1) - self.reach
        return (step / self.reach).to(noise.dtype)

    def index(self, z: Tensor) -> Tensor:
        """Number of the code at each position, (B, h, w)."""
        step = (z * self.reach).round().long() + self.reach
        place = torch.cumprod(torch.cat([self.levels.new_ones(1), self.levels.flatten()[:-1]]), 0)
        return (step * place.reshape(-1, 1, 1)).sum(1)


class VQ(Bottleneck):
    """Vector quantisation: the latent at each position is the nearest of K learned unit vectors.

    Latents and codebook lie on the unit sphere, which keeps more of the codes in use. The codebook learns by gradient,
    with all other weights, so that ranks, accumulation, averages and resuming treat it like them.

    Args:
        codes: Number K of vectors, at least 2.
        commitment: Weight beta of the distance that draws latents to their codes, positive.

    Raises:
        ValueError: If a number is out of range.

    Source: van den Oord 2017, arXiv 1711.00937, equation 3; Yu 2021, arXiv 2110.04627, section 3.2 (unit vectors).
    """

    def __init__(self, codes: int = 512, commitment: float = 0.25) -> None:
        super().__init__()
        check_count(2, codes=codes)
        check_number(above=0, commitment=commitment)
        self.config = {"codes": codes, "commitment": commitment}
        self.count = codes
        self.commitment = commitment
        self.codebook = nn.Parameter(torch.empty(0))

    def attach(self, channels: int) -> None:
        """See `Bottleneck.attach`."""
        if channels < 2:
            raise ValueError(
                f"VQ takes latents of at least 2 channels, and these have {channels}; raise latent_channels."
            )
        self.codebook = nn.Parameter(torch.empty(self.count, channels))
        nn.init.normal_(self.codebook)

    def forward(self, h: Tensor) -> Codes:
        """The nearest codes, with both terms that draw latents and codebook together."""
        h = F.normalize(h, dim=1)
        z = self._nearest(h)
        apart = (z - h.detach()).square() + self.commitment * (z.detach() - h).square()
        nats = torch.tensor(math.log(self.count) / h.shape[1])
        return Codes(_straight_through(h, z.detach()), torch.zeros_like(h), nats, apart.flatten(1).mean(1))

    def _nearest(self, h: Tensor) -> Tensor:
        return F.embedding(self.index(h), self._unit()).permute(0, 3, 1, 2).contiguous()

    def _unit(self) -> Tensor:
        return F.normalize(self.codebook.float(), dim=1)

    def nearest(self, z: Tensor) -> Tensor:
        """See `Bottleneck.nearest`."""
        return _straight_through(z, self._nearest(z.float()).to(z.dtype).detach())

    def of_normal(self, noise: Tensor) -> Tensor:
        """Each code equally often, through the first channel's distribution function; see `Bottleneck.of_normal`."""
        index = (torch.special.ndtr(noise[:, 0]) * self.count).long().clamp(max=self.count - 1)
        return F.embedding(index, self._unit()).permute(0, 3, 1, 2).to(noise.dtype)

    def index(self, z: Tensor) -> Tensor:
        """Number of the nearest code at each position, (B, h, w)."""
        with torch.autocast(z.device.type, enabled=False):  # in bfloat16 a code is not the nearest to itself
            return torch.einsum("bchw,kc->bhwk", z.float(), self._unit()).argmax(-1)


def _straight_through(h: Tensor, z: Tensor) -> Tensor:
    """Z with the gradient of h."""
    return z.detach() + (h - h.detach())  # in this order it is z to the last bit
