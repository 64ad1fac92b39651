"""Configurations that runs saved before name the logger here."""

from diffusion_lit.callbacks.loggers import TensorBoardLogger

__all__ = ["TensorBoardLogger"]
