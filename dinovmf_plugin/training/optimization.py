"""What happens to parameters around an optimizer step: groups, schedules, clipping, freezing, EMA.

Sources: DINO (``main_dino.py``, ``utils.py``): schedules per iteration, clipping per parameter, a last layer
without gradient in the first epochs, and the teacher's EMA after the step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dinovmf_plugin.core import schedules

__all__ = [
    "Divide",
    "clip_per_network",
    "clip_per_parameter",
    "is_decayed",
    "make_optimizer",
    "scale_together",
    "split_weight_decay",
    "update_schedules",
    "update_teacher",
]


Divide = Callable[[str, str], tuple[str, dict[str, Any]]]
"""(group, parameter's name) -> what the name of its own group ends in, and that group's settings."""


def is_decayed(name: str, parameter: Tensor, decay_magnitudes: bool = True) -> bool:
    """Whether weight decay applies: not to biases and 1-d parameters (DINO).

    Prototype magnitudes are ``(K, 1)``, hence decayed where they are trained, which makes unused
    prototypes shrink; ``decay_magnitudes=False`` exempts them.

    Example:
        >>> is_decayed("blocks.0.norm1.weight", torch.zeros(8)), is_decayed("cls_token", torch.zeros(1, 1, 8))
        (False, True)
    """
    if name.endswith("bias") or parameter.ndim <= 1:
        return False
    return decay_magnitudes or not name.endswith("weight_g")


def split_weight_decay(
    named: dict[str, Iterable[tuple[str, nn.Parameter]]],
    extras: dict[str, dict[str, Any]] | None = None,
    decay_magnitudes: bool = True,
    divide: Divide | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups, each split into a decayed one and a ``_no_decay`` one.

    Args:
        named: group name -> named parameters; those without gradient are left out.
        extras: group name -> further settings, e.g. ``{"classifier": {"lr": 0.1, "decay": False}}``.
        decay_magnitudes: see ``is_decayed``.
        divide: splits a group further, e.g. by layer; ``("", {})`` leaves a parameter where it is.

    Returns:
        Groups with keys ``params``, ``name``, ``decay`` and the extras; empty groups are left out.
    """
    groups = []
    for name, parameters in named.items():
        extra = dict((extras or {}).get(name, {}))
        decays = extra.pop("decay", True)
        parts: dict[str, dict[str, Any]] = {}
        split: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for key, parameter in parameters:
            if parameter.requires_grad:
                part, own = divide(name, key) if divide else ("", {})
                parts.setdefault(part, own)
                decay = decays and is_decayed(key, parameter, decay_magnitudes)
                split.setdefault((part, decay), []).append(parameter)
        for part, own in parts.items():
            for decay, suffix in ((True, ""), (False, "_no_decay")):
                if found := split.get((part, decay)):
                    full = name + part + suffix
                    groups.append({"params": found, "name": full, "decay": decay, **extra, **own})
    return groups


def update_schedules(
    optimizer: torch.optim.Optimizer,
    step: int,
    total: int,
    *,
    min_lr: float,
    warmup_steps: int,
    warmup_start_lr: float,
    weight_decay: float,
    final_weight_decay: float,
    constant_lr: bool = False,
    hold_last_layer: bool = False,
) -> None:
    """Write this step's learning rate and weight decay into the optimizer's groups.

    Every group warms up to its own ``peak_lr`` (or stays there); only groups with ``decay`` get weight decay.
    The rate, its end included, is multiplied by the group's ``lr_scale``, if it has one; groups marked
    ``last_layer`` have rate 0 while ``hold_last_layer``.
    """
    decay = schedules.cosine(step, total, weight_decay, final_weight_decay)
    for group in optimizer.param_groups:
        rate = group["peak_lr"]
        if not constant_lr:
            rate = schedules.learning_rate(step, total, rate, min_lr, warmup_steps, warmup_start_lr)
        held = hold_last_layer and group.get("last_layer", False)
        group["lr"] = 0.0 if held else rate * group.get("lr_scale", 1.0)
        group["weight_decay"] = decay if group["decay"] else 0.0


def make_optimizer(
    cls: Callable[..., torch.optim.Optimizer],
    groups: list[dict[str, Any]],
    *,
    lr: float,
    weight_decay: float,
    **options: Any,
) -> torch.optim.Optimizer:
    """The optimizer of these groups; Adam and AdamW update all parameters in a few kernels.

    Args:
        cls: optimizer class.
        groups: parameter groups.
        lr: learning rate of groups that have none.
        weight_decay: of groups that have none.
        options: further arguments; ``fused`` or ``foreach`` among them replace the choice made here.

    Differs from upstream: a fused optimizer would unscale gradients inside its step, after they have
    been clipped: here the scaler of 16-mixed unscales them before, as for any other optimizer.
    """
    parameters = [p for group in groups for p in group["params"]]
    if (
        cls in (torch.optim.Adam, torch.optim.AdamW)
        and not {"fused", "foreach", "capturable", "differentiable"} & options.keys()
        and all(p.device.type in ("cpu", "cuda") for p in parameters)
    ):
        options["fused"] = True
    optimizer = cls(groups, lr=lr, weight_decay=weight_decay, **options)
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def clip_per_parameter(parameters: Iterable[nn.Parameter], clip: float) -> None:
    """Scale each gradient by ``clip / (norm + 1e-6)`` where that is below 1: per tensor, not globally.

    To be called on unscaled gradients. ``clip=0`` does nothing. A handful of kernels for all tensors.
    """
    if not clip:
        return
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for p in parameters:
        if p.grad is not None:
            by_kind.setdefault((p.grad.dtype, p.grad.device), []).append(p.grad)
    for (_, device), gradients in by_kind.items():
        norms = torch.stack(torch._foreach_norm(gradients))
        factors = (clip / (norms + 1e-6)).clamp(max=1.0)
        if device.type == "cpu":
            torch._foreach_mul_(gradients, factors.unbind())
        else:
            scale_together(gradients, factors)


def clip_per_network(networks: Iterable[Iterable[nn.Parameter]], clip: float) -> None:
    """Scale the gradients of each network together so that their joint norm is at most ``clip`` (DINOv2).

    To be called on unscaled gradients. ``clip=0`` does nothing.
    """
    for parameters in networks if clip else ():
        nn.utils.clip_grad_norm_(parameters, clip)


def scale_together(tensors: list[Tensor], factors: Tensor) -> None:
    """Multiply each tensor by its own factor, in place, in a few kernels however many they are.

    On a GPU ``torch._foreach_mul_`` with one number per tensor is one kernel per tensor. Here they are
    copied into one row and back, which costs memory for two copies while no activations are alive.

    Args:
        tensors: of one dtype and device.
        factors: ``(len(tensors),)``.
    """
    sizes = tuple(t.numel() for t in tensors)
    row = torch.cat([t.reshape(-1) for t in tensors])
    repeats = _on_device(sizes, factors.device)
    row.mul_(factors.repeat_interleave(repeats, output_size=sum(sizes)))
    parts = [part.view_as(t) for part, t in zip(row.split(sizes), tensors, strict=True)]
    torch._foreach_copy_(tensors, parts)


@functools.lru_cache(maxsize=8)
def _on_device(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 tensor of sizes that are the same in every step."""
    return torch.tensor(sizes, device=device)


@torch.no_grad()
def update_teacher(pairs: Iterable[tuple[nn.Module, nn.Module]], momentum: float) -> None:
    """EMA of every parameter, in place: ``teacher <- momentum teacher + (1 - momentum) student``.

    Directions and magnitudes of the prototypes are averaged separately, as in DINO. Buffers (BatchNorm
    statistics) are not averaged. Parameters are matched by name; a student-only one (mask token) is skipped.

    Differs from upstream: solo-learn rebinds ``.data``, which breaks flattened and sharded parameters.
    """
    for student, teacher in pairs:
        online = dict(student.named_parameters())
        names, averaged = zip(*teacher.named_parameters(), strict=True)
        torch._foreach_lerp_(list(averaged), [online[name] for name in names], 1 - momentum)
