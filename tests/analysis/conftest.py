"""A tiny ViT with its head, stored as the plugin and as official DINO store theirs, and images."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models import VisionTransformer

from dinovmf_plugin.core.heads import DINOHead

NUM_PROTOTYPES, DIM = 24, 8


@pytest.fixture(scope="session")
def image_folders(tmp_path_factory):
    """train/ (2 classes, 12 images), val/ (2 classes, 8 images), flat/ (3 images)."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 4)):
        for label, color in (("red", (200, 40, 40)), ("blue", (40, 60, 210))):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(color, 40, (24, 30, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    (root / "flat").mkdir()
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(
            root / "flat" / f"{i}.jpg"
        )
    return root


@pytest.fixture(scope="session")
def networks():
    """(backbone, head) with free norms and a void set, deterministic."""
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=192, depth=1, num_heads=3, num_classes=0
    ).eval()
    head = DINOHead(192, 16, DIM, NUM_PROTOTYPES, normalization="vmf").eval()
    with torch.no_grad():
        head.last_layer.weight_g.uniform_(0.5, 3)
        void = -head(torch.randn(64, 192)).mean(0)
        head.last_layer.weight_v[:10] = void
    return vit, head


@pytest.fixture(scope="session")
def plugin_checkpoint(tmp_path_factory, networks):
    """A training checkpoint of this plugin; student and teacher are the same."""
    vit, head = networks
    state = {}
    for prefix in ("", "momentum_"):
        state |= {f"{prefix}backbone.{k}": v for k, v in vit.state_dict().items()}
        state |= {f"{prefix}head.{k}": v for k, v in head.state_dict().items()}
    state["centering.center"] = torch.linspace(-5, 0, NUM_PROTOTYPES)[None]
    cfg = {
        "method": "dino_vmf",
        "backbone": {"name": "vit_tiny", "kwargs": {"img_size": 16, "patch_size": 8}},
        "method_kwargs": {
            "normalization": "vmf",
            "centering": "probability",
            "student_temperature": 0.1,
            "teacher_temperature": 0.05,
        },
    }
    path = tmp_path_factory.mktemp("plugin") / "last.ckpt"
    content = {
        "state_dict": state,
        "pytorch-lightning_version": "2.6",
        "dinovmf_plugin": {"cfg": cfg},
    }
    torch.save(content, path)
    return path


@pytest.fixture(scope="session")
def official_checkpoint(tmp_path_factory, networks):
    """A full checkpoint as official DINO writes it (free norms)."""
    vit, head = networks
    network = {f"module.backbone.{k}": v for k, v in vit.state_dict().items()}
    network |= {f"module.head.{k}": v for k, v in head.state_dict().items()}
    args = argparse.Namespace(arch="vit_tiny", norm_last_layer=False, teacher_temp=0.06)
    content = {"student": network, "teacher": network, "args": args, "epoch": 1}
    content["dino_loss"] = {"center": torch.zeros(1, NUM_PROTOTYPES)}
    path = tmp_path_factory.mktemp("official") / "checkpoint.pth"
    torch.save(content, path)
    return path
