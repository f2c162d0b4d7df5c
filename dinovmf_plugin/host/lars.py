"""LARS (You, Gitman, Ginsburg, arXiv 1708.03888) for solo-learn 1.0.2, under the keys that main has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["LARS"]


class LARS(torch.optim.Optimizer):
    """SGD whose rate per tensor is ``lr * eta * |w| / (|g| + weight_decay * |w|)``.

    Args:
        params: tensors or groups.
        lr: global learning rate.
        momentum: of SGD.
        weight_decay: L2 penalty, added to the gradient before it is scaled.
        eta: trust coefficient.
        eps: added to the denominator.
        clip_lr: the rate of a tensor is at most ``lr``.
        exclude_bias_n_norm: 1-d tensors take plain SGD steps without weight decay.

    Raises:
        ValueError: for a negative ``lr``, ``momentum`` or ``weight_decay``.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> weight.grad = torch.tensor([[0.0, 2.0]])
        >>> LARS([weight], lr=1.0, eta=0.2).step()  # 0.2 * 5 / 2 = 0.5 times the gradient
        >>> weight.tolist()
        [[3.0, 3.0]]
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        eta: float = 1e-3,
        eps: float = 1e-8,
        clip_lr: bool = False,
        exclude_bias_n_norm: bool = False,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "eta": eta,
            "eps": eps,
            "clip_lr": clip_lr,
            "exclude_bias_n_norm": exclude_bias_n_norm,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                update = weight.grad
                if weight.ndim != 1 or not group["exclude_bias_n_norm"]:
                    update = _scaled(weight, update, group)
                if group["momentum"] != 0:
                    state = self.state[weight]
                    if "momentum_buffer" in state:
                        state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                    else:
                        state["momentum_buffer"] = update.clone()
                    update = state["momentum_buffer"]
                weight.add_(update, alpha=-group["lr"])
        return loss


def _scaled(weight: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
    """The decayed gradient times the tensor's own rate; the gradient itself where either norm is zero."""
    norm, grad_norm = torch.linalg.vector_norm(weight), torch.linalg.vector_norm(grad)
    ratio = group["eta"] * norm / (grad_norm + group["weight_decay"] * norm + group["eps"])
    if group["clip_lr"]:
        ratio = (ratio / max(group["lr"], 1e-30)).clamp(max=1.0)
    decayed = grad.add(weight, alpha=group["weight_decay"]) * ratio
    return torch.where((norm > 0) & (grad_norm > 0), decayed, grad)
