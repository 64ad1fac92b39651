"""A tiny network for tests of the core, which depends on all its inputs and records its calls."""

import torch
from torch import nn


class TinyNet(nn.Module):
    """A convolution plus embeddings; `calls` holds what each forward was given, `rows` the images forwarded in all."""

    def __init__(self, channels=2, num_classes=0, out_channels=None, seed=0):
        super().__init__()
        self.num_classes = num_classes
        out_channels = out_channels or channels
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.mix = nn.Conv2d(channels, out_channels, 3, padding=1)
            self.shift = nn.Embedding(num_classes + 1, out_channels)
        self.calls = []

    @property
    def rows(self):
        return sum(len(call["x"]) for call in self.calls)

    def forward(self, x, noise, label=None, **extra):
        self.calls.append({"x": x, "noise": noise, "label": label, **extra})
        null = torch.full((len(x),), self.num_classes)
        shift = self.shift(null if label is None else label) + torch.sin(noise)[:, None].to(x)
        if "augment" in extra:
            shift = shift + extra["augment"].sum(1, keepdim=True)
        return self.mix(x) + shift[:, :, None, None]
