"""Base classes of the LightningModules: keyed training draws, and the loss, sampling and validation of denoisers.

A training step is a function of the weights, the batch and the key (seed, epoch, batch): noise levels, noise and label
dropout are drawn for the whole global batch from one generator and each rank takes its rows, so that neither a restart
nor the number of devices changes the training. What the network itself draws (dropout) is keyed by the rank too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from diffusion_lit.checks import check_share
from diffusion_lit.diffusion.conditions import ImageCondition
from diffusion_lit.diffusion.denoiser import Denoiser
from diffusion_lit.diffusion.generate import Sampling
from diffusion_lit.diffusion.noise import NoiseLevels
from diffusion_lit.diffusion.rng import (
    BLOCK,
    drawn_by_index,
    keyed_generator,
    keyed_seed,
    run_seed,
    seed_default_generators,
)
from diffusion_lit.diffusion.samplers import SAMPLERS
from diffusion_lit.diffusion.samplers.meanflow import check_takes_until
from diffusion_lit.modules.batches import check_batch
from diffusion_lit.modules.given import PAIR, GivenImages
from diffusion_lit.modules.labels import check_null_class, class_names_of
from diffusion_lit.modules.optim import check_plateau, configure_optimizers, step_plateau
from diffusion_lit.modules.protocols import Continues, is_model
from diffusion_lit.nets.augment import AUGMENT_DIM, Augment, augment_images
from diffusion_lit.runtime.internals import data_of, is_built_by_command, logs_now, trainer_of


class Draws(NamedTuple):
    """The random draws of one training step, this rank's rows."""

    sigma: Tensor
    noise: Tensor
    label: Tensor | None
    condition: Tensor | None = None


