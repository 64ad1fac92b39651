"""Held-out draws are made on the CPU wherever they are wanted, and by row where data gives no index."""

import torch

from diffusion_lit.diffusion.rng import BLOCK, drawn_by_index
from diffusion_lit.modules import EDM
from diffusion_lit.nets import UNet


class Elsewhere:
    """Rows on another device, as far as `drawn_by_index` looks at them."""

    device = torch.device("meta")

    def cpu(self):
        return torch.tensor([3, 70, 5])


def test_held_out_draws_come_from_the_cpu_for_every_device():
    generators = []

    def draw(generator):
        generators.append(generator)
        return torch.randn(BLOCK, 2, generator=generator)

    made = drawn_by_index(Elsewhere(), draw, "val")
    assert made.device.type == "meta" and made.shape == (3, 2)
    assert [generator.device.type for generator in generators] == ["cpu", "cpu"]


def test_data_without_an_index_is_drawn_for_by_row():
    net = UNet(in_channels=1, image_size=8, model_channels=8, channel_mult=(1,), num_blocks=1)
    module, image = EDM(net), torch.zeros(4, 1, 8, 8)
    assert module.rows_of({"image": image}, 2).tolist() == [8, 9, 10, 11]
    assert module.rows_of({"image": image, "index": torch.tensor([5, 1, 2, 3])}, 2).tolist() == [5, 1, 2, 3]
