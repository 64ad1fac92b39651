"""What a VAE draws its latents from: the prior that it was trained with, or a Gaussian mixture fitted afterwards.

The latents of real images, all together, are not distributed as the prior is: decoded draws from N(0, 1) fall into gaps
between them. A mixture of K Gaussians with full covariances, fitted by expectation-maximisation (scikit-learn's
`GaussianMixture`) to one draw z ~ q(z|x) of each of some training images,

    z ~ sum over k of pi_k N(mu_k, S_k),        drawn as mu_k + chol(S_k) n

closes part of these gaps without touching the weights. (A flow would close more and be one more network to train; that
is what latent diffusion does.)

Source: Ghosh 2020, arXiv 1903.12436, section 4.1 (ex-post density estimation, with 10 components).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusion_lit.checks import check_count
from diffusion_lit.diffusion.images import from_uint8, take
from diffusion_lit.diffusion.rng import SeededNoise, keyed_generator
from diffusion_lit.modules.latent_space import latent_shape
from diffusion_lit.modules.protocols import ImageSource
from diffusion_lit.nets.bottlenecks import GaussianBottleneck
from diffusion_lit.storage.hashing import weights_hash
from diffusion_lit.storage.tensors import kept_tensors
from diffusion_lit.words import counted

COMPONENTS = 10
MOST_FITTED = 20_000  # images; expectation-maximisation takes minutes on more
MOST_ENTRIES = 2048  # of a latent, whose covariances have their square
ITERATIONS = 30
RIDGE = 1e-4  # added to the variances, which are about 1


class Prior:
    """The prior that a VAE is trained with: N(0, 1), or all codes equally often.

    Attributes:
        name: What receipts call it.
    """

    name = "prior"

    def draw(self, net: Any, shape: tuple[int, int, int], seeds: Sequence[int], device: torch.device) -> Tensor:
        """Draws one latent per seed.

        Args:
            net: The autoencoder.
            shape: Shape (c, h, w) of a latent.
            seeds: One seed per latent.
            device: Where to.

        Returns:
            Latents (B, c, h, w).
        """
        noise = SeededNoise(seeds)(torch.empty(len(seeds), *shape, device=device))
        drawn: Tensor = getattr(net, "bottleneck", GaussianBottleneck()).of_normal(noise)
        return drawn

    def record(self) -> dict[str, Any]:
        """The settings as plain values, for receipts; none here."""
        return {}


class GaussianMixturePrior(Prior):
    """A Gaussian mixture of flattened latents.

    Args:
        weights: Share of each component, shape (K,).
        means: Their means (K, D).
        factors: Lower Cholesky factors of their covariances (K, D, D).
        fitted: What it was fitted to, as plain values.
    """

    name = "gmm"

    def __init__(self, weights: Tensor, means: Tensor, factors: Tensor, fitted: dict[str, Any] | None = None) -> None:
        self.weights, self.means, self.factors = weights, means, factors
        self.fitted = fitted or {}

    def draw(self, net: Any, shape: tuple[int, int, int], seeds: Sequence[int], device: torch.device) -> Tensor:
        """Draws one latent per seed; component and noise come from the seed's own generators. See `Prior.draw`."""
        edges = self.weights.double().cumsum(0)
        shares = [torch.rand((), generator=keyed_generator("component", seed), dtype=torch.float64) for seed in seeds]
        chosen = torch.searchsorted(edges, torch.stack(shares) * edges[-1], right=True).clamp(max=len(edges) - 1)
        noise = SeededNoise(seeds)(torch.empty(len(seeds), *shape, device=device)).flatten(1).double().cpu()
        z = self.means[chosen].double() + torch.einsum("bij,bj->bi", self.factors[chosen].double(), noise)
        return z.reshape(-1, *shape).to(device, torch.float32)

    def record(self) -> dict[str, Any]:
        """What it was fitted to."""
        return {"prior": self.fitted}


