"""A timm Vision Transformer of the right size, inferred from the tensors themselves."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import SwiGLUPacked
from timm.models import VisionTransformer
from torch import Tensor, nn

from dinovmf_plugin.checkpoints.vit_arguments import check_vit_kwargs, select, told_arguments
from dinovmf_plugin.core.vit import patch_grid, position_embedding

__all__ = [
    "ViTShape",
    "build_vit",
    "infer_shape",
    "known_heads",
    "resize_position_embedding",
]

# width -> (name, heads) of the field's standard sizes; solo-learn calls them vit_tiny .. vit_large
_STANDARD = {
    192: ("vit_tiny", 3, 12),
    384: ("vit_small", 6, 12),
    768: ("vit_base", 12, 12),
    1024: ("vit_large", 16, 24),
    1280: ("vit_huge", 16, 32),
}
_WIDTHS = {name: width for width, (name, _, _) in _STANDARD.items()}


@dataclass(frozen=True)
class ViTShape:
    """Everything that ``timm.models.VisionTransformer`` needs to hold a set of weights.

    Attributes:
        embed_dim: width ``D``.
        depth: number of blocks.
        num_heads: attention heads, which no tensor tells; see ``heads_from``.
        mlp_ratio: hidden width of the MLP over ``D``.
        patch_size: pixels ``(height, width)`` of a patch.
        grid: patches ``(rows, columns)`` of the position embeddings.
        in_chans: image channels.
        qkv_bias: whether the attention's input projection has a bias.
        layer_scale: whether blocks scale their branches (LayerScale).
        heads_from: where ``num_heads`` was found.
        pre_norm: whether a LayerNorm stands before the blocks (and the patches' projection has no bias).
        qk_norm: whether queries and keys are normalized.
        reg_tokens: register tokens beside CLS.
        no_embed_class: whether only patches have position embeddings.
        swiglu: whether the MLP is gated (DINOv2's giant): ``mlp_ratio`` counts both halves.
    """

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    patch_size: tuple[int, int]
    grid: tuple[int, int]
    in_chans: int
    qkv_bias: bool
    layer_scale: bool
    heads_from: str
    pre_norm: bool = False
    qk_norm: bool = False
    reg_tokens: int = 0
    no_embed_class: bool = False
    swiglu: bool = False

    @property
    def img_size(self) -> tuple[int, int]:
        """Pixels ``(height, width)`` of the images that the position embeddings were made for."""
        return self.grid[0] * self.patch_size[0], self.grid[1] * self.patch_size[1]

    @property
    def architecture(self) -> str:
        """Nearest name in timm, such as ``vit_small_patch16_224``; sizes are kept in ``model_args``."""
        if self.swiglu:  # the one name that stands for a gated MLP
            return "vit_giant_patch14_dinov2"
        names = {"vit_huge": "vit_huge_patch14_224", "vit_tiny": "vit_tiny_patch16_224"}
        name = _STANDARD.get(self.embed_dim, ("vit_base", 0, 0))[0]
        if self.patch_size == (8, 8) and name in ("vit_small", "vit_base"):
            return f"{name}_patch8_224"
        return names.get(name, f"{name}_patch16_224")

    @property
    def model_args(self) -> dict[str, Any]:
        """Keyword arguments that turn ``architecture`` (or the bare class) into this shape."""
        unusual = {
            name: getattr(self, name)
            for name in ("pre_norm", "qk_norm", "reg_tokens", "no_embed_class")
        }
        return {
            "img_size": list(self.img_size),
            "patch_size": list(self.patch_size),
            "in_chans": self.in_chans,
            "embed_dim": self.embed_dim,
            "depth": self.depth,
            "num_heads": self.num_heads,
            "mlp_ratio": self.mlp_ratio,
            "qkv_bias": self.qkv_bias,
            "init_values": 1e-5 if self.layer_scale else None,
            **{name: value for name, value in unusual.items() if value},
        }

    @property
    def name(self) -> str:
        """Name in the papers' style, such as ``vit_small/16``; ``ViT/8`` for unusual sizes."""
        standard = _STANDARD.get(self.embed_dim)
        exact = standard is not None and standard[1:] == (self.num_heads, self.depth)
        name = standard[0] if standard is not None and exact else "ViT"
        patch_h, patch_w = self.patch_size
        patch = f"{patch_h}" if patch_h == patch_w else f"{patch_h}x{patch_w}"
        return f"{name}/{patch}"

    def __str__(self) -> str:
        return (
            f"{self.name} (width {self.embed_dim}, depth {self.depth}, "
            f"{self.num_heads} heads from {self.heads_from}, grid {self.grid[0]}x{self.grid[1]})"
        )


def known_heads(embed_dim: int, config: Mapping[str, Any]) -> tuple[int, str] | None:
    """Attention heads that the file's config or the field's standard sizes tell, and which."""
    stored = select(config, "backbone", "kwargs", "num_heads") or select(
        config, "model_args", "num_heads"
    )
    if isinstance(stored, int):
        return stored, "the file's config"
    if embed_dim in _STANDARD:
        return _STANDARD[embed_dim][1], "the standard size"
    return None


def _heads(
    embed_dim: int, config: Mapping[str, Any], model_name: str | None, num_heads: int | None
) -> tuple[int, str]:
    known = known_heads(embed_dim, config)
    if num_heads is not None:
        heads, origin = num_heads, "num_heads"
    elif model_name is not None:
        standard = re.match(r"(?:deit|vit)_(?:tiny|small|base|large|huge)", model_name)
        if standard is None:
            raise ValueError(f"model_name={model_name!r} is unknown: choose one of {list(_WIDTHS)}")
        width = _WIDTHS[standard[0].replace("deit", "vit")]
        if embed_dim != width:
            raise ValueError(
                f"model_name={model_name!r} has width {width}, but the file's tensors have width "
                f"{embed_dim}"
            )
        heads, origin = _STANDARD[embed_dim][1], "model_name"
    elif known is not None:
        heads, origin = known
    elif embed_dim % 64 == 0:
        heads, origin = embed_dim // 64, "width / 64"
    else:
        raise ValueError(
            f"the file does not tell its number of attention heads, and the width {embed_dim} is no "
            "multiple of 64: pass num_heads"
        )
    if heads < 1 or embed_dim % heads:
        raise ValueError(f"num_heads={heads} does not divide the width {embed_dim}")
    return heads, origin


def _grid(
    tokens: int,
    patch_size: tuple[int, int],
    config: Mapping[str, Any],
    img_size: tuple[int, int] | None,
) -> tuple[int, int]:
    """What the file's config says, then the wished size, then a square: 16 patches may be 8 x 2."""
    input_size = select(config, "pretrained_cfg", "input_size")
    told = (
        told_arguments(config).get("img_size"),
        input_size[1:] if input_size else None,
        img_size,
    )
    for size in told:
        height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
        if not isinstance(height, int) or not isinstance(width, int):
            continue
        rows, cols = height // patch_size[0], width // patch_size[1]
        if rows * cols == tokens:
            return rows, cols
    side = math.isqrt(tokens)
    if side * side == tokens:
        return side, side
    raise ValueError(
        f"{tokens} patch position embeddings make no square grid, and the file's config has no "
        "img_size (height, width) that they fit"
    )


def _positions(
    count: int,
    registers: int,
    patch_size: tuple[int, int],
    config: Mapping[str, Any],
    img_size: tuple[int, int] | None,
) -> tuple[bool, tuple[int, int]]:
    """Whether only patches have position embeddings, and their grid.

    What the config says; else CLS and registers have them too, unless the patches beside registers then
    make no grid (timm's DINOv2).
    """
    told = told_arguments(config).get("no_embed_class")
    if told is not None:
        return bool(told), _grid(
            count - (0 if told else 1 + registers), patch_size, config, img_size
        )
    try:
        return False, _grid(count - 1 - registers, patch_size, config, img_size)
    except ValueError:
        if not registers or math.isqrt(count) ** 2 != count:
            raise
        return True, _grid(count, patch_size, config, img_size)


def _ratio(hidden: int, width: int) -> float:
    """Hidden width over width, such that timm's ``int(width * ratio)`` gives it back."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def infer_shape(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    model_name: str | None = None,
    num_heads: int | None = None,
    img_size: tuple[int, int] | None = None,
) -> ViTShape:
    """Read the architecture of a ViT off its tensors' shapes.

    Args:
        tensors: backbone tensors under timm's names.
        config: settings stored with them, for what shapes do not tell (number of heads, a grid that
            is not square).
        model_name: ``vit_tiny``, ``vit_small``, ``vit_base``, ``vit_large`` or ``vit_huge`` (a longer
            timm name that starts so is fine); checked against the width, and gives the heads.
        num_heads: overrides every other source.
        img_size: pixels (height, width) that the grid has where the config does not tell and they fit.

    Raises:
        ValueError: if the tensors are no plain ViT, the number of heads or the grid stays open, or the
            config names an argument whose effect is unknown here.

    Example:
        >>> vit = VisionTransformer(embed_dim=192, depth=1, num_heads=3, num_classes=0, img_size=32)
        >>> str(infer_shape(vit.state_dict()))
        'ViT/16 (width 192, depth 1, 3 heads from the standard size, grid 2x2)'
    """
    config = config or {}
    check_vit_kwargs(told_arguments(config), "its config's backbone.kwargs")
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight")
    absent = [name for name in (*needed, "blocks.0.mlp.fc1.weight") if name not in tensors]
    if absent:
        found = ", ".join(list(tensors)[:5]) or "none"
        raise ValueError(
            "only plain Vision Transformers are supported: the backbone has no "
            f"{', '.join(absent)}; its first tensors are {found}"
        )
    conv, pos = tensors["patch_embed.proj.weight"], tensors["pos_embed"]
    if conv.ndim != 4 or pos.ndim != 3 or pos.shape[1] < 2:
        raise ValueError(
            f"patch_embed.proj.weight {tuple(conv.shape)} or pos_embed {tuple(pos.shape)} does not "
            "have a plain Vision Transformer's shape, (D, channels, h, w) and (1, 1 + patches, D)"
        )
    embed_dim = conv.shape[0]
    patch_size = (conv.shape[2], conv.shape[3])
    numbers = {int(m[1]) for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name))}
    if numbers != set(range(len(numbers))):
        raise ValueError(
            f"the file has {len(numbers)} blocks, which are not numbered 0 to {len(numbers) - 1}: some "
            "are missing"
        )
    heads, heads_from = _heads(embed_dim, config, model_name, num_heads)
    told = told_arguments(config)
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    no_embed_class, grid = _positions(pos.shape[1], registers, patch_size, config, img_size)
    hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0]
    down = tensors.get("blocks.0.mlp.fc2.weight")
    return ViTShape(
        embed_dim=embed_dim,
        depth=len(numbers),
        num_heads=heads,
        mlp_ratio=_ratio(hidden, embed_dim),
        patch_size=patch_size,
        grid=grid,
        in_chans=conv.shape[1],
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        layer_scale="blocks.0.ls1.gamma" in tensors,
        heads_from=heads_from,
        # only where the file says so: such networks of others differ in what no tensor tells, too
        pre_norm=bool(told.get("pre_norm")),
        qk_norm=bool(told.get("qk_norm")),
        reg_tokens=registers,
        no_embed_class=no_embed_class,
        swiglu=down is not None and down.ndim == 2 and hidden == 2 * down.shape[1],
    )


def build_vit(shape: ViTShape, weight_init: str = "skip", **further: Any) -> VisionTransformer:
    """An untrained timm ViT of this shape without classifier; LayerNorm epsilon 1e-6 as official.

    ``weight_init=""`` draws timm's initial weights; ``further`` arguments are timm's, such as a classifier.
    """
    arguments = {"num_classes": 0, "weight_init": weight_init, **shape.model_args, **further}
    if shape.swiglu:
        arguments |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    return VisionTransformer(**arguments)


def resize_position_embedding(vit: nn.Module, img_size: tuple[int, int]) -> Tensor:
    """Position embeddings ``(1, T, D)`` of ``vit`` for images of another size (height, width).

    The same bicubic resampling that ``core.vit.forward_tokens`` applies on the fly.
    """
    prefix, patches = position_embedding(vit, *patch_grid(vit, *img_size))
    return patches if prefix is None else torch.cat([prefix, patches], dim=1)
