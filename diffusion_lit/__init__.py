"""diffusion-lit: training, sampling and measuring image diffusion models with PyTorch Lightning.

The names below are imported when they are first used, so that `import diffusion_lit` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_lit.diffusion import SAMPLERS, ClassifierFreeGuidance, Conditioned, Denoiser, Sampling, editing
    from diffusion_lit.modules.load import load_data, load_module
    from diffusion_lit.pretrained.load_model import load_model
    from diffusion_lit.report.images import grid_image

__version__ = "0.1.0"
__all__ = [
    "SAMPLERS",
    "ClassifierFreeGuidance",
    "Conditioned",
    "Denoiser",
    "Sampling",
    "editing",
    "grid_image",
    "load_data",
    "load_model",
    "load_module",
]
_HOMES = {
    "grid_image": "report.images",
    "load_data": "modules.load",
    "load_model": "pretrained.load_model",
    "load_module": "modules.load",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(f"{__name__}.{_HOMES.get(name, 'diffusion')}")
    return import_module(f"{home.__name__}.{name}") if name == "editing" else getattr(home, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
