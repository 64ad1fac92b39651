"""Generating what is measured: seeds, classes, and shards that ranks share and a restart finds again.

Sample i has the seed `seed + i`, and without labels of the user's it draws its class from the training set's
frequencies with its own generator, so that it is a function of its index alone. The samples are cut into shards of
fixed size; rank r of W makes shards r, r + W, ... and writes the features of each with the record of all that
determines them. A shard that is there under the same record is not made again, one that is there under another is.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from diffusion_lit.checks import check_count
from diffusion_lit.diffusion.images import to_uint8
from diffusion_lit.diffusion.rng import keyed_generator
from diffusion_lit.evaluation.features import FeatureExtractor, Features
from diffusion_lit.modules.guides import guide_beside
from diffusion_lit.modules.protocols import ImageSource, Model, Settings
from diffusion_lit.storage.hashing import key_of
from diffusion_lit.storage.tensors import read_tensors, write_tensors
from diffusion_lit.words import counted

MOST_PER_SHARD = 500
SHARDS = 32  # minimum number of shards if there are enough samples, so that ranks share the work evenly


@dataclass(frozen=True)
class GenerationJob:
    """Samples of one setting.

    Args:
        sampling: How they are drawn.
        count: Number of samples.
        seed: Seed of sample 0.
        labels: Classes int64 (count,), or None.
        record: Plain values that determine sample i beside its index: checkpoint, settings, labels, extractor.
        folder: Where its shards go.
        batch_size: Samples drawn at a time.
        keep_images: Whether the shards keep the images too.
        save_to: Folder for PNG files, or None.
    """

    sampling: Settings
    count: int
    seed: int
    labels: Tensor | None
    record: dict[str, Any]
    folder: Path
    batch_size: int = 64
    keep_images: bool = False
    save_to: Path | None = None

    def __post_init__(self) -> None:
        """Checks the numbers."""
        check_count(count=self.count, batch_size=self.batch_size)
        check_count(0, seed=self.seed)

    def shards(self) -> list[range]:
        """The indices of each shard."""
        size = min(MOST_PER_SHARD, -(-self.count // SHARDS))
        size = max(size, min(16, self.count), min(self.batch_size, self.count))
        return [range(start, min(start + size, self.count)) for start in range(0, self.count, size)]

    def shard_record(self, rows: range) -> dict[str, Any]:
        """All that determines a shard."""
        more = {"images": self.keep_images, "saved": None if self.save_to is None else str(self.save_to)}
        return {**self.record, **more, "seed": self.seed, "start": rows.start, "stop": rows.stop}

    def path(self, rows: range) -> Path:
        """The file of a shard.

        Returns:
            A path below the job's own folder.
        """
        return self.folder / key_of(self.record)[:16] / f"shard_{rows.start:08d}.safetensors"


@dataclass(frozen=True)
class Samples:
    """The samples of a job, in the order of the indices.

    Args:
        features: Their features.
        images: The images, uint8 (N, C, H, W); an empty tensor (0,) where they were not kept.
        labels: Their classes, or None.
        clipped: Share of the values that overshot [-1, 1] by more than 0.1 and were clipped.
        forwards: Network forwards per sample.
        seconds: Time that generating took, all ranks together.
    """

    features: Features
    images: Tensor
    labels: Tensor | None
    clipped: float
    forwards: float
    seconds: float


def generate_shards(
    job: GenerationJob,
    module: Model,
    extractor: FeatureExtractor,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Makes this rank's shards; existing ones are reused.

    Args:
        job: What to make.
        module: The module with its average weights, on the device that shall do the work.
        extractor: A loaded extractor.
        rank: This process.
        world: Number of processes.
        progress: Called with the number of samples after each batch.
    """
    for rows in job.shards()[rank::world]:
        record = job.shard_record(rows)
        if read_tensors(job.path(rows), record) is None:
            write_tensors(job.path(rows), _make_shard(job, rows, module, extractor, progress), record)
        elif progress is not None:
            progress(len(rows))


def draw_samples(
    job: GenerationJob, module: Model, extractor: FeatureExtractor, progress: Callable[[int], object] | None = None
) -> Samples:
    """Makes the samples of a job in this process; shards that exist are reused. See `generate_shards`."""
    generate_shards(job, module, extractor, progress=progress)
    return gather_shards(job)


