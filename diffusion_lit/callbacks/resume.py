"""Compares a resumed run with its checkpoint, and applies the differences.

A checkpoint records the settings of model and data; this callback adds those of average, guard and trainer. Changed
options of optimizer and schedule are applied (`modules.reapply`).
"""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from diffusion_lit.callbacks.loggers import TensorBoardLogger
from diffusion_lit.modules.base import BaseModule
from diffusion_lit.modules.reapply import reapply, reapply_implementation
from diffusion_lit.runtime.internals import bare, data_of

FREE = (  # how and where, not what, a run computes
    *("net.activation_checkpointing", "optimizer.fused", "optimizer.foreach", "cache_dir", "cache_latents"),
    *("num_workers", "on_device"),
)
TRAINER = (  # settings of the trainer that the training depends on
    *("max_steps", "max_epochs", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
    *("val_check_interval", "check_val_every_n_epoch", "limit_train_batches", "limit_val_batches", "overfit_batches"),
    *("devices", "num_nodes"),
)
RENAMED = {  # class paths of version 0.1.0
    **{
        f"diffusion_lit.diffusion.{old}{kind}Scaling": f"diffusion_lit.diffusion.{new}{kind}Preconditioning"
        for old, new in (("", ""), ("scaling.", "preconditioning."))
        for kind in ("EDM", "Eps", "Flow", "V", "X0")
    },
    **{
        f"diffusion_lit.modules.{module}Trapezoid": f"diffusion_lit.modules.{module}WarmupStableDecay"
        for module in ("", "optim.")
    },
    **{
        f"diffusion_lit.diffusion.noise.{kind}": f"diffusion_lit.diffusion.schedules.{kind}"
        for kind in ("ContinuousVP", *(f"{kind}Schedule" for kind in ("Cosine", "Linear", "ScaledLinear", "Sigmoid")))
    },
    "diffusion_lit.diffusion.PaperWeight": "diffusion_lit.diffusion.PredictionWeight",
    "diffusion_lit.diffusion.loss.PaperWeight": "diffusion_lit.diffusion.loss.PredictionWeight",
}
ABSENT = "nothing"


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one.

    Args:
        values: Dictionaries of plain values.
        prefix: What the keys begin with.

    Returns:
        Values by keys that dots join, `init_args` left out; a class that has a new name goes by that.
    """
    if not isinstance(values, dict) or (not values and prefix):
        return {prefix.rstrip("."): RENAMED.get(values, values) if isinstance(values, str) else values}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, prefix if key == "init_args" else f"{prefix}{key}.")
    return found


def differences(before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """What differs between two settings.

    Args:
        before: Those of the checkpoint, as nested dictionaries.
        now: Those of this run.

    Yields:
        The key, and its value before and now, `ABSENT` where there is none or it is None. Of a part whose class
        differs, the class and what both classes take.
    """
    one, two = ({key: value for key, value in flat(part).items() if value is not None} for part in (before, now))
    for key in sorted(one.keys() | two.keys()):
        old, new = one.get(key, ABSENT), two.get(key, ABSENT)
        part = key.rpartition(".")[0]
        paths = [values.get(f"{part}.class_path" if part else "_class_path") for values in (one, two)]
        of_both = paths[0] == paths[1] or key.endswith("class_path") or ABSENT not in (old, new)
        if of_both and key not in FREE and _plain(old) != _plain(new):
            yield key, old, new


def _plain(value: Any) -> Any:
    """The value to compare; a tuple counts as a list."""
    return list(value) if isinstance(value, (list, tuple)) else value


class Resume(Callback):
    """Records the settings of a run in its checkpoints and in TensorBoard, and applies changes when it is resumed.

    Args:
        settings: Plain values, nested, that the checkpoint's other records do not hold.
    """

    def __init__(self, settings: dict[str, Any] | None = None) -> None:
        self.settings = settings or {}
        self._changed: dict[str, tuple[Any, Any]] | None = None
        self._saved: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """The settings."""
        return {"settings": self.settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: this run's settings hold."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the settings beside the run's figures under TensorBoard's HPARAMS."""
        data = data_of(trainer)
        every = {"model": dict(pl_module.hparams), "data": {} if data is None else dict(data.hparams), **self.settings}
        settings = {key: value for key, value in flat(every).items() if not key.endswith("_instantiator")}
        for logger in trainer.loggers if trainer.callback_metrics else []:
            if isinstance(logger, TensorBoardLogger):
                logger.log_result(settings, trainer.callback_metrics, trainer.global_step)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Finds differences in optimizer and schedule, and drops the state of a schedule that was replaced."""
        before, now = checkpoint.get("hyper_parameters", {}), dict(pl_module.hparams)
        if trainer.state.fn != "fit" or not before or not now:
            return
        parts = ({"optimizer": values.get("optimizer")} for values in (before, now))
        changed = {key.partition(".")[2]: (old, new) for key, old, new in differences(*parts)}
        schedules = [{"schedule": values.get("lr_scheduler")} for values in (before, now)]
        if list(differences(*schedules)):
            changed["schedule"] = (schedules[0], schedules[1])
        self._saved = next(iter(checkpoint.get("lr_schedulers", [])), {})
        if "schedule" in changed:
            checkpoint["lr_schedulers"] = []
        self._changed = changed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Applies what differs."""
        changed, self._changed = self._changed, None
        if changed is None or not isinstance(pl_module, BaseModule):
            return
        if type(pl_module).configure_optimizers is not BaseModule.configure_optimizers:
            return
        optimizer = bare(trainer.optimizers[0])
        scheduler = trainer.lr_scheduler_configs[0].scheduler if trainer.lr_scheduler_configs else None
        total = getattr(scheduler, "total_steps", None)
        if "schedule" not in changed and self._saved.get("total_steps", total) != total:  # it follows the run's length
            changed["schedule"] = (self._saved["total_steps"], total)
        reapply_implementation(optimizer)
        if changed:
            reapply(optimizer, scheduler, pl_module._makers(), changed, self._saved, trainer.global_step)
