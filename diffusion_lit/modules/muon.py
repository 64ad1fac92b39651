"""Muon for matrices and AdamW for the rest, in one optimizer with groups of two kinds.

For a weight W, a convolution's being viewed as a matrix (out, in * kh * kw), Muon averages the gradients G to M, and
steps along the orthogonal matrix next to it, U V^T of its singular value decomposition U S V^T:

    M <- momentum M + (1 - momentum) G,    N = (1 - momentum) G + momentum M  (Nesterov),
    W <- (1 - lr weight_decay) W - lr 0.2 sqrt(max(rows, columns)) orthogonal(N).

The factor gives the step the root mean square of AdamW's, about 0.2 lr (Liu 2025), so that one learning rate and one
weight decay serve both kinds. Query, key and value, which lie in one weight, are made orthogonal one by one.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diffusion_lit.checks import check_count, check_number

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the iteration, Jordan 2024
RMS = 0.2  # of an AdamW step, as a multiple of the learning rate


class MuonAdamW(Optimizer):
    """Muon for matrices, AdamW for what has no matrix to make orthogonal.

    A group with `parts` above 0 is Muon's: each weight is that many matrices, one upon the other. With 0 it is AdamW's.
    Parameters without groups are told apart by their shape. A training gives the groups of `muon_groups`. State and
    options are saved and restored as any optimizer's.

    Args:
        params: Parameters, or groups `{"params": [...], "parts": 1}`.
        lr: Learning rate of both kinds, of AdamW's size.
        weight_decay: Decoupled weight decay of both kinds.
        betas: AdamW's averages of gradients and their squares, each in [0, 1).
        eps: Added to AdamW's root.
        momentum: Muon's average of gradients, in [0, 1).
        nesterov: Whether Muon steps along the average of the next step, were its gradient the same.
        ns_steps: Newton-Schulz iterations of Muon.

    Raises:
        ValueError: An argument is out of range, or a group's parts do not divide its weights.

    Source: Jordan 2024, https://kellerjordan.github.io/posts/muon; Liu 2025, arXiv 2502.16982, section 2.2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
    ) -> None:
        check_number(least=0, lr=lr, weight_decay=weight_decay)
        check_number(above=0, eps=eps)
        check_number(least=0, below=1, beta1=betas[0], beta2=betas[1], momentum=momentum)
        check_count(ns_steps=ns_steps)
        given = list(params)
        if given and not isinstance(given[0], dict):
            kinds = {parts: [one for one in given if (one.ndim > 1) == bool(parts)] for parts in (0, 1)}
            given = [{"params": chosen, "parts": parts} for parts, chosen in kinds.items() if chosen]
        options = {"lr": lr, "weight_decay": weight_decay, "betas": tuple(betas), "eps": eps, "momentum": momentum}
        super().__init__(given, {**options, "nesterov": nesterov, "ns_steps": ns_steps, "parts": 0})
        for group in self.param_groups:
            for weight in group["params"]:
                if group["parts"] and (weight.ndim < 2 or weight.shape[0] % group["parts"]):
                    raise ValueError(
                        f"A weight of shape {tuple(weight.shape)} is no {group['parts']} matrices; give it parts 0."
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Takes a step.

        Args:
            closure: Computes the loss and the gradients again, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    kind = _muon if group["parts"] else _adam
                    kind(weight, weight.grad, self.state[weight], group)
        return loss


def _muon(weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    if not state:
        state["exp_avg"] = torch.zeros_like(weight)
    average, momentum = state["exp_avg"], group["momentum"]
    average.lerp_(grad, 1 - momentum)
    update = grad.lerp(average, momentum) if group["nesterov"] else average
    for part, made in zip(weight.chunk(group["parts"]), update.chunk(group["parts"]), strict=True):
        flat = orthogonal(made.flatten(1), group["ns_steps"])
        part.add_(flat.to(part.dtype).reshape(part.shape), alpha=-group["lr"] * RMS * max(flat.shape) ** 0.5)


def _adam(weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    if not state:
        state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(weight), exp_avg_sq=torch.zeros_like(weight))
    first, second = group["betas"]
    state["step"] += 1
    step = float(state["step"])
    state["exp_avg"].lerp_(grad, 1 - first)
    state["exp_avg_sq"].mul_(second).addcmul_(grad, grad, value=1 - second)
    root = state["exp_avg_sq"].sqrt().div_((1 - second**step) ** 0.5).add_(group["eps"])
    weight.addcdiv_(state["exp_avg"], root, value=-group["lr"] / (1 - first**step))


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of a matrix U S V^T, by a quintic Newton-Schulz iteration in bfloat16.

    Singular values end between 0.7 and 1.2 or so, which is as good for training as 1 (Jordan 2024).

    Args:
        matrix: Shape (m, n).
        steps: Number of iterations.

    Returns:
        Bfloat16 (m, n).
    """
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def muon_groups(module: nn.Module, groups: Iterable[Any] | None = None) -> list[dict[str, Any]]:
    """The groups of a network: Muon's matrices, its queries, keys and values apart, and AdamW's rest.

    AdamW's are vectors, tables of embeddings, the first and the last layer, and the layers that embed the conditions,
    as for language models (Jordan 2024): layers called `stem`, `out` and `conditioning` in this project's networks.

    Args:
        module: What is trained.
        groups: Its parameters, or groups of them with options of their own; by default all that are trainable.

    Returns:
        Each group divided by 0, 1 and 3 parts, in this order; none is empty.
    """
    tables = {one for layer in module.modules() if isinstance(layer, nn.Embedding) for one in layer.parameters()}

    def parts(name: str, weight: Tensor) -> int:
        words = name.split(".")
        layer = words[-2] if len(words) > 1 else ""
        if weight.ndim < 2 or weight in tables or layer in ("stem", "out") or "conditioning" in words:
            return 0
        return 3 if layer == "qkv" else 1

    kinds = {weight: parts(name, weight) for name, weight in module.named_parameters()}
    given = list(groups or [weight for weight in kinds if weight.requires_grad])
    given = given if isinstance(given[0], dict) else [{"params": given}]
    divided = []
    for group in given:
        for kind in (0, 1, 3):
            chosen = [weight for weight in group["params"] if kinds[weight] == kind]
            divided += [{**group, "params": chosen, "parts": kind}] if chosen else []
    return divided
