"""Tiny runs that write checkpoints, and two states compared number by number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def saving_cfg(tiny_cfg: Any, folder: Path, method: str = "dino_vmf", **more: Any) -> Any:
    """Four epochs with everything that a schedule or a random draw changes."""
    return tiny_cfg(
        method,
        **{
            "max_epochs": 4,
            "checkpoint.enabled": True,
            "checkpoint.dir": str(folder),
            "auto_resume.enabled": True,
            "scheduler.warmup_epochs": 1,
            "backbone.kwargs.drop_path_rate": 0.3,
            "method_kwargs.final_weight_decay": 0.4,
            "method_kwargs.freeze_last_layer": 1,
            "method_kwargs.warmup_teacher_temperature_epochs": 4,
            "method_kwargs.clip_grad": 0.3,
            **more,
        },
    )


def assert_identical(a: Any, b: Any, path: str = "") -> None:
    """Equal to the last bit; ``path`` names the difference."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_identical(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_identical(x, y, f"{path}/{i}")
    else:
        assert a == b, path
