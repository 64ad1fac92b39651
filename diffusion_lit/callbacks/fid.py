"""The Fréchet distance during training, by the code of `diffusion-lit evaluate` with fewer samples.

The metric is named after its extractor and number of samples, `fid_inception_5k`; `fid_inception_5k_floor` is the same
for real images against real images.
"""

from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from tqdm import tqdm

from diffusion_lit.callbacks.ema import EMA
from diffusion_lit.callbacks.intervals import ends
from diffusion_lit.checks import check_count
from diffusion_lit.diffusion.images import to_uint8
from diffusion_lit.evaluation.features import FeatureExtractor, Features, MissingWeights
from diffusion_lit.evaluation.generation import class_frequencies, draw_labels
from diffusion_lit.evaluation.metrics import Reference, Statistics, frechet_distance, too_few
from diffusion_lit.evaluation.reference import real_against_real, reference_of
from diffusion_lit.modules.protocols import Generates, HasImages, ImageSource, is_model
from diffusion_lit.runtime import watchdog
from diffusion_lit.runtime.internals import average_of, data_of
from diffusion_lit.runtime.ranks import rank_zero_alone, rank_zero_first, share_rows
from diffusion_lit.words import counted, short_count


class FID(Callback):
    """Measures the Fréchet distance of samples to the training images at validation.

    The samples have fixed seeds and come from the average (EMA) weights; ranks share the work. To keep the best
    checkpoint, add `lightning.pytorch.callbacks.ModelCheckpoint` with `monitor: fid_inception_5k` (the metric's name;
    it is printed at the start).

    Args:
        extractor: What images are compared by.
        num_samples: Number of samples; part of the metric's name, since figures at other numbers do not compare.
        every_n_epochs: Measures at the first validation, then this many epochs apart, and at the end.
        batch_size: Samples drawn at a time on each rank; does not change them.
        seed: Seed of the first sample.
        split: Split of the data that samples are compared with.
        strict: Stops the run when the extractor's weights cannot be had, instead of training without the metric.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        num_samples: int = 1000,
        every_n_epochs: int = 1,
        batch_size: int = 100,
        seed: int = 0,
        split: str = "train",
        strict: bool = False,
    ) -> None:
        check_count(2, num_samples=num_samples)
        check_count(batch_size=batch_size, every_n_epochs=every_n_epochs)
        check_count(0, seed=seed)
        self.extractor = extractor
        self.num_samples = num_samples
        self.every_n_epochs = every_n_epochs
        self.batch_size = batch_size
        self.seed = seed
        self.split = split
        self.strict = strict
        self._prepared = False
        self._available = False
        self._reference: Reference | None = None  # on rank 0 alone
        self._floor: tuple[float, int] | None = None
        self._measured_epoch: int | None = None

    @property
    def tag(self) -> str:
        """Name of the metric, such as `fid_inception_5k`."""
        return f"{self.extractor.metric}_{short_count(self.num_samples)}"

    @property
    def available(self) -> bool:
        """Whether it is measured, known from the start of training on."""
        return self._available

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures where it is due."""
        if trainer.sanity_checking or not self._available or not self._due(trainer):
            return
        _check_average(trainer)
        value = self.measure(trainer, pl_module)
        self._measured_epoch = trainer.current_epoch
        pl_module.log(self.tag, value, prog_bar=True, rank_zero_only=False, batch_size=1, sync_dist=True)
        if self._floor is not None:
            floor, count = self._floor
            name = f"{self.extractor.metric}_{short_count(count)}_floor"
            pl_module.log(name, torch.tensor(floor, device=pl_module.device), batch_size=1, sync_dist=True)

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> Tensor:
        """The distance, on every rank."""
        made = self._generated(trainer, pl_module)
        value = torch.zeros((), device=pl_module.device)
        if self._reference is not None:
            value += frechet_distance(Statistics.of(made), self._reference.statistics)
        return trainer.strategy.broadcast(value)

    def draw(self, trainer: Trainer, pl_module: LightningModule, rows: Tensor) -> Tensor:
        """The images that are measured.

        Args:
            trainer: The trainer.
            pl_module: The model.
            rows: Which of the `num_samples`, int64 (B,).

        Returns:
            Samples (B, C, H, W) in [-1, 1].
        """
        assert is_model(pl_module)
        seeds = (rows + self.seed).tolist()
        frequencies = class_frequencies(_data(trainer), pl_module.num_classes)
        return pl_module.generate(seeds, draw_labels(seeds, frequencies))

    def problem(self, trainer: Any, pl_module: LightningModule) -> str | None:
        """Why the model cannot be measured on this data, or None.

        Returns:
            A sentence without its full stop, or None.
        """
        data = data_of(trainer)
        if not isinstance(pl_module, Generates) or not isinstance(data, HasImages):
            return f"{type(pl_module).__name__} on {type(data).__name__} has no images to compare"
        return too_few_images(trainer, data, self.split)

    def state_dict(self) -> dict[str, Any]:
        """When it was last measured."""
        return {"measured_epoch": self._measured_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores when it was last measured."""
        self._measured_epoch = state_dict["measured_epoch"]

    def _due(self, trainer: Trainer) -> bool:
        if self._measured_epoch is None or trainer.state.fn != "fit":
            return True
        return ends(trainer) or trainer.current_epoch - self._measured_epoch >= self.every_n_epochs

    def on_fit_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Loads extractor and reference, which rank 0 alone keeps, or says why there is no such metric."""
        if self._prepared:
            return
        self._prepared = True
        if trainer.fast_dev_run:
            self.num_samples = min(self.num_samples, max(4, trainer.world_size))
        data, problem = _data(trainer), self.problem(trainer, pl_module)
        if problem is None and trainer.world_size > self.num_samples:
            raise ValueError(f"{trainer.world_size} ranks cannot share {self.num_samples} samples; raise num_samples.")
        if problem is None:  # rank 0 fills the caches that the others then read
            problem = rank_zero_first(partial(self._load, data), "the weights of the extractor")
        self._available = trainer.strategy.reduce_boolean_decision(problem is None)
        if not self._available:
            self._do_without(trainer, problem or "another rank could not load the extractor.")
            return
        rank_zero_alone(partial(self._measure_reference, trainer, pl_module, data), "the features of real images")
        self._floor = trainer.strategy.broadcast(self._floor)

    on_validation_start = on_fit_start  # of `diffusion-lit validate`

    def _load(self, data: ImageSource) -> str | None:
        """Loads the extractor, or says why it cannot be had."""
        try:
            self.extractor.load(data)
        except MissingWeights as error:
            return str(error)
        return None

    def _do_without(self, trainer: Any, problem: str) -> None:
        """Stops, or says once that the run goes on without the metric."""
        if self.strict:
            raise ValueError(f"{self.tag} cannot be measured, and strict is set: {problem}")
        monitors = [
            callback
            for callback in trainer.callbacks
            if isinstance(callback, ModelCheckpoint) and callback.monitor == self.tag
        ]
        for callback in monitors:
            callback.save_top_k = 0
        also = " and keeps no best checkpoint by it" if monitors else ""
        rank_zero_warn(f"This run trains without {self.tag}{also}: {problem}")

    def _measure_reference(self, trainer: Any, pl_module: LightningModule, data: ImageSource) -> None:
        """The reference and the floor, from the cache or computed now."""
        self.extractor.to(pl_module.device)
        limit = 64 if trainer.fast_dev_run else None
        held_out = "val" if "val" not in self.split else "test"
        with tqdm(desc=f"{self.extractor.name} features of real images", unit="img", leave=False, delay=2) as bar:
            self._reference = reference_of(data, self.split, self.extractor, self.batch_size, limit, bar.update)
            other: Features | None = None
            if len(data.reference_images(held_out)) > 0:
                most = limit or self.num_samples
                other = reference_of(data, held_out, self.extractor, self.batch_size, most, bar.update).features
        self._floor = real_against_real(self._reference, other, self.num_samples)
        if self._floor is None:
            rank_zero_info(f"Measuring {self.tag}; there are too few images for its real-against-real floor.")
        else:
            floor, count = self._floor
            rank_zero_info(f"Measuring {self.tag}; real images against real ones get {floor:.4g} at {count:,}.")
        warning = too_few(self.num_samples, self._reference.statistics.mu.shape[0])
        if warning and not trainer.fast_dev_run:
            rank_zero_warn(f"{self.tag}: {warning}")

    def _generated(self, trainer: Trainer, pl_module: LightningModule) -> Tensor:
        """Features of all samples in the order of their seeds, of which each rank draws a part."""
        self.extractor.to(pl_module.device)

        def some(rows: range) -> Tensor:
            parts = []
            for part in torch.split(torch.arange(rows.start, rows.stop), self.batch_size):
                parts.append(self.extractor.features(to_uint8(self.draw(trainer, pl_module, part))).features)
                watchdog.beat()
            return torch.cat(parts)

        return share_rows(pl_module, self.num_samples, some)


def too_few_images(trainer: Trainer, data: HasImages, split: str) -> str | None:
    """Why a split is too small for a distance whose images are shared by the ranks, or None; see `FID.problem`."""
    count, least = len(data.reference_images(split)), max(2, trainer.world_size)
    return None if count >= least else f"the split {split} has {counted(count, 'image')}, and it takes {least}"


def _data(trainer: Trainer) -> ImageSource:
    """The data of a run, a data set unless `FID.problem` says otherwise."""
    return cast(ImageSource, data_of(trainer))


def _check_average(trainer: Any) -> None:
    """Refuses to measure raw weights where an average is kept."""
    for callback in trainer.callbacks:
        if not isinstance(callback, WeightAveraging) or average_of(callback) is None:
            continue
        if not (isinstance(callback, EMA) and callback._swapped):
            raise ValueError(
                f"The run keeps an average of its weights by {type(callback).__name__}, which is not in place when FID "
                "measures; use diffusion_lit.callbacks.EMA."
            )
