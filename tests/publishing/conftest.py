"""A training checkpoint with a vMF head and a center, as this plugin writes it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.models import VisionTransformer

from dinovmf_plugin.core.heads import DINOHead

ARGUMENTS = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}


@torch.no_grad()
def shaken(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Numbers in every tensor with which a wrong or swapped one is seen."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.named_parameters():
        value.add_(0.1 * torch.randn(value.shape, generator=generator))
        if name.endswith("weight_g"):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
    return module.eval()


def prefixed(prefix: str, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in module.state_dict().items()}


@pytest.fixture
def stored_run(tmp_path: Path) -> Any:
    """Factory: a run's folder with its checkpoint; the teacher's backbone, head and center."""

    def make(normalization: str = "vmf", backbone: Any = None, config: Any = None) -> Any:
        vit = backbone or VisionTransformer(num_classes=0, **ARGUMENTS)
        teacher = shaken(vit, 1)
        width = int(teacher.num_features)
        head = shaken(DINOHead(width, 16, 8, 24, normalization), 2)
        if normalization == "l2":
            with torch.no_grad():
                head.last_layer.weight_g.fill_(1)
        center = torch.randn(24, generator=torch.Generator().manual_seed(3))
        state = prefixed("momentum_backbone.", teacher) | prefixed("momentum_head.", head)
        state["centering.center"] = center
        cfg = {
            "name": "secret-name",
            "method": "dino_vmf",
            "max_epochs": 7,
            "precision": "bf16-mixed",
            "backbone": {"name": "vit_nano", "kwargs": ARGUMENTS},
            "data": {"dataset": "custom", "train_path": "/home/anna/photos"},
            "optimizer": {"name": "adamw", "batch_size": 64, "lr": 0.0005},
            "wandb": {"entity": "anna"},
            "augmentations": [{"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_size": 32}],
            "method_kwargs": {
                "normalization": normalization,
                "centering": "probability",
                "student_temperature": 0.1,
                "teacher_temperature": 0.04,
                "init_from": "weights/anna.pth",
            },
            **(config or {}),
        }
        content = {
            "state_dict": state,
            "global_step": 1234,
            "epoch": 6,
            "pytorch-lightning_version": "2.6.6",
            "dinovmf_plugin": {"cfg": cfg},
        }
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        torch.save(content, folder / "last.ckpt")
        return SimpleNamespace(
            path=folder / "last.ckpt", folder=folder, teacher=teacher, head=head, center=center
        )

    return make
