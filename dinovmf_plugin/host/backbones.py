"""Backbones that the host does not have."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn

__all__ = ["EXTRA_BACKBONES", "vit_nano"]


def vit_nano(patch_size: int = 16, **kwargs: Any) -> Any:
    """ViT of width 128, depth 4, 2 heads (0.8 M parameters): for tests and for demos on a CPU.

    Everything but the size is as in the host's ``vit_tiny``; the width of a head is 64, as there. The
    size may be given: ``+backbone.kwargs.depth=2`` has 0.4 M parameters.
    """
    from timm.models.vision_transformer import VisionTransformer

    size = {"embed_dim": 128, "depth": 4, "num_heads": 2}
    return VisionTransformer(
        patch_size=patch_size,
        num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        **(size | kwargs),
    )


EXTRA_BACKBONES: dict[str, Callable[..., Any]] = {"vit_nano": vit_nano}


def register_in_main() -> None:
    """Add the extra backbones to main's table (its factories take the method's name first)."""
    from solo.methods.base import BaseMethod

    for name, factory in EXTRA_BACKBONES.items():
        BaseMethod._BACKBONES.setdefault(
            name, lambda method, factory=factory, **kwargs: factory(**kwargs)
        )


@contextlib.contextmanager
def standing_in_release(name: str) -> Iterator[str]:
    """Build an extra backbone in 1.0.2, whose constructor knows a fixed list of names.

    Yields:
        The name to give the constructor; within the context it means ``name``.
    """
    if name not in EXTRA_BACKBONES:
        yield name
        return
    from solo.utils import backbones

    original = backbones.vit_tiny
    backbones.vit_tiny = EXTRA_BACKBONES[name]
    try:
        yield "vit_tiny"
    finally:
        backbones.vit_tiny = original
