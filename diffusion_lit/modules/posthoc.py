"""Post-hoc EMA: the average of any width, from the snapshots of a run.

Source: Karras 2024, arXiv 2312.02696, section 3.2.
"""

from torch import Tensor

from diffusion_lit.diffusion.averaging import exponent, weights
from diffusion_lit.storage.snapshots import Snapshots


def reconstruct(snapshots: Snapshots, sigma_rel: float, step: int | None = None) -> dict[str, Tensor]:
    """The average of another width.

    Args:
        snapshots: The snapshots of a run.
        sigma_rel: Its width relative to the training time.
        step: Its training time, that of the last snapshot by default; later snapshots are not used.

    Returns:
        Weights by name, float32.

    Raises:
        ValueError: If the time is outside that of the snapshots, or a file is damaged.
    """
    step = snapshots.steps[-1] if step is None else step
    used = [file for file in snapshots.files if file[0] <= step]
    if not used or step > snapshots.steps[-1]:
        first, last = snapshots.steps[0], snapshots.steps[-1]
        raise ValueError(f"Step {step} is outside the snapshots of {snapshots.folder}, {first} to {last}.")
    gammas = [exponent(width) for _, width, _ in used]
    shares = weights([at for at, _, _ in used], gammas, step, exponent(sigma_rel)).tolist()
    return snapshots.combine({path: share for (_, _, path), share in zip(used, shares, strict=True)})
