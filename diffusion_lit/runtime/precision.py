"""Training in bf16 where it is faster, with all metrics in float32."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision, Precision


def use_tf32(allowed: bool) -> None:
    """Allows or forbids TF32 for float32 products and convolutions on NVIDIA GPUs.

    torch's default is no for products and yes for convolutions. Here it is no, except in training (`callbacks.TF32`).
    """
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def float32_arithmetic() -> str:
    """What float32 means at this moment, in words for a receipt."""
    matmul, convolution = torch.get_float32_matmul_precision() != "highest", torch.backends.cudnn.allow_tf32
    found = [name for name, on in (("products", matmul), ("convolutions", convolution)) if on]
    return f"TF32 in {' and '.join(found)} on GPUs that have it" if found else "full float32, no TF32"


class TrainInBf16(MixedPrecision):
    """The training step under bf16 autocast; validation, test and predict in float32.

    Weights, gradients, optimizer, average, preconditioning and loss are in float32, as under Lightning's `bf16-mixed`.
    Unlike there, metrics do not depend on whether the hardware has bf16.

    Args:
        device: Kind of the device, `cpu` or `cuda`.
    """

    def __init__(self, device: str) -> None:
        super().__init__("bf16-mixed", device)

    @contextmanager
    def val_step_context(self) -> Generator[None, None, None]:
        """Leaves autocast off."""
        yield

    test_step_context = predict_step_context = val_step_context

    def clip_gradients(self, *args: Any, **kwargs: Any) -> None:
        """Clips gradients, also for a fused optimizer, since there is no gradient scaler."""
        Precision.clip_gradients(self, *args, **kwargs)
