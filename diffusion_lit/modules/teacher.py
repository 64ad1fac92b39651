"""A trained diffusion model as the teacher of a consistency model."""

from pathlib import Path

from torch import Tensor

from diffusion_lit.diffusion.consistency_parts import TeacherStep
from diffusion_lit.diffusion.denoiser import Denoiser
from diffusion_lit.modules.base import DiffusionModule
from diffusion_lit.modules.latent_space import Frozen
from diffusion_lit.modules.load import load_module
from diffusion_lit.storage.hashing import weights_hash
from diffusion_lit.storage.runs import find_checkpoint


class _FrozenDenoiser(Frozen):
    """A denoiser that nothing trains, averages or saves; it follows its images to their device."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser)
        self.num_classes = denoiser.num_classes

    def __call__(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        estimate: Tensor = self.on(x.device)(x, sigma, label)
        return estimate


def _unread(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
    raise ValueError("The teacher is read when training begins; call its `open` before it is asked.")


class Teacher(TeacherStep):
    """A trained diffusion model whose ODE a consistency model learns to shorten.

    Its file is read when training begins, and not where a checkpoint that names it is loaded.

    Args:
        ckpt_path: Its checkpoint, or the folder of its runs, `runs/NAME`, for the newest one there; by default the one
            that training begins from, `fit --init_from`.
        cfg_scale: Classifier-free guidance of the teacher, which the student so learns; 1 is none.
    """

    def __init__(self, ckpt_path: str | None = None, cfg_scale: float = 1.0) -> None:
        super().__init__(_unread, cfg_scale)
        self.ckpt_path = ckpt_path

    def open(self, x_shape: tuple[int, int, int], num_classes: int, begun_from: str | None = None) -> str:
        """Reads the teacher's average weights; see `PathPoint.open`.

        Raises:
            ValueError: If there is none, or it draws other images or classes than the student.
        """
        given = self.ckpt_path or begun_from
        if given is None:
            raise ValueError(
                "The teacher is the model that training begins from, and this training begins from nothing: give "
                "--init_from CKPT, or the teacher's ckpt_path."
            )
        path = Path(given).expanduser()
        if not path.exists():
            raise ValueError(f"There is no teacher {given}; give a checkpoint or a folder of runs as ckpt_path.")
        teacher = load_module(find_checkpoint(path))
        if not isinstance(teacher, DiffusionModule):
            raise ValueError(f"The teacher {path} is a {type(teacher).__name__}; give a model that draws images.")
        if (x_shape, num_classes) != (teacher.x_shape, teacher.num_classes):
            raise ValueError(
                f"The teacher {path} denoises shape {teacher.x_shape} with {teacher.num_classes} classes, and this "
                f"model {x_shape} with {num_classes}; give both the same data and kind of model."
            )
        self.teacher = _FrozenDenoiser(teacher.denoiser)
        return weights_hash(teacher.denoiser.state_dict())
