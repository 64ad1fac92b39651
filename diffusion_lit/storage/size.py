"""A model that a file describes is not built much larger than the weights in the file.

The arguments in a file may ask for any size. Parameters and buffers are counted as they are registered: torch hands out
memory that costs nothing until it is written to, and their values are drawn after that.
"""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

NUMBERS = 200_000_000  # that a model may have beside those in its file, such as a frozen network of another library
TENSORS = 5000  # of such numbers
VALUES = 20_000  # of the arguments that describe a model


def check_values(record: Mapping[str, Any]) -> None:
    """Refuses arguments of more values than it takes to describe a model, each of which is checked against its type.

    Args:
        record: Plain values, as a file holds them.

    Raises:
        ValueError: If there are too many.
    """
    left: list[Any] = [record]
    for count in itertools.count():
        if not left:
            return
        if count > VALUES:
            raise ValueError(f"its arguments hold more than {VALUES:,} values")
        held = left.pop()
        left += held.values() if isinstance(held, Mapping) else held if isinstance(held, list | tuple | set) else ()


@contextmanager
def no_larger_than(weights: Mapping[str, Any]) -> Iterator[None]:
    """Within, to build more parameters and buffers than there are weights for is a ValueError.

    Args:
        weights: The state in the file.
    """
    held = [value.numel() for value in weights.values() if isinstance(value, Tensor)]
    numbers = tensors = 0

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal numbers, tensors
        if tensor is None:
            return
        numbers += tensor.numel()
        tensors += 1
        if numbers > 2 * sum(held) + NUMBERS or tensors > 2 * len(held) + TENSORS:
            raise ValueError(
                f"with the {name} of its {type(module).__name__} {tuple(tensor.shape)} it would have {numbers:,} "
                f"weights in {tensors:,} tensors, but the file holds {sum(held):,} in {len(held):,}"
            )

    hooks = (
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
