"""Restoration of degraded images step by step: the samplers of cold diffusion.

With a degradation D and a restorer R(x_s, s) -> x0_hat, from x_T down to x_0:

    direct     x_0 = R(x_T, T)
    naive      x_{s-1} = D(R(x_s, s), s-1)                                             (algorithm 1)
    improved   x_{s-1} = x_s - D(R(x_s, s), s) + D(R(x_s, s), s-1)                     (algorithm 2)

If the degradation is linear in its step, D(x, s) = x + s e, the last gives x_s = D(x0, s) whatever R predicts: an error
of R cancels instead of accumulating. With fewer steps than T, some are skipped.

Source: Bansal et al. 2022 (arXiv 2208.09392), sections 3.2 and 3.3.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from diffusion_lit.checks import check_count
from diffusion_lit.diffusion.generate import StepCallback
from diffusion_lit.diffusion.grids import evenly

Step = Callable[[Tensor, int], Tensor]
"""A restorer or a degradation with its map bound: (x, step) -> x."""


def naive(restore: Step, degrade: Step, x: Tensor, steps: list[int], callback: StepCallback | None = None) -> Tensor:
    """Restores and degrades again, one step less each time.

    Args:
        restore: `restore(x_s, s) -> x0_hat`.
        degrade: `degrade(x0, s) -> x_s`.
        x: Degraded images (B, C, H, W) at step `steps[0]`.
        steps: Falling steps that end in 0. Two of them are direct restoration.
        callback: Called as `callback(index, x, x0_hat, 0)` at each step, since there is no noise.

    Returns:
        Restored images (B, C, H, W).

    Source: Bansal 2022, algorithm 1.
    """
    for index, (s, after) in enumerate(pairwise(steps)):
        x0_hat = restore(x, s)
        _report(callback, index, x, x0_hat)
        x = degrade(x0_hat, after)
    return x


def improved(restore: Step, degrade: Step, x: Tensor, steps: list[int], callback: StepCallback | None = None) -> Tensor:
    """Subtracts the difference that a step makes to the restored image; arguments as for `naive`.

    Args:
        restore: `restore(x_s, s) -> x0_hat`.
        degrade: `degrade(x0, s) -> x_s`.
        x: Degraded images (B, C, H, W) at step `steps[0]`.
        steps: Falling steps that end in 0.
        callback: Called as `callback(index, x, x0_hat, 0)` at each step.

    Returns:
        Restored images (B, C, H, W).

    Source: Bansal 2022, algorithm 2.
    """
    for index, (s, after) in enumerate(pairwise(steps)):
        x0_hat = restore(x, s)
        _report(callback, index, x, x0_hat)
        x = x - degrade(x0_hat, s) + degrade(x0_hat, after)
    return x


def _report(callback: StepCallback | None, index: int, x: Tensor, x0_hat: Tensor) -> None:
    if callback is not None:
        callback(index, x, x0_hat, x.new_zeros(()))


RESTORERS = {"improved": improved, "naive": naive, "direct": naive}


@dataclass(frozen=True)
class ColdSampling:
    """How degraded images are restored: what `Sampling` is to denoisers.

    Args:
        sampler: `improved` (algorithm 2), `naive` (algorithm 1) or `direct` (one restoration).
        num_steps: Number of steps, at most the degradation's T; T when omitted. `direct` takes one.
        cfg_scale: 1, since there are no classes.

    Raises:
        ValueError: If the sampler is unknown, there is no step, or cfg_scale is not 1.
    """

    sampler: str = "improved"
    num_steps: int | None = None
    cfg_scale: float = 1.0
    guide_ckpt = None  # no other model guides
    autoguided = False

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        if self.sampler not in RESTORERS:
            raise ValueError(f"There is no sampler {self.sampler!r} here; choose one of {', '.join(RESTORERS)}.")
        check_count(num_steps=self.num_steps)
        if self.cfg_scale != 1:
            raise ValueError(f"cfg_scale is {self.cfg_scale}, but cold diffusion has no classes; leave it out.")
        if self.sampler == "direct":
            object.__setattr__(self, "num_steps", 1)

    @property
    def nfe(self) -> int | None:
        """Calls of the restorer for an image; None if there is one per step of the degradation."""
        return self.num_steps

    def replace(self, **changes: Any) -> "ColdSampling":
        """The same settings with some replaced, None meaning unchanged.

        Args:
            changes: Fields and their new values, and options of samplers of noise, all None.

        Returns:
            New settings; those of a new sampler take all steps unless told how many.

        Raises:
            ValueError: If an option is given that only denoisers have.
        """
        changes = {name: value for name, value in changes.items() if value is not None}
        for name in changes:
            if name not in ("sampler", "num_steps", "cfg_scale"):
                raise ValueError(f"Cold diffusion has no noise and so no {name}; leave --{name} out.")
        if changes.get("sampler", self.sampler) != self.sampler and self.sampler == "direct":
            changes.setdefault("num_steps", None)
        return replace(self, **changes)

    def record(self) -> dict[str, Any]:
        """The settings as plain values, for receipts."""
        return asdict(self)

    def steps(self, total: int) -> list[int]:
        """The steps that are visited.

        Args:
            total: The degradation's T.

        Returns:
            Falling whole numbers from T to 0.

        Raises:
            ValueError: If there are more steps than T.
        """
        count = total if self.num_steps is None else self.num_steps
        if count > total:
            raise ValueError(f"num_steps is {count}, but the degradation has {total} steps; take at most as many.")
        return evenly(total, 0, count + 1)
