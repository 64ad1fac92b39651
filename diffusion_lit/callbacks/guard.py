"""Guards training against losses and gradients that are not finite.

The device decides without synchronisation whether a step is good. A flag

    ok = isfinite(loss) and isfinite(g_i) for every gradient g_i

(over all ranks) selects, for each weight and each tensor of the optimizer's state, the value before or after the step,
so that a bad step changes nothing. The host reads the flag at the logging interval, before validation and at the end.
On the CPU a good step needs only the flag.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from diffusion_lit.callbacks.checkpoint import LastCheckpoint
from diffusion_lit.runtime.internals import bare, logs_now
from diffusion_lit.runtime.stopping import RunStopped
from diffusion_lit.words import counted

CHOICES = ("stop", "skip", "off")
# Devices whose kernels for gradient scaling are sound in every version of torch that is supported: on MPS they set half
# gradients to zero (pytorch/pytorch#184286), and fused optimizers did not leave a bad step out (#186360).
SCALED = ("cpu", "cuda")
HOST = "cpu"  # the kind of device whose flag the host knows without waiting


class NonFiniteGuard(Callback):
    """Skips updates whose loss or gradients are not finite.

    With `stop` the run ends at the next logging interval and names the first bad step, its noise levels and the last
    checkpoint; with `skip` it continues, counts them as `train/nonfinite_steps` and warns; with `off` nothing is
    checked. With the gradient scaler of 16-bit precision, the scaler checks gradients and the guard only the loss. A
    fused optimizer skips bad steps by itself; for others the guard copies weights and state during a step.

    Args:
        nonfinite: `stop`, `skip` or `off`.

    Raises:
        ValueError: If it is none of the three.
    """

    def __init__(self, nonfinite: str = "stop") -> None:
        if nonfinite not in CHOICES:
            raise ValueError(f"nonfinite is {nonfinite!r}; choose one of {', '.join(CHOICES)}.")
        self.nonfinite = nonfinite
        self.skipped = 0  # as the host knows it
        self._handles: list[Any] = []
        self._loss_ok: Tensor | None = None
        self._before: dict[int, Tensor] = {}
        self._base = 0  # bad steps of the run before it was resumed
        self._ok: Tensor | None = None
        self._count: Tensor | None = None  # bad steps since the run was started, on the device
        self._first: Tensor | None = None  # (step, lowest sigma, highest sigma) of the first of them

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hooks into the optimizers and makes the record."""
        if self.nonfinite == "off":
            return
        device = pl_module.device
        self._base = self.skipped
        self._count = torch.zeros((), device=device)
        self._first = torch.full((3,), float("nan"), device=device)
        self._handles = [optimizer.register_step_post_hook(self._choose) for optimizer in trainer.optimizers]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Records whether the loss is finite, over all accumulated batches of the step."""
        if self._count is not None:
            ok = torch.isfinite(loss.detach()).all()
            self._loss_ok = ok if self._loss_ok is None else self._loss_ok & ok

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Decides whether the step is good, and keeps what it would change."""
        if self._count is None:
            return
        self._before, self._ok = {}, None  # of a step that a gradient scaler left out, which `_choose` did not see
        optimizer = bare(optimizer)
        bad = torch.zeros((), device=pl_module.device) if self._loss_ok is None else (~self._loss_ok).float()
        self._loss_ok = None
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if not scaled:
            for grads in _alike(p.grad for group in optimizer.param_groups for p in group["params"]):
                if bad.device.type in SCALED:  # a gradient scaler's check: one pass, which multiplies by 1
                    torch._amp_foreach_non_finite_check_and_unscale_(grads, bad, torch.ones_like(bad))
                else:
                    bad = bad.maximum((~torch.isfinite(torch.nn.utils.get_total_norm(grads))).float())
        if trainer.world_size > 1:
            torch.distributed.all_reduce(bad)
        ok = bad == 0
        if ok.device.type == HOST and ok:  # the host knows already
            return
        self._note(~ok, trainer.global_step + 1, getattr(pl_module, "sigma_range", None))
        # A checkpoint may bring groups that are not fused, to an optimizer that could be.
        fused = bad.device.type in SCALED and all(group.get("fused") for group in optimizer.param_groups)
        if fused and getattr(optimizer, "_step_supports_amp_scaling", False):  # it leaves a step out by itself
            if scaled:  # the scaler has still to look at the gradients, and would write over the optimizer's flag
                _spoil(optimizer, ok)
            else:
                optimizer.found_inf = (~ok).float()
            return
        self._ok = ok
        with torch.no_grad():
            self._before = {id(tensor): tensor.clone() for tensor in _tensors(optimizer)}

    @torch.no_grad()
    def _choose(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Takes the step back where it was bad; runs after `optimizer.step`."""
        optimizer.found_inf = None
        before, ok = self._before, self._ok
        self._before, self._ok = {}, None
        if ok is None:
            return
        for tensor in _tensors(optimizer):
            if tensor.device == ok.device:  # to take a counter on the host back, the host would have to wait
                old = before.get(id(tensor))  # what this step made starts at zero
                tensor.copy_(torch.where(ok, tensor, torch.zeros_like(tensor) if old is None else old))

    def _note(self, bad: Tensor, step: int, sigma_range: Tensor | None) -> None:
        """Counts a bad step on the device and keeps the first one's number and noise levels."""
        assert self._count is not None and self._first is not None
        if sigma_range is None:
            sigma_range = torch.full((2,), float("nan"), device=bad.device)
        this = torch.cat([torch.full((1,), float(step), device=bad.device), sigma_range.to(bad.device).float()])
        self._first = torch.where(bad & (self._count == 0), this, self._first)
        self._count = self._count + bad

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reads the record at the logging interval."""
        if self._count is not None and logs_now(trainer):
            self.read(trainer, pl_module)
            if self.nonfinite == "skip":
                pl_module.log("train/nonfinite_steps", float(self.skipped), batch_size=1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the record before time is spent on validation."""
        if self._count is not None and trainer.training | trainer.validating:
            self.read(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses held-out figures that are not finite."""
        if self.nonfinite == "stop" and not trainer.sanity_checking:
            _check_figures(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses figures that are not finite."""
        if self.nonfinite == "stop":
            _check_figures(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the record a last time."""
        if self._count is not None:
            self.read(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go of the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._count, self._loss_ok, self._ok, self._before = [], None, None, None, {}

    def read(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the record on the host, and stops or warns if a step was bad.

        Raises:
            RunStopped: If a step was bad and the run is to stop.
        """
        assert self._count is not None and self._first is not None
        total = self._base + int(self._count.item())
        if total == self.skipped:
            return
        more, self.skipped = total - self.skipped, total
        step, low, high = self._first.tolist()
        where = f", whose noise levels were {low:.4g} to {high:.4g}" if low == low else ""
        if self.nonfinite == "skip":
            rank_zero_warn(
                f"{counted(more, 'step')} had a loss or gradient that is not finite and "
                f"{'was' if more == 1 else 'were'} left out, {total} so far; the first "
                f"was step {int(step)}{where}."
            )
            return
        raise RunStopped(
            f"The loss or a gradient was not finite at step {int(step)}{where}; its update was not applied. "
            f"{_last_checkpoint(trainer)} What helps: a lower learning rate, --trainer.gradient_clip_val 1, "
            "--trainer.precision 32-true, and a look at the data; --guard.nonfinite skip goes on without such steps."
        )

    def state_dict(self) -> dict[str, int]:
        """How many steps were left out."""
        if self._count is not None:
            return {"skipped": self._base + int(self._count.item())}
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restores the count."""
        self.skipped = state_dict["skipped"]


def _alike(tensors: Iterable[Tensor | None]) -> Iterable[list[Tensor]]:
    """The tensors that are not None, grouped by device and dtype."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor is not None:
            found.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return found.values()


def _spoil(optimizer: Any, ok: Tensor) -> None:
    """Makes the smallest gradient not finite if the step is bad, so that the gradient scaler skips it."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    smallest = min(grads, key=Tensor.numel)
    smallest.masked_fill_(~ok, float("nan"))


def _tensors(optimizer: Any) -> Iterator[Tensor]:
    """All that a step changes: the weights that have a gradient, and the optimizer's state."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield parameter
                yield from (value for value in optimizer.state[parameter].values() if isinstance(value, Tensor))


def _check_figures(trainer: Trainer) -> None:
    """Stops where a held-out figure is not finite."""
    for name, value in trainer.callback_metrics.items():
        if not name.startswith("train/") and not torch.isfinite(value).all():
            raise RunStopped(
                f"{name} is {float(value)} at step {trainer.global_step}, which is no figure: the weights or the "
                "held-out data hold values that are not finite. Take an earlier checkpoint, and look at the data; "
                "--guard.nonfinite skip goes on."
            )


def _last_checkpoint(trainer: Trainer) -> str:
    """A sentence on the checkpoint to go back to."""
    for kept in trainer.checkpoint_callbacks:
        if isinstance(kept, LastCheckpoint) and kept.saved:
            return f"The last checkpoint is {kept.saved}, of step {kept.saved_step}."
    return "No checkpoint was saved before."