def gather_shards(job: GenerationJob) -> Samples:
    """Joins the shards of all ranks.

    Raises:
        ValueError: If a shard is missing or belongs elsewhere, or the samples are not each there once.
    """
    parts: dict[str, list[Tensor]] = {}
    for rows in job.shards():
        tensors = read_tensors(job.path(rows), job.shard_record(rows))
        if tensors is None:
            raise ValueError(f"The shard {job.path(rows)} is missing or of other samples; run the same command again.")
        for name, tensor in tensors.items():
            parts.setdefault(name, []).append(tensor)
    whole = {name: torch.cat(tensors) for name, tensors in parts.items()}
    if not torch.equal(whole["seeds"], torch.arange(job.seed, job.seed + job.count)):
        raise ValueError(f"The shards under {job.folder} hold samples twice or not at all; delete that folder.")
    return Samples(
        Features(whole["features"], whole.get("logits")),
        whole.get("images", torch.empty(0)),
        job.labels,
        clipped=float(whole["clipped"].double().mean()),
        forwards=float(whole["forwards"].sum()) / job.count,
        seconds=float(whole["seconds"].sum()),
    )


def _make_shard(
    job: GenerationJob,
    rows: range,
    module: Model,
    extractor: FeatureExtractor,
    progress: Callable[[int], object] | None,
) -> dict[str, Tensor]:
    """Generates a shard's samples and their features, in batches."""
    started = time.perf_counter()
    features, images, clipped = [], [], []
    with counted_forwards(module) as forwards:
        for start in range(rows.start, rows.stop, job.batch_size):
            batch = range(start, min(start + job.batch_size, rows.stop))
            seeds = [job.seed + index for index in batch]
            labels = None if job.labels is None else job.labels[batch.start : batch.stop]
            x = module.generate(seeds, labels, job.sampling)
            clipped.append((x.abs() > 1.1).flatten(1).double().mean(1).cpu())
            pixels = to_uint8(x)
            features.append(extractor.features(pixels))
            if job.keep_images:
                images.append(pixels)
            if job.save_to is not None:
                save_pngs(pixels, batch, job.save_to)
            if progress is not None:
                progress(len(batch))
    made = {
        **Features.cat(features).tensors(),
        "seeds": torch.arange(rows.start, rows.stop) + job.seed,
        "clipped": torch.cat(clipped),
        "forwards": torch.tensor([forwards[0]]),
        "seconds": torch.tensor([time.perf_counter() - started], dtype=torch.float64),
    }
    return made | ({"images": torch.cat(images)} if images else {})


@contextmanager
def counted_forwards(module: Model) -> Iterator[list[int]]:
    """Within this context, the first of the list is on how many images the networks were evaluated.

    Args:
        module: The model, whose guide counts too.
    """
    forwards = [0]

    def count(net: Any, args: tuple[Tensor, ...], made: Tensor) -> None:
        forwards[0] += len(args[0])

    guide = guide_beside(module)
    nets = (module.net, *([] if guide is None else [guide.denoiser.net]))
    hooks = [net.register_forward_hook(count) for net in nets]
    try:
        yield forwards
    finally:
        for hook in hooks:
            hook.remove()


def save_pngs(images: Tensor, indices: Sequence[int], folder: Path) -> None:
    """Writes images as PNG files called by their index.

    Args:
        images: Images uint8 (N, C, H, W) with 1, 3 or 4 channels.
        indices: One number per image.
        folder: Where they go.

    Raises:
        ValueError: If the images have another number of channels.
    """
    if images.shape[1] not in (1, 3, 4):
        raise ValueError(f"Images of {images.shape[1]} channels cannot be written as PNG; leave --save_samples out.")
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in zip(indices, images, strict=True):
        to_pil_image(image).save(folder / f"{index:06d}.png")


def class_frequencies(data: ImageSource, num_classes: int) -> Tensor | None:
    """How often each class occurs in the training split.

    Args:
        data: The data set, set up.
        num_classes: Number of the model's classes, 0 for an unconditional model.

    Returns:
        Float64 shares of shape (num_classes,) that sum to 1, or None for an unconditional model; uniform where the data
        has no labels.

    Raises:
        ValueError: If the data has more classes than the model.
    """
    if num_classes == 0:
        return None
    labels = data.reference_labels("train")
    if labels is None:
        return torch.full((num_classes,), 1 / num_classes, dtype=torch.float64)
    counts = torch.bincount(labels, minlength=num_classes).double()
    if len(counts) > num_classes:
        raise ValueError(f"The data has {counted(len(counts), 'class')} and the model {num_classes}; they do not fit.")
    return counts / counts.sum()


def draw_labels(seeds: Sequence[int], frequencies: Tensor | None) -> Tensor | None:
    """Draws the class of each sample with the sample's own generator.

    Args:
        seeds: One seed per sample.
        frequencies: Share of each class, as from `class_frequencies`, or None.

    Returns:
        Class indices int64 (N,), a function of each seed alone, or None without classes.
    """
    if frequencies is None:
        return None
    edges = frequencies.cumsum(0)
    draws = [torch.rand((), generator=keyed_generator("class", seed), dtype=torch.float64) for seed in seeds]
    drawn = torch.searchsorted(edges, torch.stack(draws) * edges[-1], right=True)
    return drawn.clamp(max=int(frequencies.nonzero().max()))
