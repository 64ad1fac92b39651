"""TF32 for what is trained, full float32 for what is measured."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from diffusion_lit.runtime.precision import use_tf32


class TF32(Callback):
    """Allows TF32 for float32 products and convolutions in training, on NVIDIA GPUs from Ampere on.

    Validation, samples and metrics use full float32, so that they do not depend on the GPU.

    Args:
        training: Whether training may use it; with bf16 autocast little is left in float32 that could.
    """

    def __init__(self, training: bool = True) -> None:
        self.training = training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets training use it."""
        use_tf32(self.training)

    def _off(self, *args: Any, **kwargs: Any) -> None:
        use_tf32(False)

    on_validation_start = on_train_end = on_exception = _off

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets training use it again."""
        use_tf32(self.training and trainer.state.fn == "fit")
