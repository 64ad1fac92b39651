"""A small convolutional classifier, whose penultimate activations are features for metrics.

A 5x5 stem that halves images of 16 pixels and more, two stages of 3x3 convolutions with batch norm that halve them
again, an average over quarters, and two linear layers with a ReLU between: `features(x)` is the output of the first
before the ReLU, and `forward(x)` the logits of the second. It is as small as classifying garments and digits well
allows, so that metrics cost little beside sampling.
"""

import torch
from torch import Tensor, nn

from diffusion_lit.checks import check_count, check_number
from diffusion_lit.nets.checks import arguments_in


def _conv(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """A convolution with batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class ConvClassifier(nn.Module):
    """A convolutional network from images to classes.

    Args:
        in_channels: Number of channels C of an image.
        image_size: Side of an image in pixels, at least 4.
        num_classes: Number of classes, at least 2.
        width: Channels of the first stage; the others have two and four times as many.
        blocks: Convolutions in each of the later two stages.
        feature_dim: Number of features.
        dropout: Share of the features dropped before the last layer in training.

    Raises:
        ValueError: If there are fewer than 2 classes or the image is smaller than 4 pixels.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        num_classes: int,
        width: int = 16,
        blocks: int = 1,
        feature_dim: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = arguments_in(locals())
        check_count(2, num_classes=num_classes, hint="; use data with labels")
        check_count(4, image_size=image_size)
        check_count(in_channels=in_channels, width=width, blocks=blocks, feature_dim=feature_dim)
        check_number(least=0, below=1, dropout=dropout)
        self.in_channels = in_channels
        self.image_size = image_size
        self.num_classes = num_classes
        self.feature_dim = feature_dim
        layers: list[nn.Module] = [_conv(in_channels, width, kernel=5, stride=2 if image_size >= 16 else 1)]
        for stage in (1, 2):
            channels = width * 2**stage
            layers += [_conv(channels // 2 if block == 0 else channels, channels) for block in range(blocks)]
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.stages = nn.Sequential(*layers)
        self.project = nn.Linear(4 * width * 4, feature_dim)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(feature_dim, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """The penultimate layer, before its ReLU.

        Args:
            x: Images (B, C, H, W) in [-1, 1].

        Returns:
            Features (B, feature_dim).
        """
        x = self.stages(x)
        pooled = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        made: Tensor = self.project(pooled)
        return made

    def logits(self, features: Tensor) -> Tensor:
        """The logits of features.

        Args:
            features: Features (B, feature_dim).

        Returns:
            Unnormalised log-probabilities of the classes, (B, num_classes).
        """
        logits: Tensor = self.head(self.dropout(torch.relu(features)))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Classifies images.

        Args:
            x: Images (B, C, H, W) in [-1, 1].

        Returns:
            Logits (B, num_classes).
        """
        return self.logits(self.features(x))
