"""Autoguidance of a run's own samples: reads the guide that its settings name, and keeps it in the checkpoints."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from diffusion_lit.diffusion.models import PixelModel
from diffusion_lit.modules.guides import guide_beside, take_guide
from diffusion_lit.modules.load import held_guide
from diffusion_lit.modules.protocols import is_model


class KeepGuide(Callback):
    """Puts the model that `sampling.guide_ckpt` names beside the trained one, and holds it in the checkpoint.

    So a checkpoint draws as it was trained to, and a run goes on, without the guide's own file.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the guide, unless the resumed checkpoint holds it."""
        given = pl_module.sampling.guide_ckpt if is_model(pl_module) else None
        guide = guide_beside(pl_module)
        if given is not None and (guide is None or guide.file != given):
            take_guide(pl_module, given)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the guide."""
        guide = guide_beside(pl_module)
        if guide is not None and guide.content is not None:
            checkpoint["guide"] = {**guide.identity(), **guide.content}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes the guide out of a checkpoint."""
        guide = held_guide(checkpoint, str(trainer.ckpt_path))
        if guide is not None and isinstance(pl_module, PixelModel):
            pl_module.denoiser.guide = guide
