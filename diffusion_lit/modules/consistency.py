"""Consistency models: denoisers that draw an image in one step or two (Song 2023, arXiv 2303.01469).

Training starts from nothing, or, better, from the average weights of a diffusion model (`fit --init_from CKPT`, Geng
2024, arXiv 2406.14548). `ConsistencyLoss` says what is learned; with a `Teacher` instead of the data's own paths it is
distillation. `Consistency` works on images, `LatentConsistency` on latents.

Guidance: cfg_scale acts on the two estimates as it does on any denoiser, but these are images at the end of two paths
and no scores: only the scales 0 and 1 are maps that were trained. What guidance a model is to have is best distilled
into it by the teacher's cfg_scale and drawn at cfg_scale 1.
"""

from typing import Any

from torch import Tensor, nn

from diffusion_lit.diffusion.consistency_loss import ConsistencyLoss, ContinuousConsistencyLoss, check_boundary
from diffusion_lit.diffusion.denoiser import Denoiser
from diffusion_lit.diffusion.generate import Sampling
from diffusion_lit.diffusion.noise import LogNormal, NoiseLevels
from diffusion_lit.diffusion.preconditioning import EDMPreconditioning, Preconditioning
from diffusion_lit.modules.base import DiffusionModule, Draws
from diffusion_lit.modules.latent import LatentDiffusion
from diffusion_lit.runtime.internals import trainer_of

SECOND_LEVEL = 1.6  # the noise level of the second step, in standard deviations of the data


def few_steps(scaling: Preconditioning) -> Sampling:
    """Two steps of the sampler of consistency models, from the highest noise level and from one like the data's spread.

    Args:
        scaling: The model's prediction type.

    Returns:
        The settings.
    """
    levels = [scaling.sampling_range[1], SECOND_LEVEL * getattr(scaling, "sigma_data", 0.5)]
    return Sampling(sampler="consistency", num_steps=2, grid="levels", grid_options={"levels": levels})


class _FewSteps(DiffusionModule):
    """What consistency models of images and of latents share: the progress of the training, and the teacher."""

    loss: ConsistencyLoss | ContinuousConsistencyLoss
    _teacher_sha256: str | None = None

    def losses(self, x0: Tensor, draws: Draws, augment: Tensor | None) -> Tensor:
        """The loss of each sample, whose gap shrinks over the run; see `DiffusionModule.losses`."""
        losses: Tensor = self.loss(
            self.denoiser, x0, draws.sigma, draws.noise, draws.label, augment, progress=self.progress
        )
        return losses

    @property
    def progress(self) -> float:
        """Share of the optimizer steps of the run that are done, in [0, 1]; 1 without a trainer."""
        trainer = trainer_of(self)
        return 1.0 if trainer is None else min(1.0, trainer.global_step / self._length)

    def on_fit_start(self) -> None:
        """Reads the teacher, and refuses a run without an end."""
        super().on_fit_start()
        begun_from = None if self.init_from is None else str(self.init_from["file"])
        encoder = self.space.encoder_sha256 if isinstance(self, LatentDiffusion) else None
        found = self.loss.point.open(self.x_shape, self.num_classes, begun_from, encoder)
        if found is not None and self._teacher_sha256 not in (None, found):
            raise ValueError(
                f"The teacher has other weights (hash {found[:12]}) than the one that this run began with "
                f"({self._teacher_sha256[:12]}); give that one, or train anew."
            )
        self._teacher_sha256 = found

    def on_train_start(self) -> None:
        """Reads the length of the run."""
        super().on_train_start()
        self._length = self.trainer.estimated_stepping_batches
        if self._length == float("inf"):
            raise ValueError(
                "The gap of a consistency model shrinks over the run, but the run has no end: set trainer.max_steps or "
                "trainer.max_epochs."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the hash of the teacher."""
        super().on_save_checkpoint(checkpoint)
        if self._teacher_sha256 is not None:
            checkpoint["teacher_sha256"] = self._teacher_sha256

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the hash of the teacher."""
        super().on_load_checkpoint(checkpoint)
        self._teacher_sha256 = checkpoint.get("teacher_sha256")


class Consistency(_FewSteps):
    """A consistency model of images.

    Args:
        net: The network, as for `EDM`.
        scaling: Prediction type with c_skip(0) = 1 and c_out(0) = 0; by default EDM's preconditioning with sigma_data
            0.5.
        noise_levels: Distribution that training draws the upper noise level from; by default log-normal with P_mean
            -1.1 and P_std 2 (Song & Dhariwal 2023, section 3.5).
        loss: By default pseudo-Huber distances of the same draw at two noise levels whose gap shrinks over the run;
            `ContinuousConsistencyLoss` is the limit of no gap.
        sampling: How images are drawn; by default in two steps, from sigma_max and from 1.6 sigma_data.
        options: Further arguments of `DiffusionModule`.

    Raises:
        ValueError: If the prediction type does not give the image itself at noise level 0.
    """

    def __init__(
        self,
        net: nn.Module,
        scaling: Preconditioning | None = None,
        noise_levels: NoiseLevels | None = None,
        loss: ConsistencyLoss | ContinuousConsistencyLoss | None = None,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> None:
        scaling = scaling or EDMPreconditioning()
        check_boundary(scaling)
        super().__init__(
            Denoiser(net, scaling),
            noise_levels or LogNormal(P_mean=-1.1, P_std=2.0),
            loss or ConsistencyLoss(),
            sampling or few_steps(scaling),
            condition=None,
            **options,
        )


class LatentConsistency(_FewSteps, LatentDiffusion):
    """A consistency model of the latents of a frozen autoencoder.

    Args:
        net: The network, as for `LatentDiffusion`.
        vae_ckpt: The autoencoder, as for `LatentDiffusion`.
        scaling: As for `Consistency`; by default EDM's preconditioning with sigma_data 1, which latents have.
        noise_levels: As for `Consistency`; by default log-normal with P_mean -0.4 and P_std 2, the same relative to the
            scale of the data.
        loss: As for `Consistency`.
        sampling: As for `Consistency`.
        options: Further arguments of `LatentDiffusion`.

    Raises:
        ValueError: If the prediction type does not give the image itself at noise level 0.
    """

    def __init__(
        self,
        net: nn.Module,
        vae_ckpt: str,
        scaling: Preconditioning | None = None,
        noise_levels: NoiseLevels | None = None,
        loss: ConsistencyLoss | ContinuousConsistencyLoss | None = None,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> None:
        scaling = scaling or EDMPreconditioning(sigma_data=1.0)
        check_boundary(scaling)
        levels = noise_levels or LogNormal(P_mean=-0.4, P_std=2.0)
        super().__init__(net, vae_ckpt, scaling, levels, sampling=sampling or few_steps(scaling), **options)
        self.loss = loss or ConsistencyLoss()
