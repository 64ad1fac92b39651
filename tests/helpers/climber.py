"""A module of one weight that climbs by 1 a step."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn


class Climber(LightningModule):
    """One weight that each step of SGD raises by 1; raw value after n steps: n."""

    def __init__(self, fail_in_validation=False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.fail = fail_in_validation

    def training_step(self, batch, batch_idx):
        return -self.weight.sum()

    def validation_step(self, batch, batch_idx):
        if self.fail:
            raise RuntimeError("validation failed")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def loader(batch=4, batches=10):
    return torch.utils.data.DataLoader([{"image": torch.zeros(2)}] * (batch * batches), batch_size=batch)


def fit(tmp_path, module, *callbacks, batches=10, epochs=1, ckpt_path=None, **options):
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        accelerator="cpu",
        **options,
    )
    trainer.fit(module, loader(batches=batches), loader(batches=1), ckpt_path=ckpt_path, weights_only=True)
    return trainer
