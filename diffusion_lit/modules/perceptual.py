"""LPIPS by torchmetrics: a perceptual distance, between deep features of a pretrained network.

Source: Zhang 2018, arXiv 1801.03924.
"""

import torch
from torch import Tensor, nn

NETWORKS = ("vgg", "alex", "squeeze")


class LPIPS(nn.Module):
    """Mean perceptual distance of images.

    Args:
        net: torchmetrics' network.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """The distance.

        Args:
            x_hat: Reconstructions (B, 1 or 3, H, W) in [-1, 1].
            x: Images of the same shape.

        Returns:
            The mean over images, a scalar.
        """
        x_hat, x = (image.float().expand(-1, 3, -1, -1) for image in (x_hat, x))
        with torch.autocast(x.device.type, enabled=False):
            distance: Tensor = self.net(x_hat.clamp(-1, 1), x).mean()
        return distance


def load_lpips(name: str) -> LPIPS:
    """Loads the network of LPIPS; torchvision downloads its backbone's weights once.

    Args:
        name: `vgg`, `alex` or `squeeze`.

    Returns:
        The distance.

    Raises:
        ValueError: If there is no such network or its weights cannot be had.
    """
    if name not in NETWORKS:
        raise ValueError(f"lpips_net is {name!r}; choose one of {', '.join(NETWORKS)}.")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        metric = LearnedPerceptualImagePatchSimilarity(net_type=name)  # type: ignore[arg-type]
    except Exception as error:  # the download raises whatever the network does
        raise ValueError(
            f"The weights of LPIPS ({name}) are neither in torch's cache nor could be downloaded; set lpips_weight to "
            "0, or run once with internet access."
        ) from error
    return LPIPS(metric.net)
