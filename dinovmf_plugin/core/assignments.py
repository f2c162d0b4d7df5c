"""Soft assignments over the rows of all ranks: their mean, and Sinkhorn-Knopp's balanced ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dinovmf_plugin.core import distributed

__all__ = ["log_mean_over_ranks", "log_mean_probability", "sinkhorn"]


def log_mean_probability(logits: Tensor | Iterable[Tensor]) -> Tensor:
    """``log mean_b softmax(l_b)`` over the rows of all ranks, ``(1, K)`` in float32.

    The arithmetic mean of the probabilities, formed in the log domain (log-softmax, then
    log-sum-exp over rows, then over ranks): finite for finite logits, where averaging float32
    probabilities underflows to ``log 0 = -inf`` once logits spread over about 100 nats.

    Args:
        logits: ``(rows, K)``, or chunks of such rows; the number of rows may differ between ranks and
            be 0 on some.

    Example:
        >>> wide = torch.tensor([[0.0, 200.0], [0.0, 300.0]])
        >>> log_mean_probability(wide).tolist()
        [[-200.69314575195312, 0.0]]
        >>> log_mean_probability(wide.split(1)).tolist()
        [[-200.69314575195312, 0.0]]
    """
    parts, rows = [], 0
    for chunk in [logits] if isinstance(logits, Tensor) else logits:
        parts.append(_log_sum_probability(chunk))
        rows += len(chunk)
        del chunk  # before the next one is made
    return log_mean_over_ranks(torch.cat(parts), rows)


def log_mean_over_ranks(parts: Tensor, rows: int) -> Tensor:
    """``log_mean_probability`` from ``log sum_b softmax(l_b)``, ``(parts, K)``, of this rank's ``rows``."""
    return distributed.logsumexp_over_ranks(parts) - distributed.log_total(rows)


def _log_sum_probability(logits: Tensor) -> Tensor:
    """``log sum_b softmax(l_b)`` over these rows, ``(1, K)``; ``(0, K)`` without rows."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    return log_p.logsumexp(dim=0, keepdim=True) if len(log_p) else log_p


def sinkhorn(logits: Tensor, iterations: int = 3) -> Tensor:
    """Sinkhorn-Knopp assignment of the rows of all ranks to K equally used columns.

    Alternates, ``iterations`` times, equal mass for every prototype and for every sample, in the log
    domain; every row of the result sums to 1.

    Args:
        logits: ``(rows, K)``, already divided by the temperature.
        iterations: 3 in SwAV, MSN and DINOv2.

    Returns:
        float32 probabilities ``(rows, K)``.

    Example:
        >>> targets = sinkhorn(torch.tensor([[2.0, 0.0], [2.0, 0.0]]))
        >>> targets.tolist()
        [[0.5, 0.5], [0.5, 0.5]]
    """
    log_q = logits.float()
    for _ in range(iterations):
        log_q = log_q - distributed.logsumexp_over_ranks(log_q)
        log_q = log_q.log_softmax(dim=-1)
    return log_q.exp()
