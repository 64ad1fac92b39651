"""A trained diffusion model as the teacher of a consistency model."""

from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from diffusion_lit.checks import check_number
from diffusion_lit.diffusion.consistency_parts import PathPoint, TeacherStep
from diffusion_lit.diffusion.denoiser import Denoiser
from diffusion_lit.diffusion.generate import check_follows_ode
from diffusion_lit.modules.base import DiffusionModule
from diffusion_lit.modules.latent import LatentDiffusion
from diffusion_lit.modules.latent_space import Frozen
from diffusion_lit.modules.load import load_module
from diffusion_lit.storage.hashing import weights_hash
from diffusion_lit.storage.runs import find_checkpoint
from diffusion_lit.words import article, counted


class FrozenDenoiser(Frozen):
    """A denoiser that nothing trains, averages or saves; it follows its images to their device.

    Noise levels outside those that it was trained on are moved to their edge, as the loss does with its own.

    Args:
        denoiser: The denoiser.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser)
        self.scaling, self.num_classes, self.augment_dim = denoiser.scaling, denoiser.num_classes, denoiser.augment_dim

    def __call__(self, x: Tensor, sigma: Tensor, label: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """Estimates the clean image; see `Denoiser.forward`."""
        estimate: Tensor = self.on(x.device)(x, self.scaling.clamp(sigma), label, augment=augment)
        return estimate


class Teacher(PathPoint):
    """A trained diffusion model whose ODE a consistency model learns to shorten, see `TeacherStep`.

    Its file is read when training begins, and not where a checkpoint that names it is loaded.

    Args:
        ckpt_path: Its checkpoint, or the folder of its runs, `runs/NAME`, for the newest one there; by default the one
            that training begins from, `fit --init_from`. A training from nothing has none then, which a warning says:
            its pairs are of the same draw.
        cfg_scale: Classifier-free guidance of the teacher, which the student learns; 1 is none.

    Raises:
        ValueError: If the scale is no number.
    """

    def __init__(self, ckpt_path: str | None = None, cfg_scale: float = 1.0) -> None:
        check_number(cfg_scale=cfg_scale)
        self.ckpt_path, self.cfg_scale = ckpt_path, cfg_scale
        self._path: PathPoint | None = None

    @property
    def path(self) -> PathPoint:
        """Where points come from, once `open` has said it.

        Raises:
            ValueError: If it has not.
        """
        if self._path is None:
            raise ValueError("The teacher is read when training begins; call its `open` before it is asked.")
        return self._path

    def __call__(
        self, x: Tensor, x0: Tensor, noise: Tensor, t: Tensor, r: Tensor, label: Tensor | None, augment: Tensor | None
    ) -> Tensor:
        """The point; see `PathPoint.__call__`."""
        return self.path(x, x0, noise, t, r, label, augment)

    def slope(
        self, x: Tensor, x0: Tensor, noise: Tensor, t: Tensor, label: Tensor | None, augment: Tensor | None
    ) -> Tensor:
        """The derivative of the path; see `PathPoint.slope`."""
        return self.path.slope(x, x0, noise, t, label, augment)

    def open(
        self,
        x_shape: tuple[int, int, int],
        num_classes: int,
        begun_from: str | None = None,
        encoder_sha256: str | None = None,
    ) -> str | None:
        """Reads the teacher's average weights; see `PathPoint.open`.

        Raises:
            ValueError: If there is none, it follows no ODE, or it draws other images, classes or latents than the
                student.
        """
        given = self.ckpt_path or begun_from
        if given is None:
            self._path = PathPoint()
            rank_zero_warn(
                "There is no teacher, as training begins from nothing: consistency is trained on the data's own paths, "
                "without guidance. Give --init_from CKPT to distil that model."
            )
            return None
        path = Path(given).expanduser()
        if not path.exists():
            raise ValueError(f"There is no teacher {given}; give a checkpoint or a folder of runs as ckpt_path.")
        teacher = load_module(find_checkpoint(path))
        if not isinstance(teacher, DiffusionModule):
            raise ValueError(f"The teacher {path} is {article(teacher)}; give a model that draws images.")
        check_follows_ode(teacher.sampling, f"it is no teacher ({path})")
        if (x_shape, num_classes) != (teacher.x_shape, teacher.num_classes):
            raise ValueError(
                f"The teacher {path} denoises shape {teacher.x_shape} with {counted(teacher.num_classes, 'class')}, "
                f"and this model {x_shape} with {num_classes}; give both the same data and kind of model."
            )
        theirs = teacher.space.encoder_sha256 if isinstance(teacher, LatentDiffusion) else None
        if theirs != encoder_sha256:
            raise ValueError(
                f"The teacher {path} denoises {_what(theirs)}, and this model {_what(encoder_sha256)}; give both the "
                "same vae_ckpt and vae_precision, or take a teacher of this kind."
            )
        self._path = TeacherStep(FrozenDenoiser(teacher.denoiser), self.cfg_scale)
        return weights_hash(teacher.denoiser.state_dict())


def _what(encoder_sha256: str | None) -> str:
    return "images" if encoder_sha256 is None else f"latents of the encoder with the hash {encoder_sha256[:12]}"
