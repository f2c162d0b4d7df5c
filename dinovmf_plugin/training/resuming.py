"""What a checkpoint must have to be resumed, and what may differ from it: refused, or told.

Weights, center, optimizer moments and progress come from the checkpoint; every value of the config counts as
it is given now, learning rates and weight decay included. Schedules are functions of epoch and fraction, so
that a run goes on where it stood though an epoch has another number of steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

__all__ = ["check_content", "check_tensors", "compare_configs", "keep_configured_values"]

# what Lightning needs to go on
_PARTS = {
    "state_dict": Mapping,
    "optimizer_states": list,
    "loops": Mapping,
    "epoch": int,
    "global_step": int,
}
# another network, center or optimizer; the center of one centering means nothing to another
_FIXED = (
    "method",
    "backbone.name",
    "optimizer.name",
    "method_kwargs.proj_hidden_dim",
    "method_kwargs.proj_output_dim",
    "method_kwargs.num_prototypes",
    "method_kwargs.normalization",
    "method_kwargs.centering",
    "method_kwargs.center_raw_scores",  # the center's unit
    "method_kwargs.prototype_update",
    "method_kwargs.patch_head",
    "method_kwargs.num_patch_prototypes",
)
# what makes the steps of an epoch
_STEPS = ("optimizer.batch_size", "devices", "num_nodes", "accumulate_grad_batches")
_DEFAULTS = {
    "devices": 1,
    "num_nodes": 1,
    "accumulate_grad_batches": 1,
    # of checkpoints from before there was the key
    "method_kwargs.prototype_update": "gradient",
    "method_kwargs.em_memory": 64.0,
    "method_kwargs.init_prototypes": "random",
    "method_kwargs.koleo_weight": 0.0,
    "method_kwargs.layer_decay": 1.0,
    "method_kwargs.patch_embed_lr_mult": 1.0,
    "method_kwargs.lr_scaling": "linear",
    "method_kwargs.clip_by": "parameter",
    "method_kwargs.freeze_by": "gradient",
    "method_kwargs.patch_head": "shared",
    "method_kwargs.patch_center_tokens": "all",
}
# no part of the training
_SILENT = (
    "name",
    "checkpoint",
    "auto_resume",
    "resume_from_checkpoint",
    "wandb",
    "optimizer.base_lr",
    "optimizer.base_classifier_lr",
    "data.num_workers",
    "debug_augmentations",
    "log_every_n_steps",
    "enable_progress_bar",
    "enable_model_summary",
)


def check_content(content: Mapping[str, Any], path: str | Path, max_epochs: int) -> None:
    """Whether a file's content is a checkpoint of a training run that can go on.

    Args:
        content: what the file holds.
        path: its name, for the message.
        max_epochs: of the run that is to go on.

    Raises:
        ValueError: if parts of a training run are missing, or more epochs are done than the run is to have.

    Example:
        >>> check_content({"student": {}, "teacher": {}}, "dino.pth", 100)
        Traceback (most recent call last):
        ...
        ValueError: dino.pth cannot be resumed: it holds student, teacher, but no state_dict, ...
    """
    missing = [part for part, kind in _PARTS.items() if not isinstance(content.get(part), kind)]
    if not missing and "epoch_loop.batch_progress" not in content["loops"].get("fit_loop", ()):
        missing = ["progress of the loops"]
    if missing:
        held = ", ".join(str(key) for key in list(content)[:6]) or "nothing"
        raise ValueError(
            f"{path} cannot be resumed: it holds {held}, but no {', '.join(missing)} of a training run; to "
            f"start from its weights: method_kwargs.init_from={path}"
        )
    if content["epoch"] >= max_epochs:
        raise ValueError(
            f"max_epochs={max_epochs} is less than the {content['epoch'] + 1} epochs that {path} has: give "
            "at least as many"
        )


def check_tensors(stored: Mapping[str, Any], module: nn.Module) -> None:
    """Whether the weights of a checkpoint are those of ``module``, one by one.

    Raises:
        ValueError: naming the first tensor that is missing, left over or of another shape, and their number.
    """
    own = module.state_dict()
    wrong = [f"{name} is missing" for name in own if name not in stored]
    wrong += [f"{name} is left over" for name in stored if name not in own]
    for name, value in own.items():
        given = stored.get(name)
        if isinstance(value, torch.Tensor) and isinstance(given, torch.Tensor):
            if value.shape != given.shape:
                shapes = f"{tuple(given.shape)} instead of {tuple(value.shape)}"
                wrong.append(f"{name} has shape {shapes}")
        elif name in stored and isinstance(value, torch.Tensor):
            wrong.append(f"{name} is no tensor")
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(
            f"the checkpoint is of another network: {wrong[0]}{more}; resume with the config that it was "
            "trained with, or start a new run (weights alone: method_kwargs.init_from)"
        )


def _leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping):
        return {prefix: node}
    return {
        key: value
        for name, child in node.items()
        for key, value in _leaves(child, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _in_the_middle_of_an_epoch(checkpoint: Mapping[str, Any]) -> bool:
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return progress["current"]["ready"] > 0 and not progress["is_last_batch"]


def compare_configs(checkpoint: Mapping[str, Any], saved: Any, now: Any) -> str | None:
    """What differs between the config of a checkpoint and that of the run which goes on from it.

    Args:
        checkpoint: content of the file, for its progress.
        saved: resolved config in it, plain containers.
        now: resolved config of the run, plain containers.

    Returns:
        One sentence that lists the values that differ, for a warning; None if there are none.

    Raises:
        ValueError: if a value differs that cannot change, or that cannot change in the middle of an epoch.
    """
    old, new = _leaves(saved), _leaves(now)
    saved_cfg, now_cfg = OmegaConf.create(saved), OmegaConf.create(now)
    for key in _FIXED:
        default = _DEFAULTS.get(key)
        before = OmegaConf.select(saved_cfg, key, default=default)
        after = OmegaConf.select(now_cfg, key, default=default)
        if before != after:
            raise ValueError(
                f"{key}={after!r} differs from the checkpoint's {before!r}: resume with the same value, or "
                "start a new run (weights alone: method_kwargs.init_from)"
            )
    differing = [
        key
        for key in sorted({*old, *new})
        if old.get(key, _DEFAULTS.get(key)) != new.get(key, _DEFAULTS.get(key))
        and not any(key == silent or key.startswith(f"{silent}.") for silent in _SILENT)
    ]
    steps = [key for key in differing if key.split("[")[0] in _STEPS]
    if steps and _in_the_middle_of_an_epoch(checkpoint):
        raise ValueError(
            f"{_told(steps, old, new)}, but the checkpoint stands in the middle of epoch "
            f"{checkpoint['epoch']}, whose batches it fixes: resume with the same value, or from the end of "
            "an epoch"
        )
    if not differing:
        return None
    told = _told(differing, old, new)
    sentence = f"these values differ from the checkpoint's and count from here on: {told}"
    if steps:
        sentence += (
            "; an epoch has other steps now: schedules go on by epochs, moments of the optimizer and the "
            "center are averages over the old batches"
        )
    return sentence


def _told(keys: list[str], old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    def value(leaves: Mapping[str, Any], key: str) -> str:
        found = leaves.get(key, _DEFAULTS.get(key))
        return f"{found:g}" if isinstance(found, float) else repr(found)

    return ", ".join(f"{key}={value(new, key)} (was {value(old, key)})" for key in keys)


def keep_configured_values(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Let a stored state bring moments and steps only: learning rates, betas .. stay as configured.

    Differs from upstream: ``torch.optim.Optimizer.load_state_dict`` replaces the options of every group by
    the stored ones, so that a new learning rate is ignored.

    Returns:
        The same optimizer; loading a state of other groups raises a ValueError.
    """
    optimizer.register_load_state_dict_pre_hook(_with_configured_values)
    return optimizer


def _with_configured_values(
    optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> dict[str, Any]:
    def described(groups: list[dict[str, Any]]) -> list[tuple[Any, int]]:
        return [(group.get("name"), len(group["params"])) for group in groups]

    stored, own = state["param_groups"], optimizer.param_groups
    if described(stored) != described(own):
        raise ValueError(
            "the checkpoint's optimizer has other groups of parameters: "
            f"{described(stored)} instead of {described(own)}; resume with the config of its training"
        )
    for before, now in zip(stored, own, strict=True):
        if bool(before.get("amsgrad")) != bool(now.get("amsgrad")):
            raise ValueError(
                f"optimizer.kwargs.amsgrad={now.get('amsgrad')!r} differs from the checkpoint's "
                f"{before.get('amsgrad')!r}: resume with the same value"
            )
    groups = [
        {**{k: v for k, v in now.items() if k != "params"}, "params": before["params"]}
        for before, now in zip(stored, own, strict=True)
    ]
    return {**state, "param_groups": groups}
