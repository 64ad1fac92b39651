"""Random draws as functions of keys, with no hidden state.

Training draws are keyed by (seed, epoch, batch) and sampling draws by (seed + i), so that neither a restart, nor the
batch size, nor the number of ranks changes what is drawn. A key is any tuple of integers and strings.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from diffusion_lit.words import counted


def run_seed() -> int:
    """The seed of the run: Lightning's `seed_everything`, 0 where none was set."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def keyed_seed(*key: int | str) -> int:
    """Hashes a key to a seed.

    Args:
        key: Integers and strings that name the draw, for example `(seed, epoch, batch)`.

    Returns:
        A seed in [0, 2^63), the same on every machine; distinct keys give unrelated seeds.
    """
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def keyed_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator whose stream is a function of the key and the kind of device alone.

    Args:
        key: As in `keyed_seed`.
        device: Where the generator draws.

    Returns:
        A seeded `torch.Generator`.
    """
    return torch.Generator(device).manual_seed(keyed_seed(*key))


def seed_default_generators(seed: int, device: torch.device) -> None:
    """Seeds torch's default generators of the CPU and of a device, as `torch.manual_seed` does for every kind there is.

    `torch.manual_seed` records a stack trace for each absent kind of device, which takes 0.6 ms per training step,
    against 0.006 ms here (2 cores of a Xeon).

    Args:
        seed: In [0, 2^63).
        device: The device; an accelerator's current one is seeded.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(seed)


def network_draws(device: torch.device) -> tuple[Tensor, ...]:
    """Where torch's default generators stand, from which a network draws its dropout.

    Args:
        device: Where the network works.

    Returns:
        The state of the CPU's generator and, for an accelerator, of its own.
    """
    states = (torch.default_generator.get_state(),)
    return states if device.type == "cpu" else (*states, getattr(torch, device.type).get_rng_state())


@contextmanager
def repeating(states: tuple[Tensor, ...], device: torch.device) -> Iterator[None]:
    """Within this context, a network draws the same dropout once more; later draws go on as if it had not.

    Args:
        states: From `network_draws`, before the network drew.
        device: Where it works.
    """
    now = network_draws(device)
    try:
        _set_draws(states, device)
        yield
    finally:
        _set_draws(now, device)


def _set_draws(states: tuple[Tensor, ...], device: torch.device) -> None:
    torch.default_generator.set_state(states[0])
    if device.type != "cpu":
        getattr(torch, device.type).set_rng_state(states[1])


BLOCK = 64  # images of a split that share a generator


def drawn_by_index(index: Tensor, draw: Callable[[torch.Generator], Tensor], *key: int | str) -> Tensor:
    """Draws for held-out images, which depend on the image and not on its batch or rank.

    Images 0 to 63 of a split share a generator, 64 to 127 the next. Draws are made on the CPU, so that `val/loss` uses
    the same draws on every device.

    Args:
        index: Rows of the split, int64 (B,), on the device where the draws are wanted.
        draw: Makes the draws of `BLOCK` images from a generator, as the rows of a tensor.
        key: Names the draw.

    Returns:
        The rows of these images.
    """
    rows = index.cpu()
    blocks, which = torch.unique(rows // BLOCK, return_inverse=True)
    drawn = [draw(keyed_generator(*key, block)) for block in blocks.tolist()]
    return send(torch.cat(drawn)[which * BLOCK + rows % BLOCK], index.device)


def send(value: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, where the host does not wait for what the device has still to do.

    Args:
        value: Any tensor.
        device: Where it is wanted.

    Returns:
        It, or a copy. From a device to the CPU the host waits, since it would read what is not there yet.
    """
    if value.device.type != "cpu" or device.type in ("cpu", "mps"):
        return value.to(device)
    if device.type == "cuda" and value.ndim > 1:  # CUDA takes what is small at once, pinned or not
        value = value.contiguous().pin_memory()
    return value.to(device, non_blocking=True)


class SeededNoise:
    """Gaussian noise in which row i comes from a generator of its own.

    For the argument `noise` of samplers: sample i depends on its seed alone, whatever its batch. Draws are made on the
    CPU, so that a GPU sees the same numbers.

    Args:
        seeds: One seed per row.
    """

    def __init__(self, seeds: Iterable[int]) -> None:
        self.generators = [keyed_generator("sample", int(seed)) for seed in seeds]

    def __call__(self, x: Tensor) -> Tensor:
        """Draws the next noise.

        Args:
            x: Any tensor of shape (B, ...), with B the number of seeds.

        Returns:
            Standard normal noise of x's shape, dtype and device, drawn in float32 (float64 where x is float64).

        Raises:
            ValueError: If x has another number of rows than there are seeds.
        """
        if x.shape[0] != len(self.generators):
            raise ValueError(
                f"Noise for {counted(x.shape[0], 'sample')} was asked of {counted(len(self.generators), 'seed')}; "
                "give one each."
            )
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        noise = torch.empty(x.shape, dtype=dtype)
        for row, generator in zip(noise, self.generators, strict=True):
            row.normal_(generator=generator)
        return send(noise, x.device).to(x.dtype)
