"""Pure functions over timm Vision Transformers: any input size, masks, dropped patches, blocks.

They use a ``timm.models.VisionTransformer``'s own sub-modules, so weights keep timm's names and the
host's backbones of both generations serve unchanged. ``T = 1 + rows * cols`` tokens (plus registers,
if any), CLS first.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "PositionResampling",
    "disable_drop_path",
    "forward_tokens",
    "has_tokens",
    "intermediate_tokens",
    "is_vit",
    "last_attention",
    "patch_grid",
    "position_embedding",
    "position_grid",
    "resample_positions_as",
]

PositionResampling = Literal["dino", "msn", "antialias"]


def is_vit(backbone: nn.Module) -> bool:
    """Whether the functions of this module can drive ``backbone`` (a timm-style plain ViT)."""
    parts = ("patch_embed", "blocks", "norm", "pos_embed", "cls_token")
    return all(getattr(backbone, part, None) is not None for part in parts)


def has_tokens(network: nn.Module) -> bool:
    """Whether CLS and patches can be had: a plain ViT, or a network that gives them itself.

    The latter has ``block_tokens(images, n)`` and ``last_attention(images)`` beside a ViT's ``embed_dim``,
    ``blocks``, ``norm``, ``patch_embed`` and ``num_prefix_tokens``.
    """
    return is_vit(network) or hasattr(network, "block_tokens")


def _check_vit(backbone: nn.Module) -> None:
    if not is_vit(backbone):
        raise ValueError(
            f"backbone {type(backbone).__name__} is not a plain Vision Transformer with CLS token and "
            "position embeddings: choose vit_tiny, vit_small, vit_base or vit_large"
        )


def patch_grid(vit: Any, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of patches for an image; a rest smaller than a patch is cut off.

    Raises:
        ValueError: if the image is smaller than one patch.
    """
    patch_h, patch_w = vit.patch_embed.patch_size
    rows, cols = height // patch_h, width // patch_w
    if rows < 1 or cols < 1:
        raise ValueError(
            f"an image of {height} x {width} pixels is smaller than one patch of {patch_h} x {patch_w}"
        )
    return rows, cols


def resample_positions_as(vit: nn.Module, rule: PositionResampling) -> None:
    """Let every function of this module resample the position embeddings of ``vit`` by a published rule.

    Bicubic in all. ``dino`` (the default; DINO, iBOT and DINOv2) adds 0.1 cells to the target in the scale
    factor, against rounding (dino issue 8); ``msn`` takes the plain ratio of the sides, ``sqrt(n / N)`` in
    MSN's square crops; ``antialias`` (DINOv2 with registers, timm) takes the plain ratio with
    antialiasing. At 14 x 14 to 6 x 6 the embeddings of the first two differ by 28 %.

    Raises:
        ValueError: if the rule is unknown.
    """
    if rule not in get_args(PositionResampling):
        raise ValueError(f"rule={rule!r} is unknown: choose one of {get_args(PositionResampling)}")
    vit.position_resampling = rule  # type: ignore[assignment]


def position_grid(vit: Any) -> tuple[int, int]:
    """Rows and columns of the patches that the position embeddings of ``vit`` were made for.

    Its own ``patch_embed.grid_size`` where that fits their number, a square otherwise.

    Raises:
        ValueError: if neither fits.

    Example:
        >>> from timm.models import VisionTransformer
        >>> vit = VisionTransformer(img_size=(64, 16), patch_size=8, embed_dim=12, depth=1, num_heads=1)
        >>> position_grid(vit)  # not 4 x 4
        (8, 2)
    """
    patches = vit.pos_embed.shape[1] - _position_prefix(vit)
    own = vit.patch_embed.grid_size
    if own is not None and own[0] * own[1] == patches:
        return int(own[0]), int(own[1])
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(
            f"{patches} patch position embeddings fit neither the network's grid of {own} nor a square"
        )
    return side, side


def _position_prefix(vit: Any) -> int:
    return 0 if getattr(vit, "no_embed_class", False) else int(vit.num_prefix_tokens)


def position_embedding(vit: Any, rows: int, cols: int) -> tuple[Tensor | None, Tensor]:
    """(prefix, patch) position embeddings for a grid: ``(1, P, D)`` or None, ``(1, rows*cols, D)``.

    By the network's rule (``resample_positions_as``): whether it antialiases is visible when a 14 x 14
    grid shrinks to 6 x 6.
    """
    pos = vit.pos_embed
    prefix_len = _position_prefix(vit)
    prefix = pos[:, :prefix_len] if prefix_len else None
    patches = pos[:, prefix_len:]
    base_rows, base_cols = position_grid(vit)
    if (rows, cols) == (base_rows, base_cols):
        return prefix, patches
    grid = patches.reshape(1, base_rows, base_cols, -1).permute(0, 3, 1, 2)
    # without a scale factor torch takes the plain ratio of the sides, and no side can round down
    rule = getattr(vit, "position_resampling", "dino")
    plain = rule != "dino"
    scale = None if plain else ((rows + 0.1) / base_rows, (cols + 0.1) / base_cols)
    size = (rows, cols) if plain else None
    with torch.autocast(grid.device.type, enabled=False):
        grid = F.interpolate(
            grid.float(),
            size=size,
            scale_factor=scale,
            mode="bicubic",
            antialias=rule == "antialias",
        )
    return prefix, grid.to(patches.dtype).flatten(2).transpose(1, 2)


