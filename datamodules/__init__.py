"""LightningDataModules of images; they know nothing of diffusion."""

from datamodules.base import ImageDataModule
from datamodules.digits import Digits
from datamodules.mnist import MNIST, FashionMNIST

__all__ = ["MNIST", "Digits", "FashionMNIST", "ImageDataModule"]
