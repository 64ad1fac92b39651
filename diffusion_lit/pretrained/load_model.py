"""The model that a command draws with: one trained here, or one of another library."""

from collections.abc import Sequence
from typing import Any

from diffusion_lit.modules.load import load_module
from diffusion_lit.modules.protocols import Model, is_model
from diffusion_lit.pretrained.load import load_pretrained
from diffusion_lit.words import article


def load_model(
    ckpt_path: str | None, pretrained: str | None = None, prompts: Sequence[str] = (), **options: Any
) -> Model:
    """The model that a command draws with: a checkpoint's, or one of another library.

    Args:
        ckpt_path: Checkpoint file, or a folder of `diffusion-lit export`.
        pretrained: Name or folder of a pretrained model; see `diffusion_lit.pretrained.load_pretrained`.
        prompts: What a pretrained text model is asked for; label i means prompt i.
        options: Further arguments of `load_pretrained`; empty ones mean nothing.

    Returns:
        The model, in eval mode, on the CPU.

    Raises:
        ValueError: If not one of the two is given, prompts are given for a checkpoint, or it cannot be loaded or does
            not denoise.
    """
    if (ckpt_path is None) == (pretrained is None):
        raise ValueError("Give one model: --ckpt_path FILE for one trained here, or --pretrained NAME for another.")
    if pretrained is not None:
        return load_pretrained(pretrained, list(prompts), **options)
    assert ckpt_path is not None
    if prompts:
        raise ValueError(
            f"A prompt was given, but {ckpt_path} knows classes, not words; choose a class by --labels, or a text "
            "model by --pretrained."
        )
    for name, value in options.items():
        if value:
            raise ValueError(f"--{name} is for a pretrained text model; leave it out with --ckpt_path {ckpt_path}.")
    module = load_module(ckpt_path)
    if not is_model(module):
        raise ValueError(f"{ckpt_path} holds {article(module)}, which draws no images; give a model that does.")
    return module
