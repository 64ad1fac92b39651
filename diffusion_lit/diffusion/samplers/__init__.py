"""Samplers: `heun(denoise, x, sigmas, *, noise=torch.randn_like, callback=None, **options) -> x`, one function each.

`denoise(x, sigma) -> x0_hat` is any callable, x starts at `sigmas[0]` and the grid sigmas (N+1,) falls, for sampling to
0. A positive end is accepted, and by a deterministic sampler a rising grid (inversion). `SAMPLERS` is the table of all.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from diffusion_lit.diffusion.samplers.adaptive import rk45
from diffusion_lit.diffusion.samplers.consistency import consistency
from diffusion_lit.diffusion.samplers.dpm_solver import dpmpp_2m, dpmpp_2m_sde, dpmpp_2s_ancestral
from diffusion_lit.diffusion.samplers.meanflow import meanflow
from diffusion_lit.diffusion.samplers.single_step import ddim, ddpm, euler, euler_ancestral, heun
from diffusion_lit.diffusion.samplers.unipc import unipc

__all__ = [
    "SAMPLERS",
    "Sampler",
    "consistency",
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2s_ancestral",
    "euler",
    "euler_ancestral",
    "heun",
    "meanflow",
    "rk45",
    "sampler_table",
    "unipc",
]


@dataclass(frozen=True)
class Sampler:
    """One row of the table of samplers.

    Args:
        function: The sampler itself.
        order: Its order of convergence in the number of steps: to the solution of the probability-flow ODE, or in
            distribution where it draws noise; 0 where steps do not converge, as each takes the model's own map.
        stochastic: Whether it draws noise with its default options.
        calls_per_step: Its denoiser calls per step; None where step control decides. The step to level 0 takes one.
        summary: What it is, in a line.
        takes_until: Whether it needs a denoiser that is given the noise level at which a step ends.
    """

    function: Callable[..., Tensor]
    order: int
    stochastic: bool
    calls_per_step: int | None
    summary: str
    takes_until: bool = False

    def nfe(self, num_steps: int) -> int | None:
        """The denoiser calls of one sample on a grid of num_steps steps ending in 0; None where it is adaptive."""
        return None if self.calls_per_step is None else self.calls_per_step * (num_steps - 1) + 1

    @property
    def nfe_formula(self) -> str:
        """`nfe` as a formula in the number of steps N."""
        if self.calls_per_step is None:
            return "adaptive"
        return "N" if self.calls_per_step == 1 else f"{self.calls_per_step}N - {self.calls_per_step - 1}"


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(ddpm, 1, True, 1, "ancestral sampling; variance posterior, beta or learned"),
    "ddim": Sampler(ddim, 1, False, 1, "deterministic, or with eta a share of the posterior's noise"),
    "euler": Sampler(euler, 1, False, 1, "Euler on the probability-flow ODE; ddim with eta 0"),
    "euler_ancestral": Sampler(euler_ancestral, 1, True, 1, "ddim with eta 1; ddpm with the posterior variance"),
    "heun": Sampler(heun, 2, False, 2, "Heun on the probability-flow ODE, EDM's; noise with S_churn"),
    "dpmpp_2s_ancestral": Sampler(
        dpmpp_2s_ancestral, 2, True, 2, "DPM-Solver++(2S), the posterior's noise after each step"
    ),
    "dpmpp_2m": Sampler(dpmpp_2m, 2, False, 1, "DPM-Solver++(2M): extrapolates from the step before"),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde, 2, True, 1, "SDE-DPM-Solver++(2M); dpmpp_2m with noise"),
    "unipc": Sampler(unipc, 3, False, 1, "UniPC: predictor of two evaluations, corrected by the next"),
    "rk45": Sampler(rk45, 5, False, None, "Dormand-Prince to a tolerance, step control per sample"),
    "consistency": Sampler(consistency, 0, True, 1, "for consistency models: one step, or fresh noise at each level"),
    "meanflow": Sampler(meanflow, 0, False, 1, "for MeanFlow models: the learned map, in one step or in more", True),
}


def sampler_table() -> str:
    """The table of samplers as text: name, order, stochastic or not, NFE for N steps, and a line on each."""
    rows = [("name", "order", "stochastic", "NFE for N steps", "")]
    for name, sampler in SAMPLERS.items():
        kind = "yes" if sampler.stochastic else "no"
        rows.append((name, str(sampler.order), kind, sampler.nfe_formula, sampler.summary))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
