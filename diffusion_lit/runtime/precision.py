"""Training in bf16 where it pays, with every figure still taken in float32."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision, Precision


def use_tf32(allowed: bool) -> None:
    """Says whether float32 products and convolutions on NVIDIA GPUs may round their factors to TF32's 10 bits.

    torch's own default is no for products and yes for convolutions. Here it is no, but for training (`callbacks.TF32`).

    Args:
        allowed: Whether they may.
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

    Weights, gradients, optimizer and average are in float32 as under Lightning's `bf16-mixed`, and so are
    preconditioning and loss. Unlike there, what is measured does not depend on whether the hardware has bf16.

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
        """Clips, also for a fused optimizer: there is no gradient scaler that it could get in the way of."""
        Precision.clip_gradients(self, *args, **kwargs)
