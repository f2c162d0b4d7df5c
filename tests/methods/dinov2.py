"""All of DINOv2's switches at once, for tiny networks."""

from __future__ import annotations

from typing import Any

__all__ = ["DINOV2"]

DINOV2: dict[str, Any] = {
    "method_kwargs.patch_head": "separate",
    "method_kwargs.num_patch_prototypes": 24,
    "method_kwargs.patch_center_tokens": "masked",
    "method_kwargs.koleo_weight": 0.1,
    "method_kwargs.layer_decay": 0.9,
    "method_kwargs.patch_embed_lr_mult": 0.2,
    "method_kwargs.lr_scaling": "sqrt",
    "method_kwargs.clip_by": "network",
    "method_kwargs.freeze_by": "rate",
}