def embed(
    vit: Any,
    images: Tensor,
    masks: Tensor | None = None,
    mask_token: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    rows, cols = patch_grid(vit, *images.shape[-2:])
    x = vit.patch_embed.proj(images).flatten(2).transpose(1, 2)
    x = vit.patch_embed.norm(x)
    if masks is not None:
        if mask_token is None:
            raise ValueError("masks were given without a mask_token to put in their place")
        if masks.shape != (len(images), rows * cols):
            raise ValueError(
                f"masks have shape {tuple(masks.shape)}, but {len(images)} images of "
                f"{rows} x {cols} patches need ({len(images)}, {rows * cols})"
            )
        x = torch.where(masks.unsqueeze(-1), mask_token.to(x.dtype).reshape(1, 1, -1), x)
    prefix_pos, patch_pos = position_embedding(vit, rows, cols)
    x = x + patch_pos
    if keep is not None:
        x = x.index_select(1, keep)
    prefix = [vit.cls_token]
    if getattr(vit, "reg_token", None) is not None:
        prefix.append(vit.reg_token)
    tokens = torch.cat(prefix, dim=1)
    if prefix_pos is not None:
        tokens = tokens + prefix_pos
    x = torch.cat([tokens.expand(len(images), -1, -1).to(x.dtype), x], dim=1)
    return vit.norm_pre(vit.pos_drop(x))


def forward_tokens(
    vit: Any,
    images: Tensor,
    *,
    masks: Tensor | None = None,
    mask_token: Tensor | None = None,
    keep: Tensor | None = None,
    final_norm: bool = True,
) -> Tensor:
    """Tokens after the last block.

    Args:
        vit: a timm ``VisionTransformer``.
        images: ``(B, 3, H, W)`` of any size of at least one patch.
        masks: bool ``(B, rows * cols)``; true patches become ``mask_token`` *before* position
            embeddings and CLS are added (iBOT).
        mask_token: ``(D,)`` or ``(1, 1, D)``; needed with ``masks``.
        keep: int64 indices of the patches that stay, the same for the whole batch, applied after the
            position embeddings (MSN's patch dropping).
        final_norm: whether the final LayerNorm is applied.

    Returns:
        ``(B, T, D)``, CLS first.

    Raises:
        ValueError: if ``vit`` is no plain ViT, the masks do not fit, or a token is missing.
    """
    if hasattr(vit, "block_tokens") and masks is None and keep is None:
        return intermediate_tokens(vit, images, 1, final_norm=final_norm)[0]
    _check_vit(vit)
    x = embed(vit, images, masks, mask_token, keep)
    if getattr(vit, "grad_checkpointing", False) and torch.is_grad_enabled():
        from timm.models import checkpoint_seq

        x = checkpoint_seq(vit.blocks, x)
    else:
        x = vit.blocks(x)
    return vit.norm(x) if final_norm else x


def intermediate_tokens(
    vit: Any, images: Tensor, n: int, *, final_norm: bool = True
) -> list[Tensor]:
    """Tokens of the last ``n`` blocks, oldest first, each through the final norm if asked.

    Returns:
        ``n`` tensors ``(B, T, D)``.

    Raises:
        ValueError: if ``n`` is not between 1 and the depth.
    """
    if not hasattr(vit, "block_tokens"):
        _check_vit(vit)
    depth = len(vit.blocks)
    if not 1 <= n <= depth:
        raise ValueError(f"n={n} blocks were asked for, but the backbone has {depth}")
    if hasattr(vit, "block_tokens"):
        found: list[Tensor] = vit.block_tokens(images, n)
        return [vit.norm(tokens) for tokens in found] if final_norm else found
    x = embed(vit, images)
    out = []
    for i, block in enumerate(vit.blocks):
        x = block(x)
        if i >= depth - n:
            out.append(vit.norm(x) if final_norm else x)
    return out


def last_attention(vit: Any, images: Tensor) -> Tensor:
    """Attention probabilities of the last block, ``(B, heads, T, T)``, float32.

    Recomputed from the block's own projection, since fused attention never forms them.
    """
    if hasattr(vit, "block_tokens"):
        attention_of: Tensor = vit.last_attention(images)
        return attention_of
    _check_vit(vit)
    x = embed(vit, images)
    for block in vit.blocks[:-1]:
        x = block(x)
    block = vit.blocks[-1]
    attention = block.attn
    x = block.norm1(x)
    batch, tokens, _ = x.shape
    qkv = attention.qkv(x).reshape(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(qkv[0]), attention.k_norm(qkv[1])
    return ((q.float() * attention.scale) @ k.float().transpose(-2, -1)).softmax(dim=-1)


def disable_drop_path(module: nn.Module) -> None:
    """Set every stochastic depth of ``module`` to zero: the teacher has none (DINO section 5).

    Unlike ``eval()`` this leaves BatchNorm of a head in training mode, as official MSN has it.
    """
    from timm.layers import DropPath

    for layer in module.modules():
        if isinstance(layer, DropPath):
            layer.drop_prob = 0.0
