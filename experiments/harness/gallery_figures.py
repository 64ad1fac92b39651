"""The figures of the gallery: what a classifier sees in anagrams and hybrids, and the PSNR of edits there and back."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor

from diffusion_lit.commands.edit_options import decibels
from diffusion_lit.diffusion import editing, keyed_seed
from diffusion_lit.diffusion.images import from_uint8, to_uint8
from diffusion_lit.modules.load import load_module, prepared_data
from diffusion_lit.runtime.hardware import pick_device
from diffusion_lit.storage.hashing import file_hash, key_of
from experiments.harness.evaluator import first_images
from experiments.harness.show import keep_json

HYBRID_BLUR = 2.0
COMPOSED = {"sampler": "euler_ancestral", "num_steps": 30, "cfg_scale": 7.0}  # how composites are drawn
LEARNT = 5000  # images that a classifier learns from
VIEWS = [
    ["identity", "rotate_180"],
    ["identity", "flip_vertical"],
    ["identity", "rotate_90"],
    ["identity", "negative"],
    ["identity", "jigsaw"],
    ["identity", "rotate_90", "rotate_180"],
]


def measured(ckpt_path: Path, root: str | None, count: int, device: str, folder: Path) -> dict[str, Any]:
    """The figures of the FashionMNIST model, kept beside the page.

    Args:
        ckpt_path: Its checkpoint.
        root: Where its data lies now, or None.
        count: Images for each figure that a classifier gives.
        device: Where to compute.
        folder: The gallery's folder.
    """
    key = key_of(
        {"sha256": file_hash(ckpt_path), "count": count, "views": VIEWS, "blur": HYBRID_BLUR, "sampling": COMPOSED}
    )
    path = folder / "figures.json"
    if path.is_file() and json.loads(path.read_text())["key"] == key:
        return dict(json.loads(path.read_text()))
    data = prepared_data(ckpt_path, root=root)
    model = load_module(ckpt_path).to(pick_device(device))
    figures = {
        "key": key,
        **named(model, untrained(ckpt_path).to(model.device), data, count),
        "img2img": fallen(model, data),
        "inversion": inverted(model, data),
        "inpainting": filled(model, data),
    }
    keep_json(path, figures)
    return figures


def untrained(ckpt_path: Path) -> Any:
    """A checkpoint's model with fresh random weights."""
    module: Any = load_module(ckpt_path)
    with torch.random.fork_rng():
        torch.manual_seed(keyed_seed("untrained"))
        for layer in module.net.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
    return module


class Reader:
    """A support vector machine that classifies changed images, such as blurred ones.

    Args:
        change: What is done to images (B, C, H, W) in [-1, 1] before it sees them, in training too.
        data: Images and classes to learn from; 5,000 of the training split are.
    """

    def __init__(self, change: Callable[[Tensor], Tensor], data: Any) -> None:
        self.change, self.data = change, data
        self.machine = SVC(C=10.0).fit(self._seen("train"), data.reference_labels("train")[:LEARNT].numpy())

    def _seen(self, split: str) -> np.ndarray:
        """The first images of a split after the change, a row each."""
        return self._rows(first_images(self.data, split, LEARNT))

    def _rows(self, images: Tensor) -> np.ndarray:
        eight_bit = from_uint8(to_uint8(images))
        return self.change(eight_bit).flatten(1).numpy()

    def names(self, images: Tensor) -> Tensor:
        """The predicted class of each image (B, C, H, W) in [-1, 1]."""
        return torch.from_numpy(self.machine.predict(self._rows(images)))

    def accuracy(self) -> float:
        """Accuracy on the first 5,000 test images."""
        return float(self.machine.score(self._seen("test"), self.data.reference_labels("test")[:LEARNT].numpy()))


def far(images: Tensor) -> Tensor:
    """The low frequencies of a hybrid, which are seen from afar."""
    return editing.gaussian_blur(images, HYBRID_BLUR)


