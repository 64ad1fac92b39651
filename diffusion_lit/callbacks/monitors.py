"""What a callback may watch: the figures that a run logs, known before its first step."""

from lightning.pytorch import Callback, LightningModule, Trainer

from diffusion_lit.callbacks.fid import FID
from diffusion_lit.callbacks.noise_levels import LossByNoiseLevel
from diffusion_lit.callbacks.psnr import ImagePSNR
from diffusion_lit.callbacks.reconstructions import ReconstructionFID
from diffusion_lit.modules import VAE, Classifier

OURS = ("diffusion_lit.", "lightning.")
OF_EVERY_RUN = ("epoch", "step", "train/loss", "val/loss", "train/images_per_second", "train/nonfinite_steps")
HELD_OUT = ("val/", "loss_by_sigma/")
HELD_OUT_OF_A_VAE = ("psnr", "ssim", "kl", "kl_bits_per_dim", "bits_per_dim", "active_channels")


class MonitorCheck(Callback):
    """Refuses, before the first step, a callback that monitors a figure which the run turns out not to log.

    That no image is held out or that an extractor's weights are missing is known only when the data are read.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the monitors."""
        check_monitors(trainer, pl_module, begun=True)


def check_monitors(trainer: Trainer, module: LightningModule, begun: bool = False) -> None:
    """Refuses a callback that monitors a figure that nothing logs, before the first step.

    A user's own models and callbacks may log anything: then nothing is refused.

    Args:
        trainer: The trainer.
        module: The model.
        begun: Whether the data were read, so that it is known what can be measured.

    Raises:
        ValueError: If there is no such figure.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if not all(type(part).__module__.startswith(OURS) for part in (module, *callbacks)):
        return
    known = _figures(callbacks, module, begun)
    batches = trainer.num_val_batches if begun else 1
    none_held_out = not sum(batches if isinstance(batches, list) else [batches])
    if none_held_out:
        known = {name for name in known if not name.startswith(HELD_OUT)}
    sizes = [one for one in callbacks if isinstance(one, ReconstructionFID) and not begun]  # as many as there are
    for callback in callbacks:
        watched = getattr(callback, "monitor", None)
        if watched is None or watched in known or getattr(callback, "save_top_k", None) == 0:
            continue
        if not str(watched).endswith("_floor") and not any(one.may_log(watched) for one in sizes):
            listed = ", ".join(sorted(name for name in known if not name.startswith("loss_by_sigma/")))
            why = ", since no image is held out" if none_held_out and str(watched).startswith(HELD_OUT) else ""
            name = type(callback).__name__
            raise ValueError(f"{name}'s monitor is {watched!r}, which this run does not log{why}; it logs {listed}.")


def _figures(callbacks: list[Callback], module: LightningModule, begun: bool) -> set[str]:
    """Names of the figures that callbacks and module log, where images are held out."""
    known = {*OF_EVERY_RUN}
    known |= {"train/kl", *(f"val/{name}" for name in HELD_OUT_OF_A_VAE)} if isinstance(module, VAE) else set()
    known |= {"train/accuracy", "val/accuracy"} if isinstance(module, Classifier) else set()
    for callback in callbacks:
        if isinstance(callback, FID):
            known |= {callback.tag} if callback.available or not begun else set()
        elif isinstance(callback, LossByNoiseLevel):
            known |= {f"loss_by_sigma/{level:g}" for level in callback.sigmas}
        elif isinstance(callback, ImagePSNR):
            known.add("psnr")
    return known
