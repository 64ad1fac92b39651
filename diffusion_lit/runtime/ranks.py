"""Several ranks: how commands start them, share work and synchronise.

What one rank does alone is either short or done by `rank_zero_alone` or `rank_zero_first`: the others wait outside any
collective, which would time out after half an hour, and an error of rank 0 ends them too.
"""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from diffusion_lit.runtime import watchdog
from diffusion_lit.runtime.hardware import pick_device
from diffusion_lit.runtime.internals import trainer_of
from diffusion_lit.runtime.stopping import RunStopped

START_METHODS: dict[str, Any] = {"auto": "popen", "ddp": "popen", "ddp_fork": "fork", "ddp_spawn": "spawn"}
PATIENCE = timedelta(minutes=30)
LOOK = 0.2  # seconds between two looks at rank 0 of those that wait for it
HEARING = 5.0  # seconds that rank 0, failing, gives the others to hear of it
T = TypeVar("T")


def fabric(devices: int, device: str = "auto", strategy: str = "auto") -> Fabric:
    """Processes that share the work, not yet started; this one alone where there are no others.

    Args:
        devices: Number of processes, one per device; as many as torchrun or SLURM has started.
        device: `auto`, `cpu`, or `cuda`, which may be called `gpu`; of one process `cuda:1`, ... too.
        strategy: How they are started: `ddp`, or `ddp_fork` within another Python program.

    Returns:
        The Fabric; call its `launch`.

    Raises:
        ValueError: If a choice is unknown, or there are fewer devices.
    """
    if devices == 1 and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        found = pick_device("cuda" if device == "gpu" else device)
        return Fabric(accelerator=found.type, devices=1 if found.type == "cpu" else [found.index or 0])
    accelerators = {"auto": "auto", "cpu": "cpu", "cuda": "gpu", "gpu": "gpu"}
    if device not in accelerators:
        raise ValueError(f"device is {device!r}, but several devices are asked for; choose auto, cpu or cuda.")
    if strategy not in START_METHODS:
        raise ValueError(f"There is no strategy {strategy!r} here; choose one of {', '.join(START_METHODS)}.")
    here, world = (int(os.environ.get(name, "0")) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    nodes = 1
    if here and world and "LOCAL_RANK" in os.environ and "GROUP_RANK" in os.environ:  # torchrun has started them
        if devices not in (1, here):
            raise ValueError(f"devices is {devices}, but torchrun started {here} processes here; leave devices out.")
        devices, nodes = here, world // here
    try:
        return Fabric(
            accelerator=accelerators[device],
            devices=devices,
            num_nodes=nodes,
            strategy=DDPStrategy(start_method=START_METHODS[strategy], timeout=PATIENCE),
        )
    except RuntimeError as error:  # Lightning's MisconfigurationException is one
        raise ValueError(f"{devices} processes on {device} cannot be started here: {error}") from error


def rank_zero_alone(work: Callable[[], T], what: str) -> T | None:
    """Runs work on rank 0, however long it takes, while the others wait. Called on all ranks.

    Args:
        work: What rank 0 does; no collective operations.
        what: It in words, such as "the reference features".

    Returns:
        What the work gave, on rank 0; None on the others.

    Raises:
        RunStopped: On the others, if rank 0 raised an error or is gone.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    store = dist.distributed_c10d._get_default_store()
    turn = store.add(f"diffusion_lit/turns/{dist.get_rank()}", 1)  # each rank's own count, which agree
    key = f"diffusion_lit/turn/{turn}"
    if dist.get_rank() > 0:
        with watchdog.waiting(what):
            while not store.check([key]):
                time.sleep(LOOK)
        failure = store.get(key).decode()
        store.add(f"{key}/heard", 1)
        if failure:
            raise RunStopped(f"Rank 0 could not go on with {what}: {failure}", status=2)
        return None
    try:
        made = work()
    except BaseException as error:
        store.set(key, f"{type(error).__name__}: {error}")
        until = time.monotonic() + HEARING
        while store.add(f"{key}/heard", 0) < dist.get_world_size() - 1 and time.monotonic() < until:
            time.sleep(LOOK)  # the store is rank 0's own and goes with it
        raise
    store.set(key, "")
    return made


def rank_zero_first(work: Callable[[], T], what: str) -> T:
    """Runs work on rank 0 first, then on the others, which find its caches. Called on all ranks.

    Args:
        work: What each does; no collective operations.
        what: It in words.

    Returns:
        What this rank's work gave.

    Raises:
        RunStopped: On the others, if rank 0 raised an error or is gone.
    """
    made = rank_zero_alone(work, what)
    alone = not dist.is_initialized() or dist.get_rank() == 0
    return cast(T, made) if alone else work()


def meet(what: str) -> None:
    """Waits for all ranks, however long it takes. Called on all ranks.

    Args:
        what: What they come from, in words.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    store = dist.distributed_c10d._get_default_store()
    turn = store.add(f"diffusion_lit/turns/{dist.get_rank()}", 1)
    key = f"diffusion_lit/meeting/{turn}"
    with watchdog.waiting(what):
        store.add(key, 1)
        while store.add(key, 0) < dist.get_world_size():
            time.sleep(LOOK)
    dist.barrier()  # or rank 0, whose own the store is, might end before the others have looked


def share_rows(module: LightningModule, count: int, draw: Callable[[range], Tensor]) -> Tensor:
    """Rows of a tensor, of which each rank draws one contiguous part. Called on all ranks.

    Args:
        module: What draws, attached to a trainer.
        count: Number of rows.
        draw: Draws some rows, (B, ...) for a range of B; called on each rank at most once.

    Returns:
        All rows (count, ...) on the CPU, on every rank; they are what one rank alone would draw.
    """
    trainer = trainer_of(module)
    world, rank = (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)
    if world == 1:
        return draw(range(count)).cpu()
    share = -(-count // world)
    start = min(rank * share, max(0, count - 1))  # a rank without rows repeats the last one
    mine = draw(range(start, max(start + 1, min((rank + 1) * share, count)))).to(module.device)
    padded = torch.zeros(share, *mine.shape[1:], device=module.device, dtype=mine.dtype)
    padded[: len(mine)] = mine
    return gather(padded).flatten(0, 1)[:count].cpu()


def gather(mine: Tensor) -> Tensor:
    """Every rank's tensor, on each of several ranks.

    Args:
        mine: This rank's, of one shape on all ranks.

    Returns:
        Shape (ranks, *mine.shape).
    """
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine.contiguous())
    return torch.stack(parts)


def over_ranks(trainer: Any, value: Tensor, how: str = "mean") -> Tensor:
    """The mean, or the `sum`, of a detached tensor over the ranks of a trainer; the tensor itself without one."""
    if trainer is None or trainer.world_size == 1:
        return value
    strategy = trainer.strategy
    reduced: Tensor = strategy.reduce(value.to(strategy.root_device, copy=True), reduce_op=how)
    return reduced.to(value.device)


def images_of(batch: dict[str, Tensor], trainer: Trainer) -> int:
    """Images that a training step sees on all ranks together.

    Args:
        batch: This rank's batch; the first axis of each tensor is the images.
        trainer: The trainer, which knows the number of ranks.
    """
    return next(iter(batch.values())).shape[0] * trainer.world_size
