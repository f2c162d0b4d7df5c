"""One pass of a ViT over images of several sizes: tokens share every layer but the attention.

Layers that look at one token at a time see the tokens of all sizes as the rows of one matrix; attention
looks at the images of one size after the other. The values are those of one forward per size, with half
the kernels and one gradient per weight; stochastic depth is drawn once for all blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dinovmf_plugin.core import vit as vits

__all__ = ["Crops", "attend", "can_pack", "forward_packed"]


@dataclass(frozen=True)
class Crops:
    """Images of one size, and what ``forward_tokens`` may be told about them.

    Attributes:
        images: ``(B, 3, H, W)``.
        masks: see ``vit.forward_tokens``.
        mask_token: see ``vit.forward_tokens``.
        keep: see ``vit.forward_tokens``.
    """

    images: Tensor
    masks: Tensor | None = None
    mask_token: Tensor | None = None
    keep: Tensor | None = None

    def options(self) -> dict[str, Any]:
        """The keywords of ``vit.forward_tokens``."""
        return {"masks": self.masks, "mask_token": self.mask_token, "keep": self.keep}


Shapes = tuple[tuple[int, int], ...]  # (images, tokens of each) of every size


def can_pack(vit: Any) -> bool:
    """Whether the blocks are timm's plain ones, whose parts are known here."""
    from timm.models import vision_transformer as timm_vit

    if not vits.is_vit(vit):
        return False
    return all(
        type(block) is timm_vit.Block
        and type(block.attn) is timm_vit.Attention
        and getattr(block.attn, "gate", None) is None
        for block in vit.blocks
    )


def forward_packed(vit: Any, crops: Sequence[Crops]) -> list[Tensor]:
    """Tokens ``(B, T, D)`` of every size after the last block and the final norm.

    Equal to ``vit.forward_tokens`` of each size, which also serves where ``can_pack`` says no.

    Args:
        vit: a timm ``VisionTransformer``.
        crops: one entry per size.

    Raises:
        ValueError: as ``vit.forward_tokens``.

    Example:
        >>> from timm.models.vision_transformer import VisionTransformer
        >>> vit = VisionTransformer(
        ...     patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0, img_size=32
        ... )
        >>> outputs = forward_packed(vit, [Crops(torch.ones(2, 3, s, s)) for s in (32, 16)])
        >>> [tuple(tokens.shape) for tokens in outputs]
        [(2, 17, 24), (2, 5, 24)]
    """
    if not can_pack(vit):
        return [vits.forward_tokens(vit, c.images, **c.options()) for c in crops]
    embedded = [vits.embed(vit, c.images, c.masks, c.mask_token, c.keep) for c in crops]
    shapes: Shapes = tuple((len(x), x.shape[1]) for x in embedded)
    x = torch.cat([tokens.flatten(0, 1) for tokens in embedded])
    kept = iter(_stochastic_depth(vit, shapes, x))
    run: Callable[..., Tensor] = getattr(vit, "packed_block", None) or packed_block
    recompute = getattr(vit, "grad_checkpointing", False) and torch.is_grad_enabled()
    for block in vit.blocks:
        arguments = (block, x, shapes, next(kept), next(kept))
        if recompute:
            from torch.utils.checkpoint import checkpoint

            x = checkpoint(run, *arguments, use_reentrant=False)
        else:
            x = run(*arguments)
    x = vit.norm(x)
    return [part.view(*shape, -1) for part, shape in zip(_split(x, shapes), shapes, strict=True)]


def packed_block(
    block: Any, x: Tensor, shapes: Shapes, kept1: Tensor | None, kept2: Tensor | None
) -> Tensor:
    """One block over the tokens of all sizes.

    Args:
        block: a timm ``Block``.
        x: tokens ``(sum B T, D)``.
        shapes: ``(B, T)`` of every size.
        kept1: ``(sum B T, 1)``, factors of the attention's branch: 0 where stochastic depth drops an
            image, ``1 / (1 - p)`` elsewhere; None for 1.
        kept2: those of the MLP's branch.
    """
    branch = block.ls1(_attention(block.attn, block.norm1(x), shapes))
    x = x + (branch if kept1 is None else branch * kept1.to(branch.dtype))
    branch = block.ls2(block.mlp(block.norm2(x)))
    return x + (branch if kept2 is None else branch * kept2.to(branch.dtype))


def _split(x: Tensor, shapes: Shapes) -> tuple[Tensor, ...]:
    return x.split([images * tokens for images, tokens in shapes])


def _attention(attn: Any, x: Tensor, shapes: Shapes) -> Tensor:
    """timm's ``Attention.forward``, the images of one size after the other."""
    mixed = []
    for part, (images, tokens) in zip(_split(attn.qkv(x), shapes), shapes, strict=True):
        qkv = part.view(images, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        dropout = attn.attn_drop.p if attn.training else 0.0
        out = attend(attn.q_norm(q), attn.k_norm(k), v, attn.scale, dropout, attn.fused_attn)
        mixed.append(out.transpose(1, 2).reshape(images * tokens, -1))
    y = torch.cat(mixed)
    if hasattr(attn, "norm"):
        y = attn.norm(y)
    return attn.proj_drop(attn.proj(y))  # type: ignore[no-any-return]


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float = 0.0, fused: bool = True
) -> Tensor:
    """Softmax attention ``(B, heads, T, d)``: torch's fused kernel, or the formula as it is written.

    On CPUs the fused kernel's backward pass in half precision is slower than the formula (2.4 times with
    197 tokens, 6 times with 37); in float32, and without gradients, it is faster. So the formula serves
    there, whatever ``fused`` says.
    """
    slow = q.device.type == "cpu" and q.element_size() == 2 and q.requires_grad
    if fused and not slow:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    with torch.autocast(q.device.type, enabled=False):  # whose softmax would be kept in float32
        weights = ((q * scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return (F.dropout(weights, dropout) if dropout else weights) @ v


def _drop_rates(vit: Any) -> tuple[float, ...]:
    """Stochastic depth of both branches of every block; 0 outside training."""
    layers = [layer for block in vit.blocks for layer in (block.drop_path1, block.drop_path2)]
    return tuple(
        float(getattr(layer, "drop_prob", 0.0) or 0.0) if layer.training else 0.0
        for layer in layers
    )


def _stochastic_depth(vit: Any, shapes: Shapes, x: Tensor) -> Iterator[Tensor | None]:
    """Factors ``(sum B T, 1)`` of every branch, drawn together: one decision per image and branch."""
    rates = _drop_rates(vit)
    if not any(rates):
        yield from [None] * len(rates)
        return
    dropping = tuple(rate for rate in rates if rate > 0)
    share = _constant(tuple(1 - rate for rate in dropping), x.device)[:, None]
    uniform = torch.rand(len(dropping), sum(images for images, _ in shapes), device=x.device)
    factors = (uniform < share) / share
    rows = iter(factors.index_select(1, _image_of_token(shapes, x.device)).unsqueeze(-1))
    for rate in rates:
        yield next(rows) if rate > 0 else None


@functools.lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A tensor that a step needs again and again: copied to the device once."""
    return torch.tensor(values, device=device)


@functools.lru_cache(maxsize=16)
def _image_of_token(shapes: Shapes, device: torch.device) -> Tensor:
    """Index ``(sum B T,)`` of the image that a token belongs to."""
    tokens = [t for images, t in shapes for _ in range(images)]
    return torch.repeat_interleave(torch.tensor(tokens)).to(device)
