"""Non-leaking augmentation: each image is transformed, and the network is conditioned on the transform.

A label of nine numbers describes the transform: `draw` makes labels from a generator, and `apply` transforms images by
labels. A network that gets the labels in training, and zeros (the identity) when sampling, learns from augmented images
without generating any.

| label | meaning                                                                      | drawn as            |
| ----- | ---------------------------------------------------------------------------- | ------------------- |
| 0     | mirror left and right                                                        | 0 or 1              |
| 1     | mirror up and down                                                           | 0 or 1, then kept   |
| 2     | a: enlarge by 2^(0.2 a)                                                      | a ~ N(0, 1)         |
| 3, 4  | cos(theta) - 1, sin(theta): turn counter-clockwise by theta                  | theta ~ U(-pi, pi)  |
| 5, 6  | w cos(2 phi), w sin(2 phi): stretch by 2^(0.2 w) along the axis at angle phi | w ~ N(0, 1), phi 0  |
|       | (counter-clockwise from the x axis) and by 2^(-0.2 w) across it              | or U(-pi, pi)       |
| 7, 8  | move right by 0.125 W and down by 0.125 H, times these                       | N(0, 1) each        |

A point p of the image, from its centre, moves to translation + stretch(turn(2^(0.2 a) p)), after the mirrors. Each
transform happens independently with its own probability. As in the source, a mirror is drawn from {0, 1} first and then
kept with that probability, so that up-down mirrors are half as frequent as the rest.

Against aliasing the source upsamples twofold with a wavelet filter (sym6) before the transform and filters down after
it. Here the image is sampled once, bicubically, without a filter: reductions (label 2 below 0, stretches) alias details
of one pixel.

The label holds twice the angle of the stretch, where the paper has the angle itself: there (w, phi) and (-w, phi + pi)
have the same label but are different transforms.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_lit.checks import check_share
from diffusion_lit.nets.layers import no_autocast

AUGMENT_DIM = 9
"""Length of an augmentation label: the `augment_dim` of a network that is trained with `Augment`."""

SCALE_OCTAVES = 0.2
TRANSLATE_FRACTION = 0.125


class Augment:
    """Random flips, scalings, rotations, stretches and translations of images, with labels that say which.

    Args:
        probability: Probability of each transform but the mirrors (EDM: 0.12 for CIFAR-10, 0.15 for faces).
        mirror: Mirror left and right with probability 1/2.
        flip: Mirror up and down, with half the probability.
        scale: Enlarge or reduce.
        rotate: Turn by any angle.
        stretch: Stretch along one axis and shrink across it.
        translate: Move.

    Raises:
        ValueError: `probability` is not in [0, 1].

    Source: Karras 2022, arXiv 2206.00364, appendix F.2 and table 6.
    """

    def __init__(
        self,
        probability: float = 0.12,
        mirror: bool = True,
        flip: bool = True,
        scale: bool = True,
        rotate: bool = True,
        stretch: bool = True,
        translate: bool = True,
    ) -> None:
        check_share(probability=probability, hint="; EDM takes 0.12 for CIFAR-10")
        self.probability = probability
        self.mirror = mirror
        self.flip = flip
        self.scale = scale
        self.rotate = rotate
        self.stretch = stretch
        self.translate = translate

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw labels for n images.

        The number of draws depends on n alone, so that a keyed generator repeats the labels; rows of a batch are
        independent, so that each device can draw for the whole batch and take its rows.

        Args:
            n: Number of images.
            generator: Where all randomness comes from.

        Returns:
            Labels float32, shape (n, 9), on the generator's device.
        """
        device = generator.device
        uniform = torch.rand(n, 9, generator=generator, device=device)
        normal = torch.randn(n, 4, generator=generator, device=device)
        on = uniform[:, :6] < self.probability
        theta = (uniform[:, 6] * 2 - 1) * math.pi
        phi = (uniform[:, 7] * 2 - 1) * math.pi * (uniform[:, 8] < 0.5)
        labels = [
            (uniform[:, 0] < 0.5).float() * self.mirror,
            (uniform[:, 1] < self.probability / 2).float() * self.flip,
            normal[:, 0] * on[:, 2] * self.scale,
            (theta.cos() - 1) * on[:, 3] * self.rotate,
            theta.sin() * on[:, 3] * self.rotate,
            normal[:, 1] * (2 * phi).cos() * on[:, 4] * self.stretch,
            normal[:, 1] * (2 * phi).sin() * on[:, 4] * self.stretch,
            normal[:, 2] * on[:, 5] * self.translate,
            normal[:, 3] * on[:, 5] * self.translate,
        ]
        return torch.stack(labels, dim=1)

    def __call__(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw labels for the images (B, C, H, W) and apply them; return both."""
        labels = self.draw(len(images), generator).to(images.device)
        return augment_images(images, labels), labels


def augment_images(images: Tensor, labels: Tensor) -> Tensor:
    """Transform each image by its label.

    Mirrors are exact. The rest is one affine map, resampled once with bicubic interpolation (exact for quarter turns of
    a square and shifts by whole pixels), with reflection at the border. A label of zeros returns the image bit for bit.

    Args:
        images: Images, shape (B, C, H, W), any floating-point type.
        labels: Augmentation labels, shape (B, 9).

    Returns:
        Images of the same shape and type.

    Raises:
        ValueError: The labels do not have the shape (B, 9).
    """
    if labels.shape != (len(images), AUGMENT_DIM):
        raise ValueError(f"Labels for {len(images)} images have shape ({len(images)}, 9), not {tuple(labels.shape)}.")
    labels = labels.to(images.device, torch.float32)
    mirrored = torch.where(labels[:, 0, None, None, None] > 0.5, images.flip(3), images)
    mirrored = torch.where(labels[:, 1, None, None, None] > 0.5, mirrored.flip(2), mirrored)
    moves = labels[:, 2:].abs().amax(dim=1) > 0
    with no_autocast(images.device):  # bfloat16 coordinates would miss by a pixel
        theta = inverse_affine(labels, images.shape[2], images.shape[3])
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        wide = mirrored.to(torch.promote_types(images.dtype, torch.float32))
        moved = F.grid_sample(wide, grid.to(wide.dtype), "bicubic", "reflection", align_corners=False)
    return torch.where(moves[:, None, None, None], moved.to(images.dtype), mirrored)


def inverse_affine(labels: Tensor, height: int, width: int) -> Tensor:
    """Where each output point comes from: the inverse map, shape (B, 2, 3), in coordinates from -1 to 1 on each axis.

    In pixels, with y downwards, p_out = t + K R s p_in, so p_in = R^T K^-1 (p_out - t) / s, where R turns by -theta
    (counter-clockwise as seen) and K is the exponential of the symmetric traceless matrix that the stretch's label
    holds: with w' = 0.2 ln(2) w, K = cosh(w') I + sinh(w') [[cos 2phi, -sin 2phi], [-sin 2phi, -cos 2phi]].
    """
    cosine, sine = labels[:, 3] + 1, labels[:, 4]
    turn = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)  # R^T
    u, v = -labels[:, 5] * SCALE_OCTAVES * math.log(2), labels[:, 6] * SCALE_OCTAVES * math.log(2)  # of K^-1
    w = torch.hypot(u, v)
    ratio = torch.where(w > 1e-6, w.sinh() / w.clamp_min(1e-6), 1.0)
    unstretch = torch.stack(
        [torch.stack([w.cosh() + ratio * u, ratio * v], 1), torch.stack([ratio * v, w.cosh() - ratio * u], 1)], 1
    )
    linear = turn @ unstretch * (2 ** (-SCALE_OCTAVES * labels[:, 2]))[:, None, None]
    linear[:, 0, 1] *= height / width  # from pixels to units, by numbers that no device has to be given
    linear[:, 1, 0] *= width / height
    offset = -(linear @ (2 * TRANSLATE_FRACTION * labels[:, 7:9, None]))
    return torch.cat([linear, offset], dim=2)
