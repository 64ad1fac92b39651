"""What several tests share."""

from pathlib import Path

import numpy as np
import yaml
from helpers.project_files import write_idx
from PIL import Image

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


EXPERIMENTS = sorted(path for path in CONFIGS.glob("*.yaml") if path.name != "base.yaml")


CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def write_images(folder, count=24, size=80):
    """A folder of images, in two sub-folders."""
    rng = np.random.default_rng(0)
    for index in range(count):
        path = folder / ("first", "second")[index % 2] / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)
    return folder


def write_cifar_folders(folder):
    for split, count in (("train", 40), ("test", 10)):
        for name in CIFAR10_CLASSES:
            write_images_of_class(folder / split / name, count // 10)
    return folder


def write_images_of_class(folder, count):
    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (32, 32), (index * 20, 50, 90)).save(folder / f"{index:04d}.jpg")


def write_celeba(folder, count=40):
    """`img_align_celeba` with its partition and attribute lists."""
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{index:06d}.jpg" for index in range(1, count + 1)]
    for index, name in enumerate(names):
        Image.new("RGB", (178, 218), (index * 5, 90, 120)).save(folder / "img_align_celeba" / name)
    (folder / "list_eval_partition.txt").write_text(
        "".join(f"{name} {0 if index < 24 else 1 if index < 32 else 2}\n" for index, name in enumerate(names))
    )
    attributes = " ".join(f"Attribute_{index}" for index in range(40)).replace("Attribute_31", "Smiling")
    rows = "".join(
        f"{name} " + " ".join("1" if (index + k) % 2 else "-1" for k in range(40)) + "\n"
        for index, name in enumerate(names)
    )
    (folder / "list_attr_celeba.txt").write_text(f"{count}\n{attributes}\n{rows}")
    return folder


DATA = {  # options that put tiny data in the place of the real
    "Digits": lambda folder: [],
    "MNIST": lambda folder: [f"--data.init_args.root={write_idx(folder)}", "--data.init_args.val_size=32"],
    "FashionMNIST": lambda folder: [f"--data.init_args.root={write_idx(folder)}", "--data.init_args.val_size=32"],
    "CIFAR10": lambda folder: [f"--data.init_args.root={write_cifar_folders(folder)}", "--data.init_args.val_size=8"],
    "CelebA": lambda folder: [f"--data.init_args.root={write_celeba(folder)}"],
    "ImageFolder": lambda folder: [f"--data.init_args.root={write_images(folder)}"],
    "Landscapes": lambda folder: [f"--data.init_args.root={write_images(folder)}"],
    "SingleImage": lambda folder: [],
}


def parts(config):
    """A config's model class, data class and network, read as its user wrote it."""
    content = yaml.safe_load(config.read_text())
    return content, content["model"]["class_path"], content["data"]["class_path"].rsplit(".", 1)[1]
