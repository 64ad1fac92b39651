"""From features to the figures of a report: against each reference, per class, memorisation, single images."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion_lit.evaluation.errors import DRAWS, HALF, SHARE, standard_errors
from diffusion_lit.evaluation.external import is_file, reference_from_file
from diffusion_lit.evaluation.extrapolation import POINTS
from diffusion_lit.evaluation.features import FeatureExtractor, Features
from diffusion_lit.evaluation.generation import GenerationJob, Samples
from diffusion_lit.evaluation.memorization import compare, held_out_split, worst_triples
from diffusion_lit.evaluation.metrics import (
    ISC_SPLITS,
    KID_SUBSETS,
    Reference,
    Statistics,
    compute_metrics,
    frechet_distance,
    kid_subset_size,
    summarise,
    too_few,
)
from diffusion_lit.evaluation.monge import DIRECTIONS
from diffusion_lit.evaluation.neighbours import NEIGHBOURS, PRECISION_NEIGHBOURS
from diffusion_lit.evaluation.reference import real_pairs, reference_of
from diffusion_lit.evaluation.single_image import single_image_metrics
from diffusion_lit.modules.protocols import DataSet, ImageSource, Interpolates, Model

MOST_COMPARED = 5000  # maximum number of samples whose neighbours are searched


@dataclass(frozen=True)
class ReportedReference:
    """One reference of a report.

    Args:
        reference: Its features and statistics.
        summary: Its record, the settings of the metrics, and the floor, as plain values.
        warnings: What to say of it.
    """

    reference: Reference
    summary: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def other_split(data: ImageSource, name: str) -> str | None:
    """A split whose images are not in the reference, for the floor.

    Args:
        data: The data, set up.
        name: The reference: a split, several joined by "+", or a file.

    Returns:
        "test", or "train" where the reference is the test split; None where there is no other.
    """
    parts = [] if is_file(name) else name.split("+")
    prints = {data.fingerprint(part) for part in parts}
    others = [one for one in ("test", "train") if one not in parts and data.fingerprint(one) not in prints]
    sizes = {one: min(2, len(data.reference_images(one))) for one in others}  # 2 are a set
    return max((one for one in others if sizes[one]), key=lambda one: sizes[one], default=None)


def overshooting(samples: Samples, module: Model) -> list[str]:
    """What to warn of where many values lie outside the range of images.

    Those of a model with latents do as they should: its decoder's likelihood counts all below -1 as black and all above
    1 as white.

    Args:
        samples: The samples.
        module: The model.

    Returns:
        A sentence, or none.
    """
    if samples.clipped <= 0.05 or isinstance(module, Interpolates):
        return []
    return [f"{samples.clipped:.0%} of the samples' values overshot [-1, 1] by more than 0.1 and were clipped."]


@dataclass(frozen=True)
class Evaluation:
    """What is measured, and how; its methods give the figures.

    Args:
        plan: The options.
        module: The model, on the device.
        data: The data, set up.
        extractor: The loaded extractor, on the device.
        device: Where to compute.
    """

    plan: Any
    module: Model
    data: DataSet
    extractor: FeatureExtractor
    device: torch.device

    def references(self) -> dict[str, ReportedReference]:
        """All references of the report with their floors, by name.

        Raises:
            ValueError: If a file does not belong to the extractor or the samples, or there is no such split.
        """
        found, shape, size = {}, self.module.image_shape, self.plan.batch_size
        with tqdm(desc=f"{self.extractor.name} features of real images", unit="img", leave=False, delay=2) as bar:

            def read(split: str, limit: int | None = None) -> Reference:
                return reference_of(self.data, split, self.extractor, size, limit, bar.update)

            for name in [word.strip() for word in self.plan.reference.split(",")]:
                if is_file(name):
                    reference = reference_from_file(Path(name), self.extractor, shape, size, bar.update)
                else:
                    reference = read(name)
                _ = reference.statistics  # or refuses a single image, before the held-out ones are read
                other = other_split(self.data, name)
                held_out = None if other is None else read(other, self.plan.total).features
                found[name] = self._reported(reference, held_out, other)
        return found

    def _reported(self, reference: Reference, held_out: Features | None, other: str | None) -> ReportedReference:
        """A reference with its floor and its warnings."""
        plan = self.plan
        summary: dict[str, Any] = {"record": reference.record}
        size = None if reference.features is None else kid_subset_size(plan.num_samples, len(reference.features))
        summary["metrics"] = {
            "kernel_distance": None if size is None else {"subsets": KID_SUBSETS, "subset_size": size},
            "precision_recall_neighbours": None if size is None else PRECISION_NEIGHBOURS,
            "density_coverage_neighbours": None if size is None else NEIGHBOURS,
            "mind_directions": None if size is None else DIRECTIONS,
            "extrapolation_points": POINTS,
            "errors": f"of a block over draws of both sides: by {DRAWS} samples of {SHARE:.0%} (extrapolation "
            f"and Inception score: {HALF:.0%}); of the kernel distance by its known variance",
            "inception_score_splits": min(ISC_SPLITS, plan.num_samples),
        }
        warnings = []
        dimension = len(reference.statistics.mu)
        for count in {plan.num_samples, reference.count or plan.num_samples}:
            warning = too_few(count, dimension)
            if warning:
                warnings.append(warning)
        pairs = real_pairs(reference, held_out, plan.num_samples, plan.num_blocks)
        if pairs:
            count = len(pairs[0][0])
            figures = [compute_metrics(self.extractor, drawn, rest) for drawn, rest in pairs]
            errors = standard_errors(self.extractor, *pairs[0])
            summary["floor"] = {"count": count, "held_out": other, "figures": summarise(figures, errors)}
            if count != plan.num_samples:
                warnings.append(
                    f"There are {count:,} real images that are not in the reference, so that the floor is at n = "
                    f"{count:,} and not at {plan.num_samples:,}; a Fréchet distance falls as n grows."
                )
        else:
            warnings.append("There are too few real images outside the reference for a floor.")
        return ReportedReference(reference, summary, warnings)

    def measure(
        self, job: GenerationJob, samples: Samples, references: dict[str, ReportedReference]
    ) -> tuple[dict[str, Any], list[str], dict[str, Tensor]]:
        """The figures of one setting.

        Args:
            job: What was drawn.
            samples: The samples.
            references: The references by name; none for a model of a single image.

        Returns:
            The entry of the report, what to warn of, and the worst triples (`worst_triples`) by file name.
        """
        result: dict[str, Any] = {
            "sampling": job.sampling.record(),
            "nfe": job.sampling.nfe,
            "network_forwards": samples.forwards,
            "conditional": job.labels is not None,
            "clipped_share": samples.clipped,
            "references": {},
        }
        plan, warnings = self.plan, overshooting(samples, self.module)
        blocks = [
            samples.features[block * plan.num_samples : (block + 1) * plan.num_samples]
            for block in range(plan.num_blocks)
        ]
        for name, one in references.items():
            figures = [compute_metrics(self.extractor, block, one.reference) for block in blocks]
            errors = standard_errors(self.extractor, blocks[0], one.reference)
            result["references"][name] = {"figures": summarise(figures, errors)}
        if plan.per_class:
            result["per_class"], said = self.per_class(samples, references)
            warnings += said
        images: dict[str, Tensor] = {}
        if not references:
            image = torch.as_tensor(self.data.reference_images("train")[0])
            result["single_image"] = single_image_metrics(samples.images, image, self.data.random_flip)
        elif plan.memorization:
            result["memorization"], images = self.memorization(job, samples)
        return result, warnings, images

    def per_class(self, samples: Samples, references: dict[str, ReportedReference]) -> tuple[dict[str, Any], list[str]]:
        """The Fréchet distance of each class, all blocks together.

        Returns:
            For each reference and class the distance and both numbers of images, and what to warn of.

        Raises:
            ValueError: If the samples have no classes.
        """
        if samples.labels is None:
            raise ValueError("The model is unconditional, so that there are no classes for --per_class; leave it out.")
        found: dict[str, Any] = {}
        warnings = []
        for name, one in references.items():
            features, labels = one.reference.features, one.reference.labels
            if features is None or labels is None:
                warnings.append(f"The reference {name} has no labels, so that there is no figure per class against it.")
                continue
            found[name] = {}
            for label in range(self.module.num_classes):
                made = samples.features.features[samples.labels == label]
                real = features.features[labels == label]
                entry: dict[str, Any] = {"generated": len(made), "reference": len(real)}
                if min(len(made), len(real)) >= 2:
                    entry[self.extractor.metric] = frechet_distance(Statistics.of(made), Statistics.of(real))
                if min(len(made), len(real)) <= features.features.shape[1]:
                    warnings.append(
                        "Some classes have fewer images than there are features; compare figures per class only "
                        "at the same numbers."
                    )
                found[name][self.module.class_names[label]] = entry
        return found, sorted(set(warnings))

    def memorization(self, job: GenerationJob, samples: Samples) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Whether the samples, with their images, are nearer to training images than chance allows.

        Returns:
            Figures in feature and in pixel space, and the worst triples of each by file name.
        """
        data, extractor, device = self.data, self.extractor, self.device
        split = held_out_split(data)
        training, held_out = data.reference_images("train"), data.reference_images(split)
        count = min(MOST_COMPARED, len(samples.images))
        images = samples.images[:count]
        known, new = (reference_of(data, one, extractor, self.plan.batch_size).features for one in ("train", split))
        assert known is not None and new is not None
        spaces = {
            extractor.name: compare(samples.features.features[:count], known.features, new.features, device=device)
        }
        if extractor.name != "pixels":
            spaces["pixels"] = compare(images, training, held_out, data.random_flip, device)
        setting = f"{job.sampling.sampler}_{job.sampling.num_steps}_{job.sampling.cfg_scale:g}"
        name = f"{self.plan.path.stem}.memorization_{setting}"
        triples = {
            f"{name}_{space}.png": worst_triples(found, images, training, held_out) for space, found in spaces.items()
        }
        record = {
            "memorised": any(found.memorised for found in spaces.values()),
            "samples": count,
            "training": len(training),
            "held_out": len(held_out),
            "held_out_split": split,
            "spaces": {space: found.record for space, found in spaces.items()},
            "images": "sample | nearest training image | nearest held-out image, worst first: " + ", ".join(triples),
        }
        return record, triples
