"""Intermediate states of denoising at chosen steps of the grid."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffusion_lit.diffusion import editing
from diffusion_lit.diffusion.conversions import SAME
from diffusion_lit.diffusion.generate import Sampling
from diffusion_lit.diffusion.models import PixelModel
from diffusion_lit.report.images import Cell


@dataclass
class Passed:
    """Keeps intermediate states of denoising from several noise levels.

    Args:
        model: The model.
        sampling: The settings with the grid.
        steps: Indices of the grid to keep, from 0 (all noise) to num_steps - 1 (next to none).

    Raises:
        ValueError: If the grid has no such step.
    """

    model: PixelModel
    sampling: Sampling
    steps: Sequence[int]
    images: dict[tuple[float, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Finds the levels of the steps."""
        self.grid = self.sampling.sigmas(self.model.denoiser.scaling)[:-1].tolist()
        for step in self.steps:
            if not 0 <= step < len(self.grid):
                raise ValueError(
                    f"There is no step {step} in --shown_steps; with num_steps {self.sampling.num_steps} they go from "
                    f"0 (all noise) to {len(self.grid) - 1} (next to none)."
                )

    def check(self, sigmas: Sequence[float]) -> None:
        """Refuses levels from which no chosen step is passed.

        Args:
            sigmas: The noise levels that denoising starts from.

        Raises:
            ValueError: If there would be nothing to show.
        """
        if self.steps and min(self.grid[step] for step in self.steps) > max(sigmas) * (1 + SAME):
            raise ValueError(
                f"--shown_steps {list(self.steps)} lie above every noise level (the last of them has sigma "
                f"{self.grid[max(self.steps)]:.3g}); give later steps, or noisier --sigmas."
            )

    def watch(self, start: float) -> Any:
        """A sampler's callback for denoising from a level.

        Args:
            start: The noise level.

        Returns:
            `callback(step, x, x0_hat, sigma)`, which keeps x / sqrt(1 + sigma^2).
        """
        above = sum(level >= start * (1 - SAME) for level in self.grid)

        def keep(step: int, x: Tensor, x0_hat: Tensor, sigma: Tensor) -> None:
            index = above - 1 + step
            on_grid = step > 0 or (above and abs(self.grid[index] / start - 1) < SAME)
            if index in self.steps and on_grid:
                level = float(sigma.reshape(-1)[0])
                self.images[start, index] = editing.visible(self.model, x, level).cpu()

        return keep

    def cells(self, start: float) -> list[Cell]:
        """One cell per step, without an image where the step lies above the level."""
        above = Cell(None, "above the start")
        return [Cell(self.images[start, step][0]) if (start, step) in self.images else above for step in self.steps]

    def headings(self) -> list[str]:
        """What stands above the cells."""
        return [f"step {step}\nsigma {self.grid[step]:.3g}" for step in self.steps]

    def files(self) -> dict[str, Tensor]:
        """The images by name."""
        return {f"step_{step}_of_{start:g}": image for (start, step), image in self.images.items()}
