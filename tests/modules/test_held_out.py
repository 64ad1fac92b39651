"""Figures of held-out images: the same whatever the number of ranks and the size of a batch."""

from types import MethodType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from datamodules.loaders import EvalLoader, Split
from diffusion_lit.callbacks import LossByNoiseLevel
from diffusion_lit.diffusion.degradations import Mask
from diffusion_lit.diffusion.rng import BLOCK, drawn_by_index
from diffusion_lit.modules import EDM, VAE, ColdDiffusion, Consistency, LatentDiffusion, MeanFlow
from diffusion_lit.modules.latent_space import LatentSpace
from diffusion_lit.nets import Autoencoder, UNet

COUNT = 2 * BLOCK + 3  # batches of 8 leave three, which two ranks share unevenly and four cannot


def unet(channels=1, size=8, **options):
    net = UNet(channels, size, 0, 8, (1,), 1, (), **options)
    torch.nn.init.normal_(net.out.weight, std=0.3)  # a new network denoises every image alike
    return net


def latent():
    space = LatentSpace(Autoencoder(1, 8, 2, 8, (1, 2)), (1, 8, 8))
    space.set_scale(torch.zeros(2), torch.ones(2))
    module = EDM(unet(2, 4))
    module._caches, module.space, module.x0 = {}, space, MethodType(LatentDiffusion.x0, module)
    return module


FAMILIES = {
    "edm": lambda: EDM(unet()),
    "consistency": lambda: Consistency(unet()),
    "vae": lambda: VAE(Autoencoder(1, 8, 2, 8, (1, 2))),
    "cold": lambda: ColdDiffusion(unet(), Mask(4)),
    "latent": latent,
    "meanflow": lambda: MeanFlow(unet(takes_until=True)),
}


def means(make, world: int, batch_size: int) -> dict[str, float]:
    """What validation on so many ranks gives: the mean over all images, as Lightning forms it."""
    images = torch.randint(0, 256, (COUNT, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sums: dict[str, list[Tensor]] = {}
    for rank in range(world):
        torch.manual_seed(0)
        module = make().eval()
        trainer = SimpleNamespace(world_size=world, global_rank=rank, sanity_checking=False)
        module._trainer = trainer
        module.log = lambda name, value, batch_size, **_: sums.setdefault(name, []).append(
            torch.stack([value.detach().double() * batch_size, torch.tensor(float(batch_size)).double()])
        )
        by_level = LossByNoiseLevel(sigmas=(0.1, 1.0), batches=1000)
        for index, batch in enumerate(EvalLoader(Split(images, None), batch_size, world, rank)):
            with torch.no_grad():
                module.validation_step(batch, index)
                by_level.on_validation_batch_end(trainer, module, None, batch, index)
    totals = {name: torch.stack(parts).sum(0) for name, parts in sums.items()}
    assert all(int(total[1]) == COUNT for total in totals.values())
    return {name: float(total[0] / total[1]) for name, total in totals.items()}


@pytest.mark.medium
@pytest.mark.parametrize("family", FAMILIES)
def test_held_out_figures_depend_on_neither_ranks_nor_batches(family):
    one = means(FAMILIES[family], 1, 8)
    assert "val/loss" in one
    for world, batch_size in ((2, 8), (4, 8), (1, 50)):
        again = means(FAMILIES[family], world, batch_size)
        assert again == pytest.approx(one, rel=1e-5), (world, batch_size)


def test_draws_by_index_are_each_images_own():
    def draw(generator):
        return torch.randn(BLOCK, 3, generator=generator)

    whole = drawn_by_index(torch.arange(300), draw, "a")
    rows = torch.tensor([299, 64, 63, 0, 5])
    assert torch.equal(drawn_by_index(rows, draw, "a"), whole[rows])
    assert whole.unique(dim=0).shape == whole.shape  # no two images share one
    assert not torch.equal(drawn_by_index(rows, draw, "b"), whole[rows])
