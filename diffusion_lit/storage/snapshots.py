"""Snapshots of averages of the weights, as safetensors files in a folder of the run."""

import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from diffusion_lit.storage.atomic import atomic
from diffusion_lit.storage.verified import decode, encode


class Snapshots:
    """The snapshots of a run's averages, `averages/step_0001000_sigma_0.05.safetensors`.

    Args:
        folder: The folder of the files.

    Raises:
        ValueError: If there are none.
    """

    PATTERN = re.compile(r"step_(\d+)_sigma_([\d.]+)\.safetensors")

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        found = [(match, path) for path in self.folder.glob("*") if (match := self.PATTERN.fullmatch(path.name))]
        self.files = sorted((int(match[1]), float(match[2]), path) for match, path in found)
        if not self.files:
            raise ValueError(
                f"There are no snapshots of averages in {self.folder}; train with --ema.sigma_rel '[0.05, 0.1]' and "
                "--ema.snapshot_every N."
            )

    @staticmethod
    def write(
        folder: Path, step: int, sigma_rel: float, average: dict[str, Tensor], class_names: Sequence[str] = ()
    ) -> None:
        """Writes a snapshot.

        Args:
            folder: The folder of the files.
            step: Training time.
            sigma_rel: Width of the average.
            average: Its weights.
            class_names: Names of the model's classes in the order of their numbers, kept with them, a line each.

        Raises:
            OSError: If it cannot be written.
        """
        with atomic(folder / f"step_{step:07d}_sigma_{sigma_rel:g}.safetensors") as file:
            file.write(encode(average, {"class_names": "\n".join(class_names)}))

    @property
    def steps(self) -> list[int]:
        """The training times, rising."""
        return sorted({step for step, _, _ in self.files})

    def combine(self, shares: dict[Path, float]) -> dict[str, Tensor]:
        """A weighted sum of snapshots.

        Args:
            shares: The weight of each file.

        Returns:
            Weights by name, float32, summed in float64.

        Raises:
            ValueError: If a file is damaged.
        """
        total: dict[str, Tensor] = {}
        for path, share in shares.items():
            try:
                snapshot, _ = decode(path)
            except ValueError as error:
                raise ValueError(f"The snapshot {path} is damaged: {error} Delete it.") from error
            for name, value in snapshot.items():
                part = value.double() * share
                total[name] = total[name] + part if name in total else part
        return {name: value.float() for name, value in total.items()}
