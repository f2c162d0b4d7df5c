"""Triton kernels from the teacher's products to its targets and the center's statistic.

The products ``<v_k, y_b>`` ``(R, K)`` are read twice, along the rows for the log-sum-exp of every row and
along the columns for everything else: no array of logits is stored between them. Products are read as they
come (bfloat16 or float32), the arithmetic is float32. Imported only where Triton is used: see ``targets``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinovmf_plugin.core.centering import Statistic

__all__ = ["fused_targets"]

jit: Any = triton.jit  # untyped
_TILE = 1024  # prototypes in one tile of the first kernel
_PROGRAMS = 512  # at least so many for the first kernel, where K allows
_LOWEST: Any = tl.constexpr(-3.0e38)  # less than any logit, and no NaN when subtracted from itself


@jit  # type: ignore[untyped-decorator]
def _raise(peak, total, logits):  # type: ignore[no-untyped-def]
    """Online log-sum-exp of lanes: ``total`` counts in units of ``exp(peak)``."""
    higher = tl.maximum(peak, logits)
    return higher, total * tl.exp(peak - higher) + tl.exp(logits - higher)


@jit  # type: ignore[untyped-decorator]
def rows_kernel(  # type: ignore[no-untyped-def]
    products,  # (R, K)
    scale,  # (K,): score = scale * product
    bias,  # (K,): logit = score / temperature + bias
    shift,  # (K,): target = softmax(logit - shift)
    lse,  # out (2, S, R): of the targets' logits, of the logits
    R,
    K,
    temperature,
    tiles,  # tiles of prototypes in one share
    PLAIN: tl.constexpr,  # the second one, too
    BK: tl.constexpr,
):
    """Log-sum-exp of one row over one share of the prototypes."""
    r = tl.program_id(0)
    share = tl.program_id(1)
    peak = tl.full((BK,), _LOWEST, tl.float32)
    total = tl.zeros((BK,), tl.float32)
    plain_peak = tl.full((BK,), _LOWEST, tl.float32)
    plain_total = tl.zeros((BK,), tl.float32)
    row = products + r.to(tl.int64) * K
    first = share * tiles * BK
    for start in range(first, tl.minimum(first + tiles * BK, K), BK):
        k = start + tl.arange(0, BK)
        there = k < K
        score = tl.load(row + k, there, other=0.0).to(tl.float32) * tl.load(scale + k, there)
        logits = score / temperature + tl.load(bias + k, there)
        centered = tl.where(there, logits - tl.load(shift + k, there), float("-inf"))
        peak, total = _raise(peak, total, centered)
        if PLAIN:
            logits = tl.where(there, logits, float("-inf"))
            plain_peak, plain_total = _raise(plain_peak, plain_total, logits)
    top = tl.max(peak, 0)
    at = share * R + r
    tl.store(lse + at, top + tl.log(tl.sum(total * tl.exp(peak - top), 0)))
    if PLAIN:
        top = tl.max(plain_peak, 0)
        at += tl.num_programs(1) * R
        tl.store(lse + at, top + tl.log(tl.sum(plain_total * tl.exp(plain_peak - top), 0)))


@jit  # type: ignore[untyped-decorator]
def columns_kernel(  # type: ignore[no-untyped-def]
    products,  # (R, K)
    scale,
    bias,
    shift,
    lse,  # (R,) of the targets' logits
    plain_lse,  # (R,) of the logits
    targets,  # out (R, K)
    statistic,  # out (K,)
    R,
    K,
    temperature,
    SUM: tl.constexpr,
    LOG_PROBABILITY: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """Targets of all rows for a tile of prototypes, and what the center learns from them."""
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    there = k < K
    factor = tl.load(scale + k, there, other=0.0)
    added = tl.load(bias + k, there, other=0.0)
    taken = tl.load(shift + k, there, other=0.0)
    peak = tl.full((BK,), _LOWEST, tl.float32)
    total = tl.zeros((BK,), tl.float32)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        inside = (r < R)[:, None] & there[None, :]
        at = r[:, None].to(tl.int64) * K + k[None, :]
        score = tl.load(products + at, inside, other=0.0).to(tl.float32) * factor[None, :]
        logits = score / temperature + added[None, :]
        row = tl.load(lse + r, r < R, other=0.0)
        tl.store(targets + at, tl.exp(logits - taken[None, :] - row[:, None]), inside)
        if SUM:
            total += tl.sum(score, 0)
        if LOG_PROBABILITY:
            row = tl.load(plain_lse + r, r < R, other=0.0)
            log_p = tl.where(inside, logits - row[:, None], float("-inf"))
            higher = tl.maximum(peak, tl.max(log_p, 0))
            total = total * tl.exp(peak - higher) + tl.sum(tl.exp(log_p - higher[None, :]), 0)
            peak = higher
    if SUM:
        tl.store(statistic + k, total, there)
    if LOG_PROBABILITY:
        tl.store(statistic + k, peak + tl.log(total), there)


def fused_targets(
    products: Tensor,
    scale: Tensor,
    bias: Tensor,
    shift: Tensor,
    temperature: float,
    statistic: Statistic | None,
) -> tuple[Tensor, Tensor | None]:
    """Targets ``softmax(scale * products / temperature + bias - shift)`` and the statistic of the batch.

    Args:
        products: ``(R, K)``, bfloat16, float16 or float32.
        scale: ``(K,)`` float32.
        bias: ``(K,)`` float32.
        shift: ``(K,)`` float32: the center, in logits.
        temperature: the teacher's.
        statistic: ``sum``: the sum of the scores over the rows; ``log_probability``: ``log sum_b softmax`` of
            the logits before ``shift``; None: none is made.

    Returns:
        float32 targets ``(R, K)`` and the statistic ``(1, K)`` or None.
    """
    rows, count = products.shape
    targets = torch.empty(rows, count, dtype=torch.float32, device=products.device)
    found = None if statistic is None else targets.new_empty(1, count)
    total = math.ceil(count / _TILE)
    tiles = math.ceil(total / min(max(_PROGRAMS // max(rows, 1), 1), total))
    shares = math.ceil(total / tiles)
    plain = statistic == "log_probability"
    parts = targets.new_empty(1 + plain, shares, rows)
    vectors = [x.contiguous() for x in (scale, bias, shift)]
    products = products.contiguous()
    rows_kernel[(rows, shares)](
        products, *vectors, parts, rows, count, temperature, tiles, PLAIN=plain, BK=_TILE
    )
    lse = parts.logsumexp(dim=1)
    columns_kernel[(math.ceil(count / 128),)](
        products,
        *vectors,
        lse[0],
        lse[-1],
        targets,
        targets if found is None else found,
        rows,
        count,
        temperature,
        SUM=statistic == "sum",
        LOG_PROBABILITY=plain,
        BR=16,
        BK=128,
    )
    return targets, found
