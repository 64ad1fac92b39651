"""LightningDataModules of images; they know nothing of diffusion."""

from datamodules.base import ImageDataModule
from datamodules.celeba import CelebA
from datamodules.cifar10 import CIFAR10
from datamodules.digits import Digits
from datamodules.folder import ImageFolder, Landscapes
from datamodules.mnist import MNIST, FashionMNIST
from datamodules.paired import PairedFolder
from datamodules.single_image import SingleImage
from datamodules.streaming import Streamed
from datamodules.subset import Subset

__all__ = [
    "CIFAR10",
    "MNIST",
    "CelebA",
    "Digits",
    "FashionMNIST",
    "ImageDataModule",
    "ImageFolder",
    "Landscapes",
    "PairedFolder",
    "SingleImage",
    "Streamed",
    "Subset",
]
