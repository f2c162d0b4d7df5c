"""Crops of several sizes through a network: one forward per size, or one for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinovmf_plugin.core import vit as vits
from dinovmf_plugin.core.packing import Crops, forward_packed

__all__ = ["features_of_crops", "forward_by_size", "tokens_and_features"]


def _through(
    forward: Callable[[list[Tensor]], Sequence[Tensor]], crops: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs in the crops' order of a function that sees one batch per size."""
    by_size: dict[torch.Size, list[int]] = {}
    for i, crop in enumerate(crops):
        by_size.setdefault(crop.shape[-2:], []).append(i)
    groups = list(by_size.values())
    batches = [
        torch.cat([crops[i] for i in group]) if len(group) > 1 else crops[group[0]]
        for group in groups
    ]
    outputs: list[Any] = [None] * len(crops)
    for group, output in zip(groups, forward(batches), strict=True):
        parts = output.split([len(crops[i]) for i in group])
        for i, part in zip(group, parts, strict=True):
            outputs[i] = part
    return outputs


def forward_by_size(forward: Callable[[Tensor], Tensor], crops: Sequence[Tensor]) -> list[Tensor]:
    """Run ``forward`` once per crop size on the concatenated crops; outputs in the crops' order.

    Args:
        forward: a function of a batch ``(n, 3, s, s)``.
        crops: tensors ``(B, 3, s_i, s_i)``.
    """
    return _through(lambda batches: [forward(batch) for batch in batches], crops)


def features_of_crops(backbone: nn.Module, crops: Sequence[Tensor]) -> list[Tensor]:
    """Features ``(B, D)`` of every crop: CLS after the final norm for ViTs, the pooled map otherwise.

    A ViT sees all sizes in one pass over its weights, other networks one size after the other.
    """
    if not vits.is_vit(backbone):
        return forward_by_size(backbone, crops)

    def forward(batches: list[Tensor]) -> list[Tensor]:
        return [tokens[:, 0] for tokens in forward_packed(backbone, [Crops(x) for x in batches])]

    return _through(forward, crops)


def tokens_and_features(
    vit: nn.Module,
    first: Crops,
    others: Sequence[Tensor],
    each: Callable[[Tensor], Tensor] = lambda features: features,
) -> tuple[Tensor, list[Tensor]]:
    """All tokens of one batch, and CLS features of it and of further crops, in one pass over the weights.

    Args:
        vit: a plain ViT.
        first: the batch whose tokens ``(B, T, D)`` are all wanted, masked or with dropped patches.
        others: crops ``(B, 3, s_i, s_i)``.
        each: applied to the features of the first batch, then of each size of the others.

    Returns:
        The first batch's tokens; its features, then the others' in their order.
    """
    found: list[Tensor] = []

    def forward(batches: list[Tensor]) -> list[Tensor]:
        tokens, *rest = forward_packed(vit, [first, *(Crops(batch) for batch in batches)])
        found.extend([tokens, each(tokens[:, 0])])
        return [each(part[:, 0]) for part in rest]

    further = _through(forward, others)
    return found[0], [found[1], *further]
