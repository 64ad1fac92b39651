"""Messages say one image and two images, a VAE and an EDM."""

from datamodules.sources import _unreadable
from diffusion_lit import modules, nets
from diffusion_lit.words import article, counted, few


def test_one_has_no_plural():
    assert [counted(number, "image") for number in (0, 1, 2000)] == ["0 images", "1 image", "2,000 images"]
    assert [counted(number, "class", "is", "are") for number in (1, 2)] == ["1 class is", "2 classes are"]
    assert [skip.reason for skip in _unreadable("", ["a.heic", "b.tga", "c.TGA"])] == [
        "holds 1 .heic file, which is not read",
        "holds 2 .tga files, which are not read",
    ]


def test_names_stand_behind_a_or_an():
    told = "a VAE, a DDPM, a UNet, a UNet2DModel, a MeanFlow, a LatentDiffusion, a dict, "
    told += "an EDM, an MPUNet, an ImageFolder, an FSQ, an int"
    for words in told.split(", "):
        assert article(words.split()[1]) == words


def test_a_class_and_an_object_stand_for_their_names():
    assert article(modules.EDM) == "an EDM" and article(nets.FSQ) == "an FSQ" and article({}) == "a dict"


def test_long_lists_are_cut():
    assert few([]) == "none" and few(["a", "b"]) == "a, b" and few(list("abcd"), 2) == "a, b and 2 more"
