"""Commands on several devices: one process each, which share the work."""

import os
from datetime import timedelta
from typing import Any

from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.pytorch import Trainer
from torch import Tensor

START_METHODS: dict[str, Any] = {"auto": "popen", "ddp": "popen", "ddp_fork": "fork", "ddp_spawn": "spawn"}
PATIENCE = timedelta(minutes=30)


def several(devices: int) -> bool:
    """Whether there is more than one process: asked for, or started by torchrun or SLURM.

    Args:
        devices: Number of processes asked for.

    Returns:
        Whether a Fabric is needed.
    """
    return devices > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1


def fabric(devices: int, device: str = "auto", strategy: str = "auto") -> Fabric:
    """Processes that share the work, not yet started.

    Args:
        devices: Number of processes, one per device.
        device: `auto`, `cpu` or `cuda`.
        strategy: How they are started: `ddp`, or `ddp_fork` within another Python program.

    Returns:
        The Fabric; call its `launch`.

    Raises:
        ValueError: If a choice is unknown, or there are not so many devices.
    """
    accelerators = {"auto": "auto", "cpu": "cpu", "cuda": "gpu"}
    if device not in accelerators:
        raise ValueError(f"device is {device!r}, but several devices are asked for; choose auto, cpu or cuda.")
    if strategy not in START_METHODS:
        raise ValueError(f"There is no strategy {strategy!r} here; choose one of {', '.join(START_METHODS)}.")
    try:
        return Fabric(
            accelerator=accelerators[device],
            devices=devices,
            strategy=DDPStrategy(start_method=START_METHODS[strategy], timeout=PATIENCE),
        )
    except RuntimeError as error:  # Lightning's MisconfigurationException is one
        raise ValueError(f"{devices} processes on {device} cannot be started here: {error}") from error


def images_of(batch: dict[str, Tensor], trainer: Trainer) -> int:
    """Images that a training step sees on all ranks together.

    Args:
        batch: This rank's batch; the first axis of each tensor is the images.
        trainer: The trainer, which knows the number of ranks.

    Returns:
        The number of images.
    """
    return next(iter(batch.values())).shape[0] * trainer.world_size
