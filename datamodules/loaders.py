"""Loaders: from an array of images to batches on the training device, without per-sample Python.

A split is one uint8 array (N, C, H, W) and its labels. A batch is cut out of the array in one indexing operation,
augmented and normalised as a whole. What a batch holds is a function of keys alone:

    order of epoch e:        perm = permutation of N keyed by (seed, e)
    global batch g of B:     perm[g * B : (g + 1) * B], a last incomplete one is dropped
    rank r of W ranks:       rows [r::W] of the global batch

so that the ranks together hold the global batch, no image comes twice in an epoch, and a run resumed in mid-epoch skips
the batches before g. Evaluation reads a split in its own order, rank r the rows [r::W], each image exactly once.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from diffusion_lit.diffusion.rng import keyed_generator, run_seed, send

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class Stored(Protocol):
    """Images that are read when rows are asked for, as of an array: uint8 (N, C, H, W)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (N, C, H, W)."""

    @property
    def nbytes(self) -> int:
        """Bytes of all images."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any: ...


Array = Tensor | np.ndarray | Stored
"""Images of shape (N, C, H, W): a uint8 tensor, a memory-mapped uint8 array, or what is read as one."""


class Split(NamedTuple):
    """The images of one split, uint8 (N, C, H, W), their classes, int64 (N,), or None, and paired images.

    The last `given` channels are those of an image that belongs to each, which batches have under that name.
    """

    images: Array
    labels: Tensor | None
    given: int = 0

    @property
    def own(self) -> Array:
        """The images without those that are paired with them."""
        return self.images[:, : -self.given] if self.given else self.images


class Key(NamedTuple):
    """Names one batch of one rank: its epoch, its number in the epoch, and the rows of the split in it."""

    epoch: int
    batch: int
    rows: Tensor


Augment = Callable[[Tensor, Key], Tensor]
"""Changes the uint8 images (B, C, H, W) of a batch, given its key."""


def normalise(images: Tensor) -> Tensor:
    """Maps uint8 images 0..255 to float32 in [-1, 1], both ends exact."""
    return images.to(torch.float32).div_(127.5).sub_(1.0)


