"""Soft-target cross-entropy between a teacher's targets and a student's prototype logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dinovmf_plugin.losses.chunked import Kernel, Plan, PrototypeGradients, choose_plan, room

__all__ = ["prototype_cross_entropy"]

# Tells whether the running backward pass keeps its graph (retain_graph=True); used if torch has it.
_GRAPH_IS_KEPT = "_get_current_graph_task_keep_graph"


class _PrototypeCrossEntropy(torch.autograd.Function):
    """The value, with gradients of embeddings, weight, factor and bias.

    The loss is a scalar: its gradients are known up to one number after the forward pass. Those that
    need no waiting exponentials are formed there and multiplied by that number in the backward pass.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        embeddings: Tensor,
        weight: Tensor,
        factor: Tensor | None,
        bias: Tensor | None,
        targets: Tensor,
        pair_weights: Tensor,
        row_weights: Tensor,
        temperature: float,
        normed: bool,
        plan: Plan,
        grad_enabled: bool,
    ) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            needs = [grad_enabled and needed for needed in ctx.needs_input_grad[:4]]
            k, dim = weight.shape
            views = embeddings.to(pair_weights.dtype) / temperature
            y = views.reshape(-1, dim)
            scale, norms = factor, None
            if normed and factor is not None:
                norms = torch.linalg.vector_norm(weight, dim=1, dtype=y.dtype).clamp_min_(1e-12)
                scale = factor / norms
            kernel = Kernel(y, weight, scale, norms, bias, targets.reshape(-1, k), plan)
            mixed = torch.einsum("vq,n,vnp->qnp", pair_weights, row_weights, views)
            mixed = mixed.reshape(-1, dim)
            mass = (pair_weights.sum(0)[:, None] * row_weights).reshape(-1)
            sums = targets.sum(dim=-1, dtype=y.dtype)
            share = ((pair_weights @ sums) * row_weights).reshape(-1)

            store = any(needs[1:])
            waits = store and plan.keep
            rows = plan.rows if store else len(y)
            buffer = room((k * rows,), plan.stored, y.device) if store else None
            mean = torch.zeros_like(y) if needs[0] else None
            target_mean = torch.zeros_like(mixed)
            grads = PrototypeGradients(kernel, needs[1:]) if store and not plan.keep else None
            value = y.new_zeros(())
            for lo in range(0, len(y), rows):
                hi = min(lo + rows, len(y))
                stored = None if buffer is None else buffer[: k * (hi - lo)].view(k, -1)
                lse, shifts = kernel.normalize(
                    y[lo:hi],
                    stored,
                    None if mean is None else mean[lo:hi],
                    target_mean if lo == 0 else None,
                )
                value += torch.dot(share[lo:hi], lse)
                if stored is None:
                    continue
                factors = (shifts - lse).exp_().mul_(share[lo:hi])
                if grads is not None:
                    ends = {"first": lo == 0, "last": hi == len(y)}
                    kernel.add_gradients(grads, y[lo:hi], stored, factors, mixed, mass, **ends)
            value -= torch.dot(mixed.view(-1), target_mean.view(-1))
            if bias is not None:
                value -= torch.dot(mass, torch.mv(kernel.targets.to(y.dtype), bias))

            grad_y = None
            if mean is not None:
                teacher = target_mean.view(targets.shape[0], -1, dim)
                pulled = torch.einsum("vq,n,qnp->vnp", pair_weights, row_weights, teacher)
                grad_y = mean.mul_(share[:, None]).view_as(views).sub_(pulled).div_(temperature)
            ctx.needs, ctx.plan = needs, plan
            ctx.dtypes = [
                None if x is None else x.dtype for x in (embeddings, weight, factor, bias)
            ]
            ctx.ready = None
            if waits:
                inputs = (y, weight, scale, norms, bias, kernel.targets)
                ctx.save_for_backward(grad_y, *inputs, stored, factors, mixed, mass)
            elif any(needs):
                ctx.ready = [grad_y, *([None] * 3 if grads is None else grads.wanted())]
            return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            if any(ctx.needs[1:]) and ctx.plan.keep:
                grad_y, y, weight, *rest, stored, factors, mixed, mass = ctx.saved_tensors
                scale, norms, bias, targets = rest
                kernel = Kernel(y, weight, scale, norms, bias, targets, ctx.plan)
                grads = PrototypeGradients(kernel, ctx.needs[1:])
                kernel.add_gradients(grads, y, stored, factors * grad, mixed * grad, mass * grad)
                out = [None if grad_y is None else grad_y * grad, *grads.wanted()]
            else:
                out = _multiplied(ctx, grad)
            out = [
                None if g is None else g.to(dtype) for g, dtype in zip(out, ctx.dtypes, strict=True)
            ]
        if torch.is_grad_enabled():  # create_graph=True
            out = [None if g is None else _FirstDerivative.apply(g.requires_grad_()) for g in out]
        return (*out, *([None] * 7))


class _FirstDerivative(torch.autograd.Function):
    """Passes a gradient on; differentiating it again is an error instead of silently 0."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        raise RuntimeError("prototype_cross_entropy has no second derivative")


def _multiplied(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """``ctx.ready`` times ``grad``: in place, unless the graph is kept for another backward pass."""
    ready, is_kept = ctx.ready, getattr(torch._C._autograd, _GRAPH_IS_KEPT, None)
    if ready is None:
        raise RuntimeError(
            "backward through prototype_cross_entropy a second time: "
            "give retain_graph=True to the first backward pass"
        )
    if is_kept is None or is_kept():
        return [None if g is None else g * grad for g in ready]
    ctx.ready = None
    return [None if g is None else g.mul_(grad) for g in ready]


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
    The gradient itself cannot be differentiated again.

    Args:
        embeddings: student rows ``(V, N, p)``, or ``(N, p)`` for one view; N may be 0.
        weight: ``(K, p)``, effective prototypes, or directions if scale or magnitude is given.
        targets: teacher probabilities ``(Q, N, K)``, or ``(N, K)``; without gradient.
        temperature: student temperature, > 0.
        scale: ``(K,)``, factors of the rows of ``weight``.
        magnitude: ``(K,)``, instead of scale: ``scale_k = magnitude_k / ||weight_k||``. Same value as
            ``scale=Prototypes.scale()``, without autograd's separate passes over ``(K, p)`` for the norm.
        bias: ``(K,)``, e.g. the vMF log-normaliser.
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
        pair_weights = torch.full((views, len(targets)), 1 / (views * len(targets) * n))
    if row_weights is None:
        row_weights = torch.ones(n)
    return _PrototypeCrossEntropy.apply(
        embeddings,
        weight,
        None if factor is None else factor.to(dtype),
        None if bias is None else bias.to(dtype),
        targets,
        pair_weights.to(device, dtype),
        row_weights.to(device, dtype),
        float(temperature),
        magnitude is not None,
        choose_plan(weight, views * n, dtype, product),
        torch.is_grad_enabled(),
    )


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
