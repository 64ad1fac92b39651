"""The name that `loaders` had in version 0.1.0, which data sets of users import."""

from datamodules.loaders import Array, EvalLoader, Key, Split, TrainLoader, normalise
from diffusion_lit.diffusion.rng import keyed_generator, run_seed

__all__ = ["Array", "EvalLoader", "Key", "Split", "TrainLoader", "keyed_generator", "normalise", "run_seed"]