class BatchLoader:
    """Iterates over batches of a split; subclasses say which rows each batch has.

    It is no `torch.utils.data.DataLoader`, so that Lightning never replaces its sampler, whatever
    `use_distributed_sampler` is.

    Args:
        split: The images and labels.
        batch_size: Images per global batch, a multiple of the number of ranks.
        world: Number of ranks.
        rank: This rank.
        num_workers: Threads that read ahead, for an array on a slow disk; 0 reads when a batch is asked for.
        device: Where batches are wanted.
        augment: Changes the images of a batch.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        world: int = 1,
        rank: int = 0,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        augment: Augment | None = None,
    ) -> None:
        if batch_size % world:
            raise ValueError(
                f"batch_size is {batch_size}, which does not divide over {world} ranks; batch_size counts the images "
                f"of all ranks together, so choose a multiple of {world}."
            )
        self.images = split.images
        self.labels = None if split.labels is None else split.labels.to(device)
        self.given = split.given
        self.batch_size = batch_size
        self.world = world
        self.rank = rank
        self.num_workers = num_workers
        self.device = torch.device(device)
        self.augment = augment

    def keys(self) -> Iterator[Key]:
        """The keys of the batches that this iteration has."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        keys = self.keys()  # a generator: nothing is decided before the first batch is asked for
        if self.num_workers == 0:
            for key in keys:
                yield self.batch(self.read(key.rows), key)
            return
        with ThreadPoolExecutor(self.num_workers, "read-ahead") as readers:  # reading a disk does not hold the GIL
            ahead: deque[tuple[Key, Future[Tensor]]] = deque()
            try:
                while True:
                    for key in itertools.islice(keys, 2 * self.num_workers - len(ahead)):
                        ahead.append((key, readers.submit(self.read, key.rows)))
                    if not ahead:
                        return
                    key, images = ahead.popleft()
                    yield self.batch(images.result(), key)
            finally:  # also where the epoch is left before its end
                for _, images in ahead:
                    images.cancel()

    def read(self, rows: Tensor) -> Tensor:
        """Cuts images out of the array.

        Args:
            rows: Their places, int64 (B,).

        Returns:
            Shape (B, C, H, W), uint8.
        """
        if isinstance(self.images, Tensor):
            return self.images.index_select(0, rows)  # many times faster than indexing on a CPU
        return torch.from_numpy(self.images[rows.numpy()])

    def batch(self, images: Tensor, key: Key) -> dict[str, Tensor]:
        """Makes a batch.

        Args:
            images: Its images, uint8 (B, C, H, W).
            key: Its key.

        Returns:
            "image" in [-1, 1], "index" (rows of the split) and, where there are labels, "label", and where images are
            paired, "given", in [-1, 1], all on the device.
        """
        images = send(images, self.device)
        if self.augment is not None:
            images = self.augment(images, key)
        rows = send(key.rows, self.device)
        batch = {"image": normalise(images), "index": rows}
        if self.given:
            batch["image"], batch["given"] = batch["image"].tensor_split((-self.given,), dim=1)
        if self.labels is not None:
            batch["label"] = self.labels[rows]
        return batch

    def state_dict(self) -> dict[str, int]:
        """Empty: the position comes from the trainer's counters, but the method marks the loader as resumable."""
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Nothing to restore."""


class TrainLoader(BatchLoader):
    """Batches in keyed random order; an incomplete last batch is dropped.

    In training the epoch and the batches already seen come from the trainer when the first batch is requested, also
    when a run is resumed; elsewhere `set_epoch` sets the epoch.
    """

    trainer: "Trainer | None" = None
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration, where no trainer does.

        Args:
            epoch: Number of the epoch, from 0.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def position(self) -> tuple[int, int]:
        """The epoch, and the number of its batches that were seen before."""
        trainer = self.trainer
        if trainer is None or not trainer.training or trainer.train_dataloader is not self:
            return self.epoch, 0
        seen = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return trainer.current_epoch, seen if seen < len(self) else 0

    def keys(self) -> Iterator[Key]:
        """The batches of the epoch that are still to come."""
        epoch, seen = self.position()
        fixed = getattr(self.trainer, "overfit_batches", 0) > 0  # the same few batches at every epoch
        generator = keyed_generator("order", run_seed(), 0 if fixed else epoch)
        for batch, rows in enumerate(self.shuffled(generator, seen), seen):
            yield Key(epoch, batch, rows[self.rank :: self.world])

    def shuffled(self, generator: torch.Generator, seen: int) -> Iterator[Tensor]:
        """The rows of each global batch of an epoch.

        Args:
            generator: Keyed by the epoch.
            seen: Batches to leave out at the start.

        Returns:
            int64 (batch_size,) for each batch, an incomplete last one being dropped.
        """
        order = torch.randperm(len(self.images), generator=generator)
        if isinstance(self.images, Tensor):
            order = order.to(self.images.device)
        for batch in range(seen, len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]


class EvalLoader(BatchLoader):
    """A split in its own order, each image exactly once over all ranks, without padding.

    Every rank has the same number of batches: a remainder with fewer images than ranks joins the batch before it.
    """

    def __len__(self) -> int:
        return len(self.starts())

    def starts(self) -> Sequence[int]:
        """Where each global batch starts."""
        count = len(self.images)
        starts = list(range(0, count, self.batch_size))
        if len(starts) > 1 and count - starts[-1] < self.world:
            starts.pop()
        return starts

    def keys(self) -> Iterator[Key]:
        """All batches of the split."""
        starts = self.starts()
        for batch, (start, end) in enumerate(zip(starts, [*starts[1:], len(self.images)], strict=True)):
            yield Key(0, batch, torch.arange(start + self.rank, end, self.world))