class BaseModule(LightningModule):
    """Base of all modules: random draws of training are keyed, and a checkpoint describes its module.

    Args:
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning-rate schedule from the optimizer, stepped each training step.
    """

    class_names: list[str]
    prompts: list[str] | None = None
    label_dropout: float | None = None

    def __init__(self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None) -> None:
        super().__init__()
        # Kept in a closure, which the EMA's deepcopy shares: the command's factories reference the command, and so the
        # trainer, the data and the processes of other ranks, which cannot be copied.
        self._makers: Callable[[], tuple[OptimizerCallable, LRSchedulerCallable | None]]
        self._makers = lambda: (optimizer, lr_scheduler)
        self.class_names = []
        self.init_from: dict[str, Any] | None = None  # record of its initial weights, if they were not drawn at random
        self._has_checked = False
        if is_built_by_command():  # built by the command: plain values that describe the checkpoint
            self.save_hyperparameters()

    @classmethod
    def net_input(cls, image_shape: tuple[int, int, int], **init_args: Any) -> tuple[int, int, int]:
        """Shape (C, H, W) of the network's input.

        Args:
            image_shape: Shape (C, H, W) of the data's images.
            init_args: The module's arguments as they stand in the configuration.

        Returns:
            The images' own shape here.
        """
        return image_shape

    @property
    def ranks(self) -> tuple[int, int]:
        """Number of ranks, and this one."""
        trainer = trainer_of(self)
        return (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)

    def keyed_noise(self, shape: torch.Size, *key: int | str, index: Tensor | None = None) -> Tensor:
        """Draws standard normal noise for the global batch and takes this rank's rows.

        Args:
            shape: Shape (B, ...) of this rank's batch.
            key: Names the draw.
            index: Rows (B,) of the split for held-out images, of which each has its own draw whatever batch and rank
                it falls to.

        Returns:
            This rank's rows, of this shape.
        """
        if index is not None:
            size = (BLOCK, *shape[1:])
            return drawn_by_index(index.to(self.device), lambda draw: torch.randn(size, generator=draw), *key)
        world, rank = self.ranks
        generator = keyed_generator(*key, device=self.device)
        return torch.randn(shape[0] * world, *shape[1:], generator=generator, device=self.device)[rank::world]

    def rows_of(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The rows of a held-out split in a batch: its "index", or by its number where other data gives none.

        Args:
            batch: As the data module gives it.
            batch_idx: Number of the batch.

        Returns:
            Rows int64 (B,).
        """
        if "index" in batch:
            return batch["index"]
        count, (world, rank) = len(next(iter(batch.values()))), self.ranks
        return (batch_idx * count + torch.arange(count, device=self.device)) * world + rank

    def setup(self, stage: str) -> None:
        """Takes the classes' names from the data."""
        self.class_names = class_names_of(data_of(trainer_of(self)), self)

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Checks the first batch of the process, and seeds torch's default generators for the network's own draws."""
        if not self._has_checked:
            check_batch(batch, getattr(self, "image_shape", None), getattr(self, "num_classes", 0))
            self._has_checked = True
        seed = keyed_seed("network", run_seed(), self.current_epoch, batch_idx, self.global_rank)
        seed_default_generators(seed, self.device)

    def log_step(self, figures: dict[str, Tensor], batch_size: int) -> None:
        """Logs figures of a training step and shows them on the bar, where the trainer's interval is due.

        Logged in every step each would cost Lightning 0.8 ms (2 cores of a Xeon), and ranks would wait for each other.

        Args:
            figures: Scalars by their names.
            batch_size: Number of this rank's images.
        """
        trainer = trainer_of(self)
        if trainer is not None and logs_now(trainer):
            self.log_dict(figures, prog_bar=True, batch_size=batch_size, sync_dist=True)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs what `held_out` measures on the validation split, with the same draws at every epoch."""
        self.held_out("val", batch, batch_idx)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs what `held_out` measures on the test split."""
        self.held_out("test", batch, batch_idx)

    def held_out(self, split: str, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs the figures of held-out images, "SPLIT/loss" among them.

        Args:
            split: "val" or "test".
            batch: As the data module gives it.
            batch_idx: Number of the batch.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how held-out images are measured.")

    @property
    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """The trained parameters in groups, each with its learning rate relative to the optimizer's."""
        return [([parameter for parameter in self.parameters() if parameter.requires_grad], 1.0)]

    @property
    def unaveraged(self) -> list[nn.Parameter]:
        """Trained parameters that an average of the weights leaves out."""
        return []

    def configure_optimizers(self) -> Any:
        """The optimizer and, where there is one, the learning-rate schedule."""
        return configure_optimizers(self, *self._makers())

    def on_train_start(self) -> None:
        """Refuses a `ReduceLROnPlateau` if no images are held out."""
        check_plateau(self)

    def on_validation_epoch_end(self) -> None:
        """Steps a `ReduceLROnPlateau` with the validation loss."""
        step_plateau(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Records what the hyperparameters lack: class names, the data, and what the run started from."""
        data = data_of(trainer_of(self))
        checkpoint["diffusion_lit"] = {
            "class_names": class_names_of(data, self),
            "conditional": self._is_conditional,
            "data": data.identity() if isinstance(data, Continues) else {},
            "seed": run_seed(),
            "precision": "32-true" if trainer_of(self) is None else str(self.trainer.precision),
            **({} if self.init_from is None else {"init_from": self.init_from}),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the class names, by which the data are numbered and compared.

        Raises:
            ValueError: If the data has other classes than the checkpoint was trained on.
        """
        recorded = checkpoint.get("diffusion_lit", {})
        self.class_names = recorded.get("class_names", self.class_names)
        self.init_from = recorded.get("init_from")
        data = data_of(trainer_of(self))
        if isinstance(data, Continues):
            data.continue_from(recorded.get("data") or {}, self.class_names if self._is_conditional else [])

    @property
    def _is_conditional(self) -> bool:
        """Whether the network depends on class numbers."""
        return not is_model(self) or self.num_classes > 0


class DiffusionModule(GivenImages, BaseModule):
    """Trains a denoiser on images and samples from it, as `PixelModel` says.

    Args:
        denoiser: The model, `(x, sigma, label) -> x0_hat`.
        noise_levels: Distribution that training draws sigma from.
        loss: Called as a `DenoisingLoss` is, with its arguments and result.
        sampling: How images are drawn from the model unless told otherwise.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning-rate schedule from the optimizer, stepped each training step.
        label_dropout: Probability in [0, 1] of training a sample with the null class, so that guidance has an
            unconditional branch (Ho & Salimans 2022).
        augment: Non-leaky augmentation of training images (Karras 2022, appendix F.2); the network needs
            `augment_dim: 9`.
        condition: The image that the network is given, made of the one to denoise or paired with it; it needs its
            `condition_channels`.

    Raises:
        ValueError: If `label_dropout` is no probability, or the network does not take the augmentation's labels or the
            condition.
    """

    label_dropout: float

    def __init__(
        self,
        denoiser: Denoiser,
        noise_levels: NoiseLevels,
        loss: nn.Module,
        sampling: Sampling,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        label_dropout: float = 0.1,
        augment: Augment | None = None,
        condition: ImageCondition | None = None,
    ) -> None:
        BaseModule.__init__(self, optimizer, lr_scheduler)
        check_share(label_dropout=label_dropout)
        told = denoiser.augment_dim  # 1: the size of random crops, where the data has such
        if augment is not None and told != AUGMENT_DIM:
            raise ValueError(
                f"The network has augment_dim {told}, but augmentation tells it labels of length {AUGMENT_DIM}; set "
                f"its augment_dim to {AUGMENT_DIM}, or leave augment out."
            )
        self.augment = augment
        self.denoiser = denoiser
        self.noise_levels = noise_levels
        self.loss = loss
        self.sampling = sampling
        self.label_dropout = label_dropout
        self.class_names = [str(index) for index in range(denoiser.num_classes)]
        self.take_condition(condition)

    def on_fit_start(self) -> None:
        """Refuses what its samples need and training does not give: a null class, an end of steps."""
        check_null_class(self)
        if SAMPLERS[self.sampling.sampler].takes_until:
            check_takes_until(self.denoiser)

    def x0(self, batch: dict[str, Tensor], split: str, batch_idx: int) -> Tensor:
        """What is denoised of a batch.

        Args:
            batch: As the data module gives it.
            split: "train", "val" or "test".
            batch_idx: Number of the batch.

        Returns:
            Shape (B, *x_shape).
        """
        return batch["image"]

    def draw(self, label: Tensor | None, shape: torch.Size, *key: int | str) -> Draws:
        """Draws noise levels, noise and label dropout for the global batch and takes this rank's rows.

        Args:
            label: This rank's class indices of shape (B,), or None.
            shape: Shape (B, C, H, W) of this rank's batch.
            key: Names the draw.

        Returns:
            This rank's rows: sigma (B,), noise (B, C, H, W), label (B,) with dropped ones set to the null class.
        """
        world, rank = self.ranks
        generator = keyed_generator(*key, device=self.device)
        total = shape[0] * world
        rows = slice(rank, None, world)
        sigma = self.denoiser.scaling.clamp(self.noise_levels.sample(total, generator))
        self.sigma_range = torch.stack(sigma.aminmax())  # for the message if a step fails
        sigma = sigma[rows]
        noise = torch.randn(total, *shape[1:], generator=generator, device=self.device)[rows]
        if label is None or self.num_classes == 0:
            return Draws(sigma, noise, None)
        dropped = torch.rand(total, generator=generator, device=self.device)[rows] < self.label_dropout
        return Draws(sigma, noise, label.masked_fill(dropped, self.num_classes))

    def draw_augment(self, count: int, *key: int | str) -> Tensor | None:
        """Draws augmentation labels for the global batch and takes this rank's rows.

        Args:
            count: Number B of this rank's images.
            key: Names the draw.

        Returns:
            Labels (B, 9), or None where training images are not augmented.
        """
        if self.augment is None:
            return None
        world, rank = self.ranks
        return self.augment.draw(count * world, keyed_generator("augment", *key, device=self.device))[rank::world]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The mean denoising loss of a batch `{"image": (B, C, H, W) in [-1, 1], "label": (B,)}`."""
        x0 = self.x0(batch, "train", batch_idx)
        key = ("train", run_seed(), self.current_epoch, batch_idx)
        draws, augment = self.draw(batch.get("label"), x0.shape, *key), self.draw_augment(len(x0), *key)
        pair = batch.get(PAIR)
        if augment is not None:
            x0 = augment_images(x0, augment)
            pair = None if pair is None else augment_images(pair, augment)
        elif "crop_size" in batch and self.denoiser.augment_dim == 1:
            augment = batch["crop_size"]
        draws = draws._replace(condition=self.training_condition(x0, pair, self.ranks, *key))
        loss = self.losses(x0, draws, augment).mean()
        self.log_step({"train/loss": loss.detach()}, len(x0))
        return loss

    def losses(self, x0: Tensor, draws: Draws, augment: Tensor | None) -> Tensor:
        """The loss of each sample of a training step.

        Args:
            x0: What is denoised, shape (B, *x_shape).
            draws: The draws of the step.
            augment: Augmentation labels, shape (B, 9), or None.

        Returns:
            Shape (B,).
        """
        told = {} if draws.condition is None else {"condition": draws.condition}
        losses: Tensor = self.loss(self.denoiser, x0, draws.sigma, draws.noise, draws.label, augment, **told)
        return losses

    def held_out(self, split: str, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs the loss; see `BaseModule.held_out`."""
        x0 = self.x0(batch, split, batch_idx)
        label = batch.get("label") if self.num_classes else None
        index = self.rows_of(batch, batch_idx).to(self.device)
        noise = self.keyed_noise(x0.shape, split, index=index)
        sigma = drawn_by_index(index, lambda draw: self.noise_levels.sample(BLOCK, draw), split, "sigma")
        condition = self.held_out_condition(x0, batch.get(PAIR), index, split)
        sigma = self.denoiser.scaling.clamp(sigma)
        told = {} if condition is None else {"condition": condition}
        loss = self.loss(self.denoiser, x0, sigma, noise, label, **told).mean()
        self.log(f"{split}/loss", loss, prog_bar=split == "val", batch_size=len(x0), sync_dist=True)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One sample per image of the batch, of its class and condition, its index as the seed; (B, C, H, W)."""
        label = batch.get("label") if self.num_classes else None
        seeds = batch["index"].tolist()
        return self.generate(seeds, label, condition=self.conditions(seeds, batch["image"], batch.get(PAIR)))
