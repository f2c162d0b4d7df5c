"""Learning rates by depth and by batch, as DINOv2 trains (arXiv 2304.07193 and its published settings)."""

from __future__ import annotations

import math
from typing import Literal

__all__ = ["LRScaling", "layer_of", "layer_rate", "rate_for_batch"]

LRScaling = Literal["linear", "sqrt"]

_EMBEDDING = ("cls_token", "pos_embed", "reg_token", "patch_embed.", "norm_pre.")


def layer_of(name: str, depth: int) -> int:
    """Layer of a ViT's parameter: 0 for the embeddings, ``i + 1`` for block ``i``, ``depth + 1`` above.

    Args:
        name: timm's, such as ``blocks.3.mlp.fc1.weight``.
        depth: number of blocks.

    Example:
        >>> [layer_of(n, 12) for n in ("pos_embed", "patch_embed.proj.bias", "blocks.0.x", "norm.bias")]
        [0, 0, 1, 13]
    """
    if name.startswith(_EMBEDDING):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def layer_rate(name: str, depth: int, decay: float, patch_embed: float = 1.0) -> float:
    """Factor of the learning rate: ``decay ** (depth + 1 - layer)``, for the patch embedding times another.

    Args:
        name: of a ViT's parameter.
        depth: number of blocks.
        decay: rate of a layer over that of the next one (DINOv2: 0.9).
        patch_embed: further factor of the patch embedding (DINOv2: 0.2).

    Example:
        >>> names = ("cls_token", "patch_embed.proj.bias", "blocks.1.mlp.fc1.bias", "norm.bias")
        >>> [layer_rate(name, 2, 0.5, 0.2) for name in names]
        [0.125, 0.025, 0.5, 1.0]
    """
    rate = decay ** (depth + 1 - layer_of(name, depth))
    return rate * patch_embed if name.startswith("patch_embed.") else rate


def rate_for_batch(linear: float, images: int, scaling: LRScaling) -> float:
    """The peak learning rate of a batch, from the one that was scaled linearly.

    The host multiplies ``optimizer.lr`` by ``images / 256`` before a method sees it. ``sqrt`` makes of it
    ``lr * sqrt(images / 1024)``, DINOv2's rule (``sqrt_wrt_1024``).

    Args:
        linear: ``lr * images / 256``.
        images: of all processes together.
        scaling: ``linear`` returns the rate as it is.

    Example:
        >>> [round(rate_for_batch(0.004 * n / 256, n, "sqrt"), 6) for n in (256, 1024, 2048)]
        [0.002, 0.004, 0.005657]
    """
    return linear if scaling == "linear" else linear * 256 / images * math.sqrt(images / 1024)
