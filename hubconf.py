"""Entry points of ``torch.hub``, which looks for them here.

Example::

    vit = torch.hub.load("path/to/clone", "backbone", checkpoint="last.ckpt", source="local")
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from dinovmf_plugin import load_backbone, load_head

dependencies = ["numpy", "PIL", "safetensors", "scipy", "timm", "torch", "torchvision", "tqdm"]


def backbone(checkpoint: str, **kwargs: Any) -> nn.Module:
    """Load the backbone: images ``(B, 3, H, W)`` to features ``(B, D)``; see ``load_backbone``."""
    return load_backbone(checkpoint, **kwargs)[0]


def head(checkpoint: str, **kwargs: Any) -> nn.Module:
    """Load the head: features to unit vectors ``(B, p)``, prototypes in ``last_layer``; see ``load_head``."""
    return load_head(checkpoint, **kwargs)[0]


def dino_vmf(checkpoint: str, which: str = "teacher") -> nn.Sequential:
    """Load both, as ``backbone`` and ``head`` of one module: images to unit vectors ``(B, p)``."""
    parts = {"backbone": backbone(checkpoint, which=which), "head": head(checkpoint, which=which)}
    return nn.Sequential(OrderedDict(parts))