def near(images: Tensor) -> Tensor:
    """The high frequencies of a hybrid, which are seen from near."""
    return images - far(images)


def named(model: Any, random: Any, data: Any, count: int) -> dict[str, Any]:
    """How often a classifier predicts the requested class, in anagrams and hybrids.

    Classes are not chosen to go well together: condition k of image i is class i + 3 k modulo 10.

    Returns:
        Shares for the trained and the untrained model, chance, and the classifiers' accuracy on test images.
    """
    plain, afar, close = (Reader(change, data) for change in (lambda x: x, far, near))
    classes, rows = data.num_classes, torch.arange(count)[:, None]
    rates: dict[str, Any] = {"chance": 1 / classes, "anagrams": [], "hybrids": []}
    rates["accuracy"] = {"image": plain.accuracy(), "from afar": afar.accuracy(), "from near": close.accuracy()}
    for names in VIEWS:
        views = [editing.make_view(name, model.image_shape) for name in names]
        labels = (rows + 3 * torch.arange(len(views))) % classes
        found = {
            which: torch.stack([plain.names(view.apply(images)) for view in views], 1) == labels
            for which, images in each(model, random, partial(editing.anagram, views=views, labels=labels))
        }
        rates["anagrams"].append({"views": names, **{which: shares(right) for which, right in found.items()}})
    labels = (rows + 3 * torch.arange(2)) % classes
    found = {
        which: torch.stack([afar.names(images), close.names(images)], 1) == labels
        for which, images in each(model, random, partial(editing.hybrid, labels=labels, blur_sigma=HYBRID_BLUR))
    }
    rates["hybrids"].append({"views": ["from afar", "from near"], **{w: shares(right) for w, right in found.items()}})
    return rates


def each(model: Any, random: Any, draw: Callable[..., Tensor]) -> list[tuple[str, Tensor]]:
    """Images of the trained and the untrained model under the same settings."""
    sampling = model.sampling.replace(**COMPOSED)
    return [("trained", draw(model, sampling=sampling)), ("untrained", draw(random, sampling=sampling).nan_to_num())]


def shares(right: Tensor) -> list[float]:
    """Share of the images that are right in each view, then in all at once."""
    return [*right.float().mean(0).tolist(), float(right.all(1).float().mean())]


def fallen(model: Any, data: Any, starts: Sequence[int] = (1, 3, 5, 7, 10, 20), count: int = 8) -> dict[str, float]:
    """Mean PSNR of image-to-image against the input, by start level."""
    images = first_images(data, "test", count)
    return {str(start): mean_db(editing.img2img(model, images, start).cpu(), images)[0] for start in starts}


def inverted(model: Any, data: Any, count: int = 4) -> dict[str, tuple[float, float]]:
    """Mean and least PSNR after 100 steps up and 100 back, by sampler."""
    images = first_images(data, "test", count)
    found = {}
    for name in ("heun", "ddim"):
        sampling = model.sampling.replace(sampler=name, num_steps=100)
        x = editing.invert(model, images, sampling=sampling)
        back = editing.denoise(model, x, float(sampling.sigmas(model.denoiser.scaling)[0]), sampling=sampling)
        found[name] = mean_db(back.cpu(), images)
    return found


def filled(model: Any, data: Any, count: int = 4) -> dict[str, bool]:
    """Whether the known pixels of inpainted images are the image's bit for bit, by sampler."""
    images = first_images(data, "test", count)
    known = torch.ones(1, 1, *images.shape[2:])
    known[..., images.shape[2] // 2 :, :] = 0
    found = {}
    for name in ("heun", "ddim", "ddpm"):
        made = editing.inpaint(model, images, known, sampling=model.sampling.replace(sampler=name)).cpu()
        found[name] = bool(((made == images) | (known == 0)).all())
    return found


def mean_db(made: Tensor, images: Tensor) -> tuple[float, float]:
    """Mean and least PSNR of images against their originals."""
    values = decibels(made, images)
    return sum(values) / len(values), min(values)
