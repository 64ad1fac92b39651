"""How well an autoencoder gives held-out images back: rFD, PSNR, SSIM and perceptual distance, each with its floor.

Disjoint blocks of held-out images are encoded to the means of their latents and decoded. Beside each figure stand

    floor        what a perfect autoencoder gets: the images themselves, after rounding to 8 bits
    unrelated    the same figures for another image of the block: the scale of the figure

The perceptual distance is that of `modules.perceptual` in the extractor's own classifier, or another of the data, where
there are classes to train one on; without them in EfficientNet-Lite0, where that is the extractor.
"""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from diffusion_lit.diffusion.images import from_uint8, psnr, take, to_uint8
from diffusion_lit.evaluation.efficientnet import EfficientNetLite0
from diffusion_lit.evaluation.features import FeatureExtractor, full_precision
from diffusion_lit.evaluation.measure import Evaluation, ReportedReference, other_split
from diffusion_lit.evaluation.metrics import Reference, Statistics, check_figures, frechet_distance, summarise
from diffusion_lit.modules.data_classifier import MissingWeights, classifier_of
from diffusion_lit.modules.perceptual import EfficientNetDistance, FeatureDistance, StageDistance
from diffusion_lit.modules.protocols import ImageSource, Reconstructs
from diffusion_lit.modules.quality import ssim
from diffusion_lit.modules.vae import VAE
from diffusion_lit.nets.classifier import ConvClassifier
from diffusion_lit.words import article, counted

SHOWN = 8  # images in the panel
BATCH = 64
SMALLEST_SSIM = 6  # pixels of a side


def reconstructs(plan: Any, module: object) -> bool:
    """Whether an evaluation measures reconstructions.

    Returns:
        What --reconstruction says, or whether the model is a VAE.

    Raises:
        ValueError: If they are asked for and the model gives no images back.
    """
    if plan.reconstruction and not isinstance(module, Reconstructs):
        raise ValueError(f"The model is {article(module)}, which gives no images back; leave --reconstruction out.")
    return isinstance(module, VAE) if plan.reconstruction is None else bool(plan.reconstruction)


def add_reconstructions(
    report: dict[str, Any], evaluation: Evaluation, references: dict[str, ReportedReference]
) -> Tensor | None:
    """Adds reconstructions, measured against the first reference, to a report, or a warning why they cannot be.

    Args:
        report: The report.
        evaluation: The evaluation of a model with `reconstruct`.
        references: The references by name, at least one.

    Returns:
        Images for a panel, as `measure_reconstructions`, or None.

    Raises:
        ValueError: If they cannot be measured and were asked for.
    """
    plan, data = evaluation.plan, evaluation.data
    name, one = next(iter(references.items()))
    split = other_split(data, name)
    least = 2 * plan.num_blocks
    there = 0 if split is None else len(data.reference_images(split))
    if split is None or there < least:
        problem = (
            f"Reconstructions are not measured: {counted(there, 'image', 'is', 'are')} held out beside the "
            f"reference {name}, and {counted(plan.num_blocks, 'block', 'takes', 'take')} at least {least}; give fewer "
            "--num_blocks, or hold out more images."
        )
        if plan.reconstruction:
            raise ValueError(problem)
        report["warnings"].append(problem)
        return None
    entry, panel = measure_reconstructions(evaluation, one.reference, split)
    report["reconstruction"] = {"reference": name, **entry, "images": f"{plan.path.stem}.reconstructions.png"}
    return panel


def measure_reconstructions(evaluation: Evaluation, reference: Reference, split: str) -> tuple[dict[str, Any], Tensor]:
    """Reconstructs held-out images and measures them.

    Args:
        evaluation: The evaluation of a model with `reconstruct`.
        reference: What the Fréchet distance is taken to.
        split: Split of the held-out images.

    Returns:
        The report's entry, and images (n, 2, C, H, W) in [-1, 1] beside their reconstructions for a panel.
    """
    plan, module, extractor, device = evaluation.plan, evaluation.module, evaluation.extractor, evaluation.device
    assert isinstance(module, Reconstructs)
    images = evaluation.data.reference_images(split)
    size = min(plan.num_samples, len(images) // plan.num_blocks)
    distance = perceptual_distance(evaluation.data, extractor, device)
    found: dict[str, list[dict[str, float]]] = {"reconstructions": [], "floor": [], "unrelated": []}
    shown: Tensor | None = None
    for block in range(plan.num_blocks):
        rows = torch.arange(block, size * plan.num_blocks, plan.num_blocks)
        real = take(images, rows)
        made = torch.cat([_restore(module, part.to(device)) for part in torch.split(real, BATCH)])
        for name, others in (("reconstructions", made), ("floor", real), ("unrelated", real.roll(1, 0))):
            figures = nearness(others, real, distance, device)
            features = extractor.extract(others, BATCH).features
            figures[f"r{extractor.metric}"] = frechet_distance(Statistics.of(features), reference.statistics)
            found[name].append(check_figures(figures))
        if shown is None:
            shown = from_uint8(torch.stack([real[:SHOWN], made[:SHOWN]], 1))
    assert shown is not None
    entry: dict[str, Any] = {"split": split, "count": size, "blocks": plan.num_blocks}
    entry |= {name: summarise(figures) for name, figures in found.items()}
    return entry, shown


def nearness(made: Tensor, real: Tensor, distance: FeatureDistance | None, device: torch.device) -> dict[str, float]:
    """Mean PSNR, SSIM and perceptual distance of uint8 images to others.

    Args:
        made: Images uint8 (N, C, H, W).
        real: Images of the same shape.
        distance: A perceptual distance of pairs, or None.
        device: Where to compute.

    Returns:
        Figures by name; SSIM only for images of 6 pixels and more.
    """
    sums: dict[str, float] = {}
    for mine, theirs in zip(torch.split(made, BATCH), torch.split(real, BATCH), strict=True):
        pair = [from_uint8(part.to(device)) for part in (mine, theirs)]
        figures = {"psnr": psnr(*pair).sum()}
        if min(real.shape[-2:]) >= SMALLEST_SSIM:
            figures["ssim"] = ssim(*pair) * len(mine)
        if distance is not None:
            with full_precision(), torch.no_grad():
                figures[f"perceptual_{distance.name}"] = distance(*pair).sum()
        for name, value in figures.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return {name: value / len(real) for name, value in sums.items()}


def perceptual_distance(data: ImageSource, extractor: FeatureExtractor, device: torch.device) -> FeatureDistance | None:
    """The perceptual distance that receipts give, or None where the data has no classes and the extractor no such."""
    network = extractor.network if isinstance(extractor.network, ConvClassifier) else None
    if network is None:
        with suppress(MissingWeights):
            network = classifier_of(data)
    if network is not None:
        return StageDistance(network).to(device).eval()
    if isinstance(extractor, EfficientNetLite0) and extractor.network is not None:
        return EfficientNetDistance(extractor.network).to(device).eval()
    return None


@torch.no_grad()
def _restore(module: Reconstructs, images: Tensor) -> Tensor:
    """Reconstructions of uint8 images, uint8 on the CPU."""
    return to_uint8(module.reconstruct(from_uint8(images))).cpu()