@dataclass(frozen=True)
class PriorSampling:
    """How a VAE draws: from a prior, in one pass through the decoder. It stands where others have their `Sampling`.

    Args:
        prior: What latents are drawn from.
        num_steps: 1.
        cfg_scale: 1, since there are no classes.
    """

    prior: Prior = field(default_factory=Prior)
    num_steps: int = 1
    cfg_scale: float = 1.0
    guide_ckpt = None  # no other model guides
    autoguided = False

    @property
    def sampler(self) -> str:
        """The name, for receipts."""
        return self.prior.name

    @property
    def nfe(self) -> int:
        """Passes through the decoder."""
        return 1

    def replace(self, **changes: Any) -> "PriorSampling":
        """Itself; there is nothing to change.

        Args:
            changes: Options of samplers, all None.

        Returns:
            Itself.

        Raises:
            ValueError: If one is given.
        """
        for name, value in changes.items():
            if value is not None:
                raise ValueError(f"A VAE draws from its prior in one pass and has no {name}; leave --{name} out.")
        return self

    def record(self) -> dict[str, Any]:
        """The settings as plain values, for receipts."""
        settings = {"sampler": self.sampler, "num_steps": self.num_steps, "cfg_scale": self.cfg_scale}
        return {**settings, **self.prior.record()}


def fit_mixture(latents: Tensor, components: int = COMPONENTS) -> GaussianMixturePrior:
    """Fits a Gaussian mixture by expectation-maximisation.

    Args:
        latents: Flattened latents (N, D).
        components: Number K of Gaussians.

    Returns:
        The mixture, float32.

    Raises:
        ValueError: If there are fewer than two latents per component, or no such number.
    """
    check_count(components=components)
    if len(latents) < 2 * components:
        raise ValueError(
            f"A mixture of {components} Gaussians is fitted to at least {2 * components} training images, and "
            f"{counted(len(latents), 'image', 'is', 'are')} there; leave --prior out, for the prior that the VAE was "
            "trained with."
        )
    import warnings

    from sklearn.mixture import GaussianMixture

    model = GaussianMixture(components, reg_covar=RIDGE, max_iter=ITERATIONS, init_params="k-means++", random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it went on to the last iteration
        model.fit(latents.float().numpy())  # in float64 it takes twice as long
    weights, means, covariances = (
        torch.from_numpy(values) for values in (model.weights_, model.means_, model.covariances_)
    )
    return GaussianMixturePrior(weights.float(), means.float(), torch.linalg.cholesky(covariances.double()).float())


@torch.no_grad()
def mixture_of(net: Any, data: ImageSource) -> GaussianMixturePrior:
    """The mixture of an autoencoder's latents of training images, from the cache or fitted now.

    Args:
        net: The autoencoder, in eval mode.
        data: The data set, set up; up to 20,000 images, evenly spread over its training split, are used.

    Returns:
        The mixture.

    Raises:
        ValueError: If there are too few images, or latents are too large.
    """
    entries = math.prod(latent_shape(net, data.image_shape))
    if entries > MOST_ENTRIES:
        raise ValueError(
            f"--prior gmm fits covariances of whole latents, and these have {entries} entries, which would take hours; "
            f"it is for latents of up to {MOST_ENTRIES}: leave --prior out, or train latent diffusion."
        )
    images = data.reference_images("train")
    count = min(MOST_FITTED, len(images))
    fitted = {
        "kind": f"Gaussian mixture, full covariances, ridge {RIDGE}, at most {ITERATIONS} iterations from k-means++",
        "components": COMPONENTS,
        "images": count,
        "autoencoder_sha256": weights_hash(net.state_dict()),
        "fingerprint": data.fingerprint("train"),
    }
    device = next(net.parameters()).device

    def fit() -> dict[str, Tensor]:
        rows, parts = torch.arange(count) * len(images) // count, []
        generator = keyed_generator("mixture")
        for chunk in torch.split(rows, 256):
            posterior = net.encode(from_uint8(take(images, chunk).to(device)))
            noise = torch.randn(posterior.mean.shape, generator=generator)
            parts.append(posterior.sample(noise.to(device)).flatten(1).cpu())
        mixture = fit_mixture(torch.cat(parts))
        return {"weights": mixture.weights, "means": mixture.means, "factors": mixture.factors}

    return GaussianMixturePrior(**kept_tensors("priors", fitted, fit), fitted=fitted)
