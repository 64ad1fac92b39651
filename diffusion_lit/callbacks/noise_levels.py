"""The denoising error at fixed noise levels."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from diffusion_lit.checks import check_count, check_numbers
from diffusion_lit.modules.base import DiffusionModule
from diffusion_lit.modules.given import PAIR


class LossByNoiseLevel(Callback):
    """Logs the loss of the validation split at fixed noise levels as `loss_by_sigma/SIGMA`.

    The noise is the same at every epoch. The loss is the training loss, so that levels compare by what training sees.

    Args:
        sigmas: Noise levels; those outside the range that the model was made for are left out.
        batches: Number of validation batches that are used; 0 for never.
    """

    def __init__(self, sigmas: tuple[float, ...] = (0.02, 0.1, 0.3, 1.0, 3.0, 10.0), batches: int = 2) -> None:
        check_numbers("sigmas", sigmas, above=0)
        check_count(0, batches=batches)
        self.sigmas = sigmas
        self.batches = batches

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: dict[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measures one batch at every level."""
        if trainer.sanity_checking or batch_idx >= self.batches or not isinstance(pl_module, DiffusionModule):
            return
        x0 = pl_module.x0(batch, "val", batch_idx)
        label = batch.get("label") if pl_module.num_classes else None
        scaling = pl_module.denoiser.scaling
        index = pl_module.rows_of(batch, batch_idx).to(x0.device)
        noise = pl_module.keyed_noise(x0.shape, "loss_by_sigma", index=index)
        condition = pl_module.held_out_condition(x0, batch.get(PAIR), index, "val")
        told = {} if condition is None else {"condition": condition}
        for level in self.sigmas:
            if bool(scaling.knows(torch.tensor(level))):
                sigma = torch.full((len(x0),), level, device=x0.device)
                loss = pl_module.loss(pl_module.denoiser, x0, sigma, noise, label, **told).mean()
                pl_module.log(f"loss_by_sigma/{level:g}", loss, batch_size=len(x0), sync_dist=True)
