"""Triton kernels of the fused cross-entropy: logits live in one tile at a time.

``K`` prototypes are walked through in tiles of ``BK``, student rows in tiles of ``BR``. Products take their
operands as they come (bfloat16 or float32) and accumulate in float32; all else is float32. Imported only
where Triton is used: see ``fused``.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

__all__ = ["gradients_kernel", "normalize_kernel"]

jit: Any = triton.jit  # untyped


@jit  # type: ignore[untyped-decorator]
def normalize_kernel(  # type: ignore[no-untyped-def]
    y,  # (R, P) student rows / temperature
    w,  # (K, P) effective prototypes
    bias,  # (K,)
    peaks,  # out (S, R): largest logit of each share of the prototypes
    totals,  # out (S, R): sum_k exp(l - peak)
    means,  # out (S, R, P): sum_k exp(l - peak) w_k
    R,
    K,
    P,
    tiles,  # tiles of prototypes in one share
    HAS_BIAS: tl.constexpr,
    MEAN: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BP: tl.constexpr,
):
    """First pass: online log-sum-exp, and the mean prototype that the embeddings' gradient needs."""
    share = tl.program_id(1)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    p = tl.arange(0, BP)
    rows = tl.load(y + r[:, None] * P + p[None, :], (r[:, None] < R) & (p[None, :] < P), other=0.0)
    peak = tl.full((BR,), float("-inf"), tl.float32)
    total = tl.zeros((BR,), tl.float32)
    mean = tl.zeros((BR, BP), tl.float32)
    first = share * tiles * BK
    for start in range(first, tl.minimum(first + tiles * BK, K), BK):
        k = start + tl.arange(0, BK)
        there = k < K
        inside = there[:, None] & (p[None, :] < P)
        at = w + k[:, None].to(tl.int64) * P + p[None, :]
        prototypes = tl.load(at, inside, other=0.0)
        logits = tl.dot(rows, tl.trans(prototypes), input_precision=PRECISION)
        if HAS_BIAS:
            logits += tl.load(bias + k, there, other=0.0)[None, :]
        logits = tl.where(there[None, :], logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        decay = tl.exp(peak - higher)
        e = tl.exp(logits - higher[:, None])
        total = total * decay + tl.sum(e, 1)
        if MEAN:
            mean = mean * decay[:, None]
            mean += tl.dot(e.to(prototypes.dtype), prototypes, input_precision=PRECISION)
        peak = higher
    at = share * R + r
    tl.store(peaks + at, peak, r < R)
    tl.store(totals + at, total, r < R)
    if MEAN:
        inside = (r[:, None] < R) & (p[None, :] < P)
        tl.store(means + at[:, None].to(tl.int64) * P + p[None, :], mean, inside)


@jit  # type: ignore[untyped-decorator]
def gradients_kernel(  # type: ignore[no-untyped-def]
    y,  # (R, P)
    w,  # (K, P) effective prototypes
    bias,  # (K,)
    lse,  # (R,)
    share,  # (R,): a, how much softmax of this row the loss wants
    targets,  # (T, K)
    mixed,  # (T, P): ybar
    mass,  # (T,)
    weight,  # (K, P) weights as given: w = scale weight
    scale,  # (K,)
    norms,  # (K,) ||weight||
    grad_weight,  # out (K, P)
    grad_factor,  # out (K,): of the magnitude (NORMED) or of the scale
    grad_bias,  # out (K,)
    R,
    K,
    P,
    T,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    NORMED: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BP: tl.constexpr,
    BT: tl.constexpr,
):
    """Second pass: logits again, softmax from the known log-sum-exp, the prototypes' gradients."""
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    p = tl.arange(0, BP)
    there = k < K
    inside = there[:, None] & (p[None, :] < P)
    place = k[:, None].to(tl.int64) * P + p[None, :]
    prototypes = tl.load(w + place, inside, other=0.0)
    offset = tl.zeros((BK,), tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + k, there, other=0.0)
    grad = tl.zeros((BK, BP), tl.float32)
    usage = tl.zeros((BK,), tl.float32)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        valid = (r[:, None] < R) & (p[None, :] < P)
        rows = tl.load(y + r[:, None] * P + p[None, :], valid, other=0.0)
        logits = tl.dot(prototypes, tl.trans(rows), input_precision=PRECISION) + offset[:, None]
        normalizer = tl.load(lse + r, r < R, other=float("inf"))
        wanted = tl.load(share + r, r < R, other=0.0)
        pull = tl.exp(logits - normalizer[None, :]) * wanted[None, :]
        usage += tl.sum(pull, 1)
        grad += tl.dot(pull.to(prototypes.dtype), rows, input_precision=PRECISION)
    for start in range(0, T, BT):
        t = start + tl.arange(0, BT)
        at = t[None, :].to(tl.int64) * K + k[:, None]
        target = tl.load(targets + at, (t[None, :] < T) & there[:, None], other=0.0)
        valid = (t[:, None] < T) & (p[None, :] < P)
        teacher = tl.load(mixed + t[:, None] * P + p[None, :], valid, other=0.0)
        weights = tl.load(mass + t, t < T, other=0.0)
        usage -= tl.sum(target.to(tl.float32) * weights[None, :], 1)
        grad -= tl.dot(target.to(teacher.dtype), teacher, input_precision=PRECISION)
    if HAS_BIAS:
        tl.store(grad_bias + k, usage, there)
    if HAS_SCALE:
        v = tl.load(weight + place, inside, other=0.0).to(tl.float32)
        along = tl.sum(grad * v, 1)
        if NORMED:
            norm = tl.load(norms + k, there, other=1.0)
            along = along / norm
            grad -= v * (along / norm)[:, None]
        tl.store(grad_factor + k, along, there)
        grad *= tl.load(scale + k, there, other=0.0)[:, None]
    tl.store(grad_weight + place, grad, inside)
