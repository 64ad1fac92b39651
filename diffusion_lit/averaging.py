"""Averages of weights with a power-function profile, and any other width made from snapshots afterwards.

The average of the weights theta over training time t with exponent gamma weighs tau by tau^gamma:

    theta_gamma(t) = (gamma + 1) / t^(gamma + 1) * integral_0^t tau^gamma theta(tau) dtau
    theta_gamma(t) = beta theta_gamma(t - 1) + (1 - beta) theta(t),   beta = (1 - 1/t)^(gamma + 1)

Its width relative to t is sigma_rel = (gamma + 1)^(1/2) / ((gamma + 2) (gamma + 3)^(1/2)), the standard deviation of
the profile. From snapshots of a few such averages, taken along the run, the average of another width at another time is
the combination whose profile is nearest in the least-squares sense. With p_i the profile of snapshot i and r the wanted
one,

    A x = b,   A_ij = <p_i, p_j>,   b_i = <p_i, r>,
    <p_a, p_b> = (gamma_a + 1) (gamma_b + 1) (t_lo / t_hi)^gamma_lo / ((gamma_a + gamma_b + 1) t_hi)

where lo is the snapshot with the smaller t.

Source: Karras 2024, arXiv 2312.02696, section 3.1 and 3.2, equations 1 to 3, appendix C.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from diffusion_lit.saving import atomic

WIDEST = 0.288  # sigma_rel of gamma = 0, the plain mean, is 1 / sqrt(12)


def exponent(sigma_rel: float) -> float:
    """The exponent of a profile of given width.

    Args:
        sigma_rel: Standard deviation of the profile relative to the training time, in (0, 0.288).

    Returns:
        gamma >= 0, the root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2.

    Raises:
        ValueError: If no profile has this width.
    """
    if not 0 < sigma_rel <= WIDEST:
        raise ValueError(
            f"sigma_rel is {sigma_rel}; the width of an average relative to the training time lies in (0, {WIDEST}], "
            "and good ones are mostly between 0.01 and 0.25."
        )
    square = sigma_rel**-2
    return float(np.roots([1, 7, 16 - square, 12 - square]).real.max())


def power_beta(step: int, gamma: float) -> float:
    """The weight of the old average at a step.

    Args:
        step: Number of steps taken, from 1.
        gamma: The profile's exponent.

    Returns:
        (1 - 1/step)^(gamma + 1): 0 at the first step.
    """
    return float((1 - 1 / step) ** (gamma + 1))


def weights(steps: Sequence[int], gammas: Sequence[float], step: int, gamma: float) -> Tensor:
    """How to combine snapshots to the average of another exponent.

    Args:
        steps: Training time of each snapshot.
        gammas: Exponent of each.
        step: Training time wanted.
        gamma: Exponent wanted.

    Returns:
        Float64 weights, one per snapshot.
    """
    t, g = torch.tensor(steps, dtype=torch.float64), torch.tensor(gammas, dtype=torch.float64)
    products = _products(t[:, None], g[:, None], t[None], g[None])
    wanted = _products(t, g, torch.tensor(float(step)).double(), torch.tensor(gamma).double())
    solved: Tensor = torch.linalg.solve(products, wanted)
    return solved


def _products(t_a: Tensor, g_a: Tensor, t_b: Tensor, g_b: Tensor) -> Tensor:
    """Inner products of profiles."""
    late = torch.maximum(t_a, t_b)
    ratio = torch.minimum(t_a, t_b) / late
    return (g_a + 1) * (g_b + 1) * ratio ** torch.where(t_a < t_b, g_b, g_a) / ((g_a + g_b + 1) * late)


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
    def write(folder: Path, step: int, sigma_rel: float, average: dict[str, Tensor]) -> None:
        """Writes a snapshot.

        Args:
            folder: The folder of the files.
            step: Training time.
            sigma_rel: Width of the average.
            average: Its weights.

        Raises:
            OSError: If it cannot be written.
        """
        tensors = {name: value.detach().cpu().contiguous() for name, value in average.items()}
        with atomic(folder / f"step_{step:07d}_sigma_{sigma_rel:g}.safetensors") as file:
            file.write(save(tensors))

    @property
    def steps(self) -> list[int]:
        """The training times, rising."""
        return sorted({step for step, _, _ in self.files})

    def reconstruct(self, sigma_rel: float, step: int | None = None) -> dict[str, Tensor]:
        """The average of another width.

        Args:
            sigma_rel: Its width.
            step: Its training time, that of the last snapshot by default; later snapshots are not used.

        Returns:
            Weights by name, float32.

        Raises:
            ValueError: If the time is outside that of the snapshots, or a file is damaged.
        """
        step = self.steps[-1] if step is None else step
        used = [file for file in self.files if file[0] <= step]
        if not used or step > self.steps[-1]:
            raise ValueError(
                f"Step {step} is outside the snapshots of {self.folder}, {self.steps[0]} to {self.steps[-1]}."
            )
        gammas = [exponent(width) for _, width, _ in used]
        shares = weights([at for at, _, _ in used], gammas, step, exponent(sigma_rel))
        total: dict[str, Tensor] = {}
        for (_, _, path), share in zip(used, shares.tolist(), strict=True):
            try:
                with safe_open(str(path), framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                        part = file.get_tensor(name).double() * share
                        total[name] = total[name] + part if name in total else part
            except SafetensorError as error:
                raise ValueError(f"The snapshot {path} is damaged: {error}. Delete it.") from error
        return {name: value.float() for name, value in total.items()}
