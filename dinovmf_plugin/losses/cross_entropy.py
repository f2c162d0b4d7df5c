"""Soft-target cross-entropy between a teacher's targets and a student's prototype logits.

``reference`` is its formula in a dozen lines; ``streamed`` computes the same without holding all logits,
``fused`` the same again on NVIDIA GPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dinovmf_plugin.losses import fused
from dinovmf_plugin.losses.plan import choose_plan
from dinovmf_plugin.losses.streamed import StreamedCrossEntropy

__all__ = ["prototype_cross_entropy"]


def prototype_cross_entropy(
    embeddings: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    scale: Tensor | None = None,
    magnitude: Tensor | None = None,
    bias: Tensor | None = None,
    pair_weights: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Sum of soft-target cross-entropies between teacher targets and student prototype logits.

    ``logits[v, n, k] = scale_k <weight_k, embeddings[v, n]> / temperature + bias_k`` and the value is
    ``sum_vqn pair_weights[v, q] row_weights[n] CE(targets[q, n], logits[v, n])`` with
    ``CE(t, l) = -sum_k t_k log_softmax(l)_k`` (paper Eqs. 2 and 6; targets need not sum to 1).

    The logits are walked through in chunks of prototypes; strategy and sizes follow from the shapes.
    Sums, softmax and bias are float32 (float64 if an input is). Under autocast the products use its
    dtype with float32 accumulation; CPUs that do not multiply in it use float32, and only the
    exponentials that wait for the backward pass are kept in half precision. Deterministic on CPUs.
    On NVIDIA GPUs bfloat16 products run in Triton kernels; ``DINOVMF_TRITON=0`` turns them off.
    The gradient itself cannot be differentiated again.

    Args:
        embeddings: student rows ``(V, N, p)``, or ``(N, p)`` for one view; N may be 0.
        weight: ``(K, p)``, effective prototypes, or directions if scale or magnitude is given.
        targets: teacher probabilities ``(Q, N, K)``, or ``(N, K)``; without gradient.
        temperature: student temperature, > 0.
        scale: ``(K,)``, factors of the rows of ``weight``.
        magnitude: ``(K,)``, instead of scale: ``scale_k = magnitude_k / ||weight_k||``. Same value as
            ``scale=Prototypes.scale()``, without autograd's separate passes over ``(K, p)`` for the norm.
        bias: ``(K,)``, e.g. the vMF log-normalizer.
        pair_weights: ``(V, Q)``, default ``1 / (V Q N)``: the mean over views, targets and rows.
            DINO: ``(v != q) / (number of such pairs * N)``. Without gradient.
        row_weights: ``(N,)``, default 1. Without gradient.

    Returns:
        Scalar, float32 (float64 if embeddings or weight are).

    Raises:
        ValueError: for shapes that do not fit, a temperature that is not positive, scale together with
            magnitude, or targets or weights of pairs and rows that require a gradient.

    Example:
        >>> y = torch.nn.functional.normalize(torch.randn(12, 4, 8), dim=-1)
        >>> targets = torch.softmax(torch.randn(2, 4, 100), dim=-1)
        >>> pairs = 1 - torch.eye(12, 2)
        >>> loss = prototype_cross_entropy(
        ...     y, torch.randn(100, 8), targets, temperature=0.1, pair_weights=pairs / pairs.sum() / 4
        ... )
        >>> loss.shape, bool(loss > 0)
        (torch.Size([]), True)
    """
    embeddings = embeddings[None] if embeddings.dim() == 2 else embeddings
    targets = targets[None] if targets.dim() == 2 else targets
    _check(embeddings, weight, targets, scale, magnitude, bias, pair_weights, row_weights)
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive (DINO: 0.1)")
    (views, n, _), device = embeddings.shape, weight.device
    double = torch.float64 in (embeddings.dtype, weight.dtype)
    dtype = torch.float64 if double else torch.float32
    factor = scale if magnitude is None else magnitude
    if n == 0:  # e.g. no masked patch on this rank: zero, connected to every parameter
        empty = [x[:0].sum() for x in (weight, factor, bias) if x is not None]
        return torch.stack([x.to(dtype) for x in (embeddings.sum(), *empty)]).sum()

    product = dtype
    if not double and torch.is_autocast_enabled(device.type):
        product = torch.get_autocast_dtype(device.type)
    elif embeddings.dtype == weight.dtype:
        product = weight.dtype
    if pair_weights is None:
        share = 1 / (views * len(targets) * n)
        pair_weights = torch.full((views, len(targets)), share, device=device)
    if row_weights is None:
        row_weights = torch.ones(n, device=device)
    arguments = (
        embeddings,
        weight,
        None if factor is None else factor.to(dtype),
        None if bias is None else bias.to(dtype),
        targets,
        pair_weights.to(device, dtype),
        row_weights.to(device, dtype),
        float(temperature),
        magnitude is not None,
    )
    enabled = torch.is_grad_enabled()
    if fused.serves(weight, product):
        return fused.FusedCrossEntropy.apply(*arguments, product, fused.Tiles(), enabled)
    plan = choose_plan(weight, views * n, dtype, product)
    return StreamedCrossEntropy.apply(*arguments, plan, enabled)


def _check(
    embeddings: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor | None,
    magnitude: Tensor | None,
    bias: Tensor | None,
    pair_weights: Tensor | None,
    row_weights: Tensor | None,
) -> None:
    if embeddings.dim() != 3 or weight.dim() != 2 or targets.dim() != 3:
        raise ValueError(
            "prototype_cross_entropy needs embeddings (V, N, p), weight (K, p) and targets (Q, N, K), "
            f"got {tuple(embeddings.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}"
        )
    if scale is not None and magnitude is not None:
        raise ValueError("give scale or magnitude, not both: scale = magnitude / ||weight||")
    (v, n, p), k, q = embeddings.shape, len(weight), len(targets)
    if min(v, p, k, q) == 0:
        raise ValueError(f"V={v}, p={p}, K={k} and Q={q} must all be at least 1")
    expected = {
        "weight": (weight, (k, p), "(K, p), p as in embeddings (V, N, p)"),
        "targets": (targets, (q, n, k), "(Q, N, K), N as in embeddings and K as in weight"),
        "scale": (scale, (k,), "(K,)"),
        "magnitude": (magnitude, (k,), "(K,)"),
        "bias": (bias, (k,), "(K,)"),
        "pair_weights": (pair_weights, (v, q), "(V, Q)"),
        "row_weights": (row_weights, (n,), "(N,)"),
    }
    for name, (tensor, shape, meaning) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {shape} = {meaning}"
            )
    for name in ("targets", "pair_weights", "row_weights"):
        tensor = expected[name][0]
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name} requires a gradient that is not computed here: detach it first"
            )
