"""What a callback may watch: the figures that a run logs, known before its first step."""

from lightning.pytorch import LightningModule, Trainer

from diffusion_lit.callbacks.fid import FID
from diffusion_lit.callbacks.noise_levels import LossByNoiseLevel
from diffusion_lit.callbacks.psnr import ImagePSNR
from diffusion_lit.modules import VAE, Classifier

OURS = ("diffusion_lit.", "lightning.")
OF_EVERY_RUN = ("epoch", "step", "train/loss", "val/loss", "train/images_per_second", "train/nonfinite_steps")
HELD_OUT_OF_A_VAE = ("psnr", "ssim", "kl", "kl_bits_per_dim", "bits_per_dim", "active_channels")


def check_monitors(trainer: Trainer, module: LightningModule) -> None:
    """Refuses a callback that monitors a figure that nothing logs, before the first step.

    A user's own models and callbacks may log anything: then nothing is refused.

    Raises:
        ValueError: If there is no such figure.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if not all(type(part).__module__.startswith(OURS) for part in (module, *callbacks)):
        return
    known = {*OF_EVERY_RUN}
    known |= {"train/kl", *(f"val/{name}" for name in HELD_OUT_OF_A_VAE)} if isinstance(module, VAE) else set()
    known |= {"train/accuracy", "val/accuracy"} if isinstance(module, Classifier) else set()
    for callback in callbacks:
        if isinstance(callback, FID):
            known.add(callback.tag)
        elif isinstance(callback, LossByNoiseLevel):
            known |= {f"loss_by_sigma/{level:g}" for level in callback.sigmas}
        elif isinstance(callback, ImagePSNR):
            known.add("psnr")
    for callback in callbacks:
        watched = getattr(callback, "monitor", None)
        if watched is not None and watched not in known and not str(watched).endswith("_floor"):
            listed = ", ".join(sorted(name for name in known if not name.startswith("loss_by_sigma/")))
            name = type(callback).__name__
            raise ValueError(f"{name}'s monitor is {watched!r}, which this run does not log; it logs {listed}.")
