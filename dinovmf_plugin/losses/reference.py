"""The plain formula of ``prototype_cross_entropy``, with all logits: what every faster path must equal."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["reference_cross_entropy"]


def reference_cross_entropy(
    embeddings: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    scale: Tensor | None = None,
    magnitude: Tensor | None = None,
    bias: Tensor | None = None,
    pair_weights: Tensor,
    row_weights: Tensor,
) -> Tensor:
    """``sum_vqn pair_weights[v, q] row_weights[n] CE(targets[q, n], logits[v, n])`` as it is written.

    Args:
        embeddings: ``(V, N, p)``.
        weight: ``(K, p)``.
        targets: ``(Q, N, K)``.
        temperature: the student's.
        scale: ``(K,)`` factors of the rows of ``weight``.
        magnitude: ``(K,)``, instead of scale: norms of the prototypes, with a sign.
        bias: ``(K,)``.
        pair_weights: ``(V, Q)``.
        row_weights: ``(N,)``.

    Returns:
        Scalar of the inputs' dtype, differentiable by autograd.

    Example:
        >>> y, w, t = torch.ones(1, 1, 2), torch.zeros(4, 2), torch.full((1, 1, 4), 0.25)
        >>> one = torch.ones(1)
        >>> loss = reference_cross_entropy(
        ...     y, w, t, temperature=0.1, pair_weights=one[None], row_weights=one
        ... )
        >>> round(float(loss), 4)  # log 4
        1.3863
    """
    if magnitude is not None:
        scale = magnitude / weight.norm(dim=1)
    prototypes = weight if scale is None else scale[:, None] * weight
    logits = embeddings @ prototypes.t() / temperature
    if bias is not None:
        logits = logits + bias
    losses = -torch.einsum("qnk,vnk->vqn", targets, logits.log_softmax(dim=-1))
    return torch.einsum("vq,n,vqn->", pair_weights, row_weights, losses)
