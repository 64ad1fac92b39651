"""Classes as a user names them."""

import torch
from torch import Tensor


def parse_labels(labels: str | None, count: int, num_classes: int) -> Tensor | None:
    """Classes from a command line.

    Args:
        labels: `all`, a list such as `3,3,7`, or None.
        count: Number of samples.
        num_classes: Number of the model's classes, 0 for an unconditional model.

    Returns:
        Class indices of shape (count,), or None. `all` gives every class the same number of samples, one class after
        the other (the last ones fewer where it does not divide); a list is repeated.

    Raises:
        ValueError: If the text is no list of classes of the model.
    """
    if labels is None:
        return None
    if num_classes == 0:
        raise ValueError(f"--labels {labels} was given, but the model is unconditional; leave --labels out.")
    if labels == "all":
        return torch.arange(num_classes).repeat_interleave(-(-count // num_classes))[:count]
    try:
        classes = [int(word) for word in labels.split(",")]
    except ValueError as error:
        raise ValueError(f"--labels {labels} is neither `all` nor a list of classes such as 3,3,7.") from error
    for label in classes:
        if not 0 <= label < num_classes:
            raise ValueError(f"Label {label} is outside the model's classes 0 to {num_classes - 1}.")
    return torch.tensor([classes[index % len(classes)] for index in range(count)])
